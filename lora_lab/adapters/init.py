"""What the factors A and B are before the first step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

Matrix = Float[Tensor, "out rest"]
Factors = tuple[Float[Tensor, "r rest"], Float[Tensor, "out r"]]


@dataclass(frozen=True)
class Init:
    """A way to start the factors of a weight.

    `draw(weight, r, scale, generator)` gives A and B for a weight as a matrix. `from_weight` says
    that both are read from the weight, so that neither is zero. ΔW is then measured from these
    first values: the base stays as it is, and ΔW starts at zero.
    """

    draw: Callable[[Tensor, int, float, torch.Generator], tuple[Tensor, Tensor]]
    from_weight: bool = False


def kaiming(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """A uniform on ±1/√rest (Kaiming with a = √5, as nn.Linear draws its weight), B zero."""
    A = torch.empty(r, weight.shape[1], dtype=torch.float32)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator), _zeros(weight, r)


def gaussian(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """A standard normal, B zero (Hu et al. 2021, section 4.1)."""
    A = torch.randn(r, weight.shape[1], generator=generator, dtype=torch.float32)
    return A, _zeros(weight, r)


def orthogonal(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """A with orthonormal rows, uniform among all such matrices; B zero."""
    A = torch.empty(r, weight.shape[1], dtype=torch.float32)
    return nn.init.orthogonal_(A, generator=generator), _zeros(weight, r)


def pissa(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """scale · B A is the weight's best rank-r approximation, split evenly between the factors.

    With the weight's singular value decomposition U S Vᵀ, cut to r: A = √(S/scale) Vᵀ and
    B = U √(S/scale) (Meng et al. 2024, equations 2 and 3).
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """B and A are the first r columns of Q and rows of R of the weight's QR (Büyükakyüz 2024)."""
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


def svd(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """A = Vᵀ and B = U S of the weight's first r singular triples (LoRA-XS, Bałazy et al. 2024)."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return Vh[:r], U[:, :r] * S[:r]


def _zeros(weight: Tensor, r: int) -> Tensor:
    return torch.zeros(weight.shape[0], r)


INITS: dict[str, Init] = {
    "kaiming": Init(kaiming),
    "gaussian": Init(gaussian),
    "orthogonal": Init(orthogonal),
    "pissa": Init(pissa, from_weight=True),
    "olora": Init(olora, from_weight=True),
    "svd": Init(svd, from_weight=True),
}
"""All inits by name."""
