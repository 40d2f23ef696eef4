"""AdaLoRA's form: ΔW as a sum of triplets, any of which can be pruned, and its penalty."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lab.adapters.form import Form, Tensors

STANDARD_DEVIATION = 0.02
"""Of the first values of P and Q, as in the authors' code and PEFT."""


class AdaLoRA(Form):
    """B A = P Λ Q with a diagonal Λ (Zhang et al. 2023, section 3.1). B holds P, A holds Q.

    A triplet is a column of P, a number λ of Λ and a row of Q. It is pruned by λ = 0. P and Q are
    held near orthogonality by a penalty in training, so that λ are nearly ΔW's singular values.
    """

    kinds = ("linear",)
    zero_tensor = "lambdas"

    def shapes(self, out: int, rest: int, positions: int, r: int) -> dict[str, tuple[int, ...]]:
        """Q and P as LoRA's A and B, and a λ for each of the rank."""
        return {"A": (r, rest), "B": (out, r), "lambdas": (r,)}

    def draw(
        self, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """P and Q normal, Λ zero."""
        tensors = {"lambdas": torch.zeros(shapes["lambdas"])}
        for name in ("A", "B"):
            empty = torch.empty(shapes[name], dtype=torch.float32)
            tensors[name] = empty.normal_(0, STANDARD_DEVIATION, generator=generator)
        return tensors

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Q and P Λ."""
        return tensors["A"], tensors["B"] * tensors["lambdas"][..., None, :]


def without_pruned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, rest) and B = P Λ (out, r) without the triplets whose λ is 0; at least one is left."""
    kept = B.any(0)
    kept[0] |= ~kept.any()
    return A[kept], B[:, kept]


@torch.no_grad()
def add_penalty_gradients(P: nn.Parameter, Q: nn.Parameter, weight: float) -> None:
    """Adds the gradients of weight · (‖PᵀP − I‖² + ‖QQᵀ − I‖²) to those of P and Q.

    P is (out, r), Q (r, rest). A parameter without a gradient gets none.
    """
    for parameter, rows in ((P, P.T), (Q, Q)):  # rows (r, n), which are to be orthonormal
        if parameter.grad is not None:
            excess = rows @ rows.T
            excess.diagonal().sub_(1)
            gradient = 4 * weight * excess @ rows  # of ‖rows rowsᵀ − I‖²
            parameter.grad += gradient.T if parameter is P else gradient
