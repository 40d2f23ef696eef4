"""The adapters of a mixture's experts that are held as one parameter, a matrix for each expert."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.low_rank_sum import low_rank_sum
from lora_lab.adapters.watch import base_class


class ExpertsAdapter(Adapter):
    """ΔW[e] = scale · B[e] A[e] for each expert e, with A (E, r, in) and B (E, out, r).

    The parameter (E, out, in) stays where it is, under its state-dict key, and is adapted where it
    is read. What is read is a `LowRankSum`: ΔW is formed neither for an expert that no token
    chooses, nor for one whose matrix is only multiplied by tokens. Dropout is on A's columns, the
    input features of each expert, with one mask each time the parameter is read.
    """

    kind = "experts"
    takes_dora = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any module that holds experts."""
        return any(cls.fits_parameter(layer, name) for name in layer._parameters)

    @classmethod
    def fits_parameter(cls, layer: nn.Module, parameter: str) -> bool:
        """A parameter of three dimensions in a module that holds experts.

        Such a module has as many `num_experts` as the parameter has matrices, or its class is named
        …Experts.
        """
        weight = layer._parameters.get(parameter)
        if weight is None or nn.parameter.is_lazy(weight) or weight.dim() != 3:
            return False
        is_counted = getattr(layer, "num_experts", None) == len(weight)
        return is_counted or base_class(layer).__name__.endswith("Experts")

    @staticmethod
    def weight_to_matrix(weight: Float[Tensor, "experts out in"]) -> Tensor:
        """The matrices of all experts, which the weight is."""
        return weight

    @staticmethod
    def matrix_to_weight(matrix: Float[Tensor, "experts out in"], shape: Sequence[int]) -> Tensor:
        """The weight, which the matrices of all experts are."""
        return matrix

    def draw_tensors(
        self,
        W: Float[Tensor, "experts out in"],
        layer: nn.Module,
        generator: torch.Generator,
        data: Any = None,
    ) -> dict[str, Tensor]:
        """The tensors that are drawn for the experts' matrices, one after the other."""
        of_experts = [None] * len(W) if data is None else data
        draw = super().draw_tensors
        drawn = [draw(w, layer, generator, d) for w, d in zip(W, of_experts, strict=True)]
        return {name: torch.stack([tensors[name] for tensors in drawn]) for name in drawn[0]}

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter `weight` with ΔW, which is formed only where it must be."""
        A, B = self.factors()
        return self.adapted(weight, self.drop_columns(A), B, self.scale)

    def factors_of_runs(self, r: int) -> tuple[Tensor, Tensor]:
        """The factors of the k runs that this adapter holds, with zeros up to rank r.

        They are A (k, E, r, in) with columns dropped in training, and scale · B (k, E, out, r).
        """
        A, B = self.factors()
        missing = r - A.shape[-2]
        return F.pad(self.drop_columns(A), (0, 0, 0, missing)), F.pad(self.scale * B, (0, missing))

    @staticmethod
    def adapted(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """The parameter with ΔW of the factors A (E, r, in) and B (E, out, r)."""
        return low_rank_sum(weight, B, A, scale)


class TransposedExpertsAdapter(ExpertsAdapter):
    """ExpertsAdapter where the parameter is (E, in, out), as gpt-oss holds it.

    transformers marks such modules by `is_transposed`. Without the mark (E, out, in) is assumed.
    """

    @classmethod
    def fits_parameter(cls, layer: nn.Module, parameter: str) -> bool:
        """As ExpertsAdapter, in a module that says that its matrices are in × out."""
        is_marked = getattr(layer, "is_transposed", False) is True
        return is_marked and super().fits_parameter(layer, parameter)

    @staticmethod
    def weight_to_matrix(weight: Float[Tensor, "experts rest out"]) -> Tensor:
        """The matrices of all experts, out × in."""
        return weight.mT

    @staticmethod
    def matrix_to_weight(matrix: Float[Tensor, "experts out in"], shape: Sequence[int]) -> Tensor:
        """The matrices of all experts, in × out as in the weight."""
        return matrix.mT

    @staticmethod
    def adapted(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """The parameter with (B A)ᵀ = Aᵀ Bᵀ."""
        return low_rank_sum(weight, A.mT, B.mT, scale)
