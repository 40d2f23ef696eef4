"""What A and B are before the first step: (weight as a matrix, r, generator) → (A, B)."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Init = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


def kaiming(
    weight: Float[Tensor, "out rest"], r: int, generator: torch.Generator
) -> tuple[Float[Tensor, "r rest"], Float[Tensor, "out r"]]:
    """A uniform on ±1/√rest (Kaiming with a = √5, as nn.Linear draws its weight), B zero."""
    A = nn.init.kaiming_uniform_(
        torch.empty(r, weight.shape[1]), a=math.sqrt(5), generator=generator
    )
    return A, torch.zeros(weight.shape[0], r)


def gaussian(
    weight: Float[Tensor, "out rest"], r: int, generator: torch.Generator
) -> tuple[Float[Tensor, "r rest"], Float[Tensor, "out r"]]:
    """A standard normal, B zero (Hu et al. 2021, section 4.1)."""
    return torch.randn(r, weight.shape[1], generator=generator), torch.zeros(weight.shape[0], r)


INITS: dict[str, Init] = {"kaiming": kaiming, "gaussian": gaussian}
