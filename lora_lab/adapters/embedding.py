"""The factored adapter of embeddings."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, AdapterError, Recipe
from lora_lab.adapters.linear import LinearAdapter


class EmbeddingAdapter(LinearAdapter):
    """ΔW = scale · (B A)ᵀ on nn.Embedding, A (r × tokens) and B (features × r).

    A starts at zero and B is drawn, so that a token never seen in training keeps its vector. There
    are no input features to drop: dropout is on the r numbers looked up in A. The padding token's
    change is zero and takes no gradient. With scale_grad_by_freq both factors take the gradient
    that the layer's own weight would pass on. A sparse layer's factors have dense gradients.
    """

    kind = "embedding"
    zero_factor: ClassVar = "A"

    def __init__(
        self, layer: nn.Module, parameter: str, rows: tuple[int, int] | None, recipe: Recipe
    ):
        super().__init__(layer, parameter, rows, recipe)
        assert isinstance(layer, nn.Embedding)
        self.padding = layer.padding_idx

    def fill(self, tensors: dict[str, Tensor]) -> Adapter:
        """Raises AdapterError for an A that changes the padding token."""
        if self.padding is not None and "A" in tensors and tensors["A"][..., self.padding].any():
            raise AdapterError(
                f"A changes the padding token {self.padding}, whose change is always zero"
            )
        return super().fill(tensors)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """nn.Embedding itself: a subclass may have another forward."""
        return type(layer) is nn.Embedding

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        """max_norm: torch then rewrites the frozen weight in every forward pass."""
        if getattr(layer, "max_norm", None) is not None:
            return "its max_norm rewrites the base's weight in every forward pass; set it to None"
        return None

    @staticmethod
    def weight_to_matrix(weight: Float[Tensor, "tokens features"]) -> Tensor:
        """features × tokens: the map from one token of all to its vector."""
        return weight.T

    @staticmethod
    def matrix_to_weight(matrix: Float[Tensor, "features tokens"], shape: Sequence[int]) -> Tensor:
        """tokens × features, as the weight."""
        return matrix.T

    def forward(
        self,
        layer: nn.Module,
        input: Int[Tensor, "*batch"],
        output: Float[Tensor, "*batch features"],
    ) -> Tensor:
        """As of any adapter, with the layer's own treatment of padding and of frequent tokens."""
        # Autocast leaves lookups as they are, and would round the base's vectors with the sum.
        with torch.autocast(output.device.type, enabled=False):
            adapted = super().forward(layer, input, output)
        assert isinstance(layer, nn.Embedding)
        if layer.scale_grad_by_freq:
            change = adapted - output
            share = 1 / input.flatten().bincount(minlength=1)[input].to(change.dtype)[..., None]
            adapted = output + change * share + (change * (1 - share)).detach()
        if layer.padding_idx is not None and self.magnitude is not None:
            padding = (input == layer.padding_idx)[..., None]
            adapted = adapted.masked_fill(padding, 0) + output.masked_fill(~padding, 0)
        return adapted

    def delta(self, weight: Tensor) -> Tensor:
        """tokens × features; nothing for the padding token, whatever DoRA does."""
        delta = super().delta(weight)
        if self.padding is None:
            return delta
        return delta.index_fill(0, torch.tensor(self.padding, device=delta.device), 0)

    def down(
        self, layer: nn.Module, input: Int[Tensor, "*batch"], A: Float[Tensor, "r tokens"]
    ) -> Float[Tensor, "*batch r"]:
        """The columns of A that belong to the tokens."""
        assert isinstance(layer, nn.Embedding)
        return self.dropped(F.embedding(input, A.T, layer.padding_idx))

    def down_stacked(self, layer: nn.Module, input: Tensor, A: Tensor) -> Tensor:
        """One lookup for all runs where they share the tokens; else one for each."""
        assert isinstance(layer, nn.Embedding)
        if len(input) > 1:
            return torch.stack([self.down(layer, x, a) for x, a in zip(input, A, strict=True)])
        hidden = F.embedding(input[0], A.flatten(0, 1).T, layer.padding_idx)
        return self.dropped(hidden.unflatten(-1, A.shape[:2]).movedim(-2, 0))
