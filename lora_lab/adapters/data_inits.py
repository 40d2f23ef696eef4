"""Inits that are computed from data: what a layer is given, and the gradient of its weight."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.first_triples import first_triples

DAMPING = 0.01
"""What CorDA adds to the diagonal of the inputs' second moments, of their mean there."""

GAMMA = 16
"""LoRA-GA's γ: A and B are those of orthonormal factors times ⁴√out / √γ (section 3.3)."""


class DataError(ValueError):
    """Data from which an init cannot start."""


@dataclass
class InputMoments:
    """Sums over the rows x (rest,) of what a layer was given: Σ x xᵀ, Σ x, and their number."""

    outer: Float[Tensor, "rest rest"]
    total: Float[Tensor, " rest"]
    rows: int = 0

    def add(self, rows: Float[Tensor, "rows rest"]) -> None:
        """Adds rows to the sums."""
        rows = rows.to(self.outer)
        self.outer.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.rows += len(rows)


def eva(
    weight: Tensor, r: int, scale: float, generator: torch.Generator, inputs: InputMoments
) -> tuple[Tensor, Tensor]:
    """A is the first r principal directions of the inputs, B zero (EVA, Paischer et al. 2024).

    The directions are those of the covariance: the inputs less their mean, as in the authors' and
    PEFT's incremental PCA. How ranks move between sites: adapters/rank_redistribution.py.
    """
    directions = principal_directions(inputs, r, generator)[1]
    return directions, weight.new_zeros(weight.shape[0], r)


def principal_directions(
    inputs: InputMoments, k: int, generator: torch.Generator
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k rest"]]:
    """The share of the inputs' variance along their first k principal directions; the directions.

    Inputs that are all equal have no variance, and shares of zero. Raises DataError for inputs that
    have no k directions or are not finite.
    """
    if inputs.rows <= k:
        raise DataError(f"init=eva: {inputs.rows} input rows have no {k} directions; more batches")
    mean = inputs.total / inputs.rows
    covariance = inputs.outer / inputs.rows - torch.outer(mean, mean)
    if not covariance.isfinite().all():
        raise DataError("init=eva: its inputs are not finite")
    _, variances, directions = first_triples(covariance, k, generator)
    return variances / covariance.trace().clamp(min=1e-30), directions


def corda(
    weight: Tensor, r: int, scale: float, generator: torch.Generator, inputs: InputMoments
) -> tuple[Tensor, Tensor]:
    """scale · B A is the part of W that matters most for these inputs (CorDA, Yang et al. 2024).

    With U S Vᵀ, the first r singular triples of W C, and the inputs' second moments C = Σ x xᵀ:
    B = U √(S/scale) and A = √(S/scale) Vᵀ C⁻¹ (its instruction-previewed mode). C is divided by the
    mean of its diagonal, so that inputs with C = I give PiSSA, and damped, as PEFT's.
    """
    C = inputs.outer / inputs.outer.diagonal().mean()  # (rest, rest)
    if not C.isfinite().all():
        raise DataError("init=corda: its inputs are all zero, or not finite")
    C.diagonal().add_(DAMPING)
    U, S, Vh = first_triples(weight @ C, r, generator)
    root = (S / scale).sqrt()
    return root[:, None] * torch.linalg.solve(C, Vh.T).T, U * root


def lora_ga(
    weight: Tensor, r: int, scale: float, generator: torch.Generator, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """A and B are singular vectors of the weight's gradient (LoRA-GA, Wang et al. 2024).

    With the first 2r triples U S Vᵀ of the gradient: A is the first r rows of Vᵀ and B the columns
    r to 2r of U, both times ⁴√out / √γ. A first step by gradient descent then changes W nearly as
    one of full fine-tuning would, cut to rank 2r.
    """
    if not (gradient.isfinite().all() and gradient.any()):
        raise DataError("init=lora_ga: its gradient is zero, or not finite")
    U, _, Vh = first_triples(gradient, 2 * r, generator)
    size = weight.shape[0] ** 0.25 / GAMMA**0.5
    return size * Vh[:r], size * U[:, r:]
