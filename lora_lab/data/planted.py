"""What the planted data sets share: a change of one weight of a linear model, and its best ΔW."""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lab.adapters import INITS, adapter_class, attached
from lora_lab.analysis import theory
from lora_lab.analysis.theory import LeastSquaresFit, Prediction
from lora_lab.data.module import Data, Phase


class Planted(Data):
    """A change planted in the one weight of a linear model, from all the rows at every step.

    Validation is on the same rows, so that the loss at the end is that of the best ΔW there is.
    """

    task = "regression"

    def __init__(self, phase: Phase, steps: int, seed: int):
        super().__init__(phase, None, seed, steps)

    @abstractmethod
    def design(self) -> tuple[Tensor, Tensor]:
        """The drawn data as the weight's matrix meets it: X (n × rest) and Y (n × out)."""

    def residual(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """X, and what the base leaves of Y, in float64."""
        (site,) = base_parameters(model)
        layer = model.get_submodule(site)
        W = adapter_class(layer).weight_to_matrix(
            base_parameters(model)[site].detach().cpu().double()
        )
        X, Y = (tensor.double() for tensor in self.design())
        return X, Y - X @ W.T

    def best_update(self, model: nn.Module) -> LeastSquaresFit | None:
        """The best ΔW for the adapter on `model`; None for DoRA, under dropout, of many weights."""
        if len(base_parameters(model)) != 1:
            return None
        (site,) = base_parameters(model)
        X, Y = self.residual(model)
        X = X[:, seen := X.any(0)]  # not an embedding's tokens that never come
        if (adapter := attached(model).get(site)) is None:
            return theory.least_squares(X, Y)
        if adapter.magnitude is not None or adapter.recipe.dropout:
            return None
        held = {name: t.detach().cpu().double() for name, t in adapter.tensors().items()}
        A, B = held["A"][:, seen], held["B"]
        match adapter.recipe.trains, adapter.zero_factor:
            case "both", _ if "A0" in held:
                start = adapter.scale * held["B0"] @ held["A0"][:, seen]
                found = theory.least_squares(X, Y, adapter.r, start=start)
            case "both", _:
                found = theory.least_squares(X, Y, adapter.r)
            case "core", _:
                found = theory.least_squares(X, Y, A=A, B=B)
            case _, "A":
                found = theory.least_squares(X, Y, B=B)
            case _:
                found = theory.least_squares(X, Y, A=A)
        # Factors that start from the weight also move the tokens that never come.
        moved = INITS[adapter.recipe.init].from_weight and not seen.all()
        return replace(found, is_unique=found.is_unique and not moved)

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """The loss, and the first singular values of ΔW where only one ΔW leaves as little."""
        if (best := self.best_update(model)) is None:
            return {}
        found = {"val/loss": Prediction(best.loss)}
        if best.is_unique:
            (site,) = base_parameters(model)
            sigma = torch.linalg.svdvals(best.delta)[:4].tolist()
            for i, value in enumerate(sigma, 1):
                if value > 1e-3 * sigma[0]:  # the rest is rounding
                    found[f"spectra/{site}/sigma_{i}"] = Prediction(value)
        return found


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters, by the layers that hold them."""
    named = model.named_parameters()
    return {name.rpartition(".")[0]: p for name, p in named if "lora" not in name.split(".")}


def planted_matrix(out: int, rest: int, sigma: list[float], draws: torch.Generator) -> Tensor:
    """A matrix of singular values `sigma` between random directions, out × rest, in float64.

    Raises ValueError for more values than it can have.
    """
    if len(sigma) > min(out, rest):
        raise ValueError(
            f"sigma={sigma}: {len(sigma)} singular values, and {out} × {rest} has {min(out, rest)}"
        )
    U, V = (orthonormal(size, len(sigma), draws) for size in (out, rest))
    return U * torch.tensor(sigma, dtype=torch.float64) @ V.T


def orthonormal(rows: int, columns: int, draws: torch.Generator) -> Tensor:
    """Random orthonormal columns, in float64. Raises ValueError for more columns than rows."""
    if columns > rows:
        raise ValueError(f"{columns} orthonormal columns do not fit in {rows} rows")
    return torch.linalg.qr(torch.randn(rows, columns, generator=draws, dtype=torch.float64)).Q
