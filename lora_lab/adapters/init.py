"""What the factors A and B are before the first step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.data_inits import corda, eva, lora_ga
from lora_lab.adapters.first_triples import first_triples

Matrix = Float[Tensor, "out rest"]
Factors = tuple[Float[Tensor, "r rest"], Float[Tensor, "out r"]]


@dataclass(frozen=True)
class Init:
    """A way to start the factors of a weight.

    `draw(weight, r, scale, generator)` gives A and B for a weight as a matrix. An init that `reads`
    data takes it as a fifth argument: the moments of the layer's "inputs" (InputMoments), or the
    weight's "gradient", a matrix too. B is zero, but:

    - `starts_nonzero`: neither is zero. ΔW is then measured from these first values: the base stays
      as it is, and ΔW starts at zero.
    - `zero_factor` "A": A is zero, in layers of all kinds. None: it is the kind's, see `Adapter`.

    `is_random`: what is not zero is drawn at random, and says nothing of the weight. `kinds` are
    those of the layers it is for (None: all), `directions` how many singular directions it takes
    for each of the rank.
    """

    draw: Callable[..., tuple[Tensor, Tensor]]
    is_random: bool = False
    starts_nonzero: bool = False
    zero_factor: str | None = None
    reads: Literal["inputs", "gradient"] | None = None
    kinds: tuple[str, ...] | None = None
    directions: int = 1


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
    U, S, Vh = first_triples(weight, r, generator)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


def milora(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """As `pissa`, of the weight's last r singular triples (MiLoRA, Wang et al. 2024, equation 4).

    Of a weight without full rank these are zero, and a factor pair of zeros never moves.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[-r:] / scale).sqrt()
    return root[:, None] * Vh[-r:], U[:, -r:] * root


def mica(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """B is the weight's last r left singular vectors, A zero (Rüdiger and Raschka 2026).

    With `trains="zero"` this is MiCA: B is frozen, and ΔW stays in the span of B.
    """
    U = torch.linalg.svd(weight, full_matrices=False)[0]
    return weight.new_zeros(r, weight.shape[1]), U[:, -r:]


def olora(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """B and A are the first r columns of Q and rows of R of the weight's QR (Büyükakyüz 2024)."""
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


def svd(weight: Matrix, r: int, scale: float, generator: torch.Generator) -> Factors:
    """A = Vᵀ and B = U S of the weight's first r singular triples (LoRA-XS, Bałazy et al. 2024)."""
    U, S, Vh = first_triples(weight, r, generator)
    return Vh, U * S


def _zeros(weight: Tensor, r: int) -> Tensor:
    return torch.zeros(weight.shape[0], r)


WITH_INPUTS = ("linear", "conv")
"""The kinds of layers that are called with features; an embedding's one-hot tokens are none."""

NOT_EMBEDDING = ("linear", "conv", "experts", "weight")
"""The kinds for LoRA-GA: in an embedding the two factors would change places."""

INITS: dict[str, Init] = {
    "kaiming": Init(kaiming, is_random=True),
    "gaussian": Init(gaussian, is_random=True),
    "orthogonal": Init(orthogonal, is_random=True),
    "pissa": Init(pissa, starts_nonzero=True),
    "olora": Init(olora, starts_nonzero=True),
    "svd": Init(svd, starts_nonzero=True),
    "milora": Init(milora, starts_nonzero=True),
    "mica": Init(mica, zero_factor="A"),
    "eva": Init(eva, reads="inputs", kinds=WITH_INPUTS),
    "corda": Init(corda, starts_nonzero=True, reads="inputs", kinds=WITH_INPUTS),
    "lora_ga": Init(
        lora_ga, starts_nonzero=True, reads="gradient", kinds=NOT_EMBEDDING, directions=2
    ),
}
"""All inits by name."""
