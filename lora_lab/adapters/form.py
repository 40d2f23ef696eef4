"""What an adapter is made of where it is not LoRA's two trained factors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of an adapter by name. In a `Pack` each has a dimension of runs first."""


class Form(ABC):
    """A way to make the product B A of ΔW = scale · B A from other trained tensors.

    A form says which tensors an adapter holds, their first values, and the factors that they make.
    What an adapter does (forward, merge, spectra, packs, files) follows from the factors.

    `kinds` are the kinds of layers it is for. `zero_tensor` is the tensor that starts at zero, so
    that ΔW does, and `frozen` are those that no gradient moves. `grows` are those whose rank grows
    in training. With `is_shared` all sites of a rank draw from one stream of numbers, else each
    site from its own.
    """

    kinds: ClassVar[tuple[str, ...]]
    zero_tensor: str
    frozen: ClassVar[tuple[str, ...]] = ()
    grows: ClassVar[tuple[str, ...]] = ()
    is_shared: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, out: int, rest: int, positions: int, r: int) -> dict[str, tuple[int, ...]]:
        """The tensors' names and shapes for a weight as a matrix (out × rest).

        `positions` are those of a convolution's kernel, 1 of other layers: a row of the matrix has
        that many numbers for each input channel.
        """

    def stored_shapes(
        self, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, tuple[int, ...]]:
        """The shapes that tensors in a file must have, which have the shapes `stored`.

        They are those of `shapes`, the first ones, but where tensors grow in training.
        """
        return shapes

    @abstractmethod
    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """A (*runs, rank, rest) and B (*runs, out, rank)."""

    def draw(
        self, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The first values: uniform on ±1/√columns (Kaiming with a = √5), and one tensor zero."""
        tensors = {}
        for name, shape in shapes.items():
            bound = 0.0 if name == self.zero_tensor else 1 / math.sqrt(shape[-1])
            tensors[name] = uniform(shape, bound, generator)
        return tensors

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """B A applied to rows x: (…, rest) → (…, out)."""
        A, B = self.factors(tensors)
        return F.linear(F.linear(x, A), B)

    def trained_numbers(self, out: int, rest: int, positions: int, r: int) -> int:
        """How many numbers train at a weight (out × rest)."""
        shapes = self.shapes(out, rest, positions, r)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in self.frozen)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Numbers uniform on ±bound, in float32."""
    empty = torch.empty(shape, dtype=torch.float32)
    return empty.uniform_(-bound, bound, generator=generator)


def thin_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (*runs, out, rest) as factors A and B, one of which is the identity."""
    out, rest = matrix.shape[-2:]
    identity = torch.eye(min(out, rest), dtype=matrix.dtype, device=matrix.device)
    identity = identity.expand(*matrix.shape[:-2], -1, -1)
    return (matrix, identity) if out <= rest else (identity, matrix)
