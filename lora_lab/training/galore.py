"""GaLore: full fine-tuning whose optimizer remembers gradients in a subspace of rank r."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lab.adapters.first_triples import first_triples


class GaLore(Optimizer):
    """AdamW whose moments are of projected gradients (Zhao et al. 2024, algorithm 2).

    G (m × n) with m ≤ n is the gradient of a matrix, and U S Vᵀ its SVD in the first and each
    `every`-th step after it. P is the first r columns of U until the next of these steps. Adam gets
    Pᵀ G (r × n) and gives N, and the weight moves by −lr · scale · P N. With m > n it is the rows
    that are projected, by V. So ΔW may have full rank, and the optimizer remembers 2 r n + r m
    numbers in the place of Adam's 2 m n. The moments stay where P changes, as in the paper.

    Matrices whose smaller side is not above r, and parameters that are no matrices, take Adam's
    step, with no scale.

    Args:
        params: parameters, or groups of them.
        lr: the learning rate; the paper's is some ten times Adam's, as the scale divides it.
        r: the rank of the projected gradients.
        every: the steps from one SVD to the next (T).
        scale: the factor on a projected step (α).
        betas, eps, weight_decay: AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        r: int = 8,
        every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        for name, value, least in (("r", r, 1), ("every", every, 1), ("lr", lr, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        for name, value in (("scale", scale), ("eps", eps)):
            if value <= 0:
                raise ValueError(f"{name}={value}: must be more than 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: must be at least 0 and less than 1")
        if weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay}: must be at least 0")
        settings = {"lr": lr, "r": r, "every": every, "scale": scale}
        settings |= {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """One step of one parameter."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        step = state["step"] = state.get("step", 0) + 1
        if is_projected := parameter.dim() == 2 and min(parameter.shape) > group["r"]:
            if (step - 1) % group["every"] == 0:
                state["basis"] = basis_of(gradient, group["r"])
            gradient = project(gradient, state["basis"])
        change = adam_change(state, gradient, step, group["betas"], group["eps"])
        if is_projected:
            change = group["scale"] * project_back(change, state["basis"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(change, alpha=-group["lr"])


def basis_of(gradient: Tensor, r: int) -> Tensor:
    """The first r singular directions on a gradient's smaller side, as columns (m or n, r)."""
    G = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    U, _, Vh = first_triples(G, r, torch.Generator().manual_seed(0))
    return (U if is_wide(gradient.shape) else Vh.T).to(gradient.dtype).contiguous()


def is_wide(shape: torch.Size) -> bool:
    """Whether a matrix has no more rows than columns, so that its columns are projected."""
    return shape[0] <= shape[1]


def project(gradient: Tensor, basis: Tensor) -> Tensor:
    """G (m, n) in the subspace of a basis: (r, n), or of a tall matrix (m, r)."""
    return basis.T @ gradient if is_wide(gradient.shape) else gradient @ basis


def project_back(change: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """The matrix (m, n) of a change in the subspace."""
    return basis @ change if is_wide(shape) else change @ basis.T


def adam_change(
    state: dict[str, Any], gradient: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's m̂ / (√v̂ + ε), after the moments in `state` took note of the gradient."""
    if "exp_avg" not in state:
        state |= {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
    (beta1, beta2), m, v = betas, state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of what an optimizer remembers of its parameters, counts of steps left out."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
