"""The factored adapter of embeddings."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.factored import Hidden, Output
from lora_lab.adapters.linear import LinearAdapter
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.watch import keeps_forward


class EmbeddingAdapter(LinearAdapter):
    """ΔW = scale · (B A)ᵀ on nn.Embedding, with A (r × tokens) and B (features × r).

    A starts at zero and B is drawn, so that a token never seen in training keeps its vector. There
    are no input features to drop: dropout is on the r numbers looked up in A. The padding token's
    change is zero and takes no gradient. With scale_grad_by_freq both factors take the gradient
    that the layer's weight would pass on. The factors have dense gradients, even where the layer is
    sparse.
    """

    kind = "embedding"
    zero_factor: ClassVar = "A"
    is_transposed: ClassVar = True

    def __init__(self, layer: nn.Embedding, *args: Any):
        super().__init__(layer, *args)
        self.padding = layer.padding_idx

    def fill(self, tensors: dict[str, Tensor]) -> Adapter:
        """Raises AdapterError for an A that changes the padding token."""
        padding = self.padding
        if padding is not None and "A" in tensors and tensors["A"][..., padding].any():
            raise AdapterError(f"A changes the padding token {padding}, whose change stays zero")
        return super().fill(tensors)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """nn.Embedding, and subclasses that keep its forward."""
        return keeps_forward(layer, nn.Embedding, "forward")

    @staticmethod
    def weight_to_matrix(weight: Float[Tensor, "tokens features"]) -> Tensor:
        """features × tokens: the map from a one-hot token to its vector."""
        return weight.T

    @staticmethod
    def matrix_to_weight(
        matrix: Float[Tensor, "*runs features tokens"], shape: Sequence[int]
    ) -> Tensor:
        """tokens × features, as the weight."""
        return matrix.mT

    def forward(self, layer: nn.Embedding, input: Int[Tensor, "*batch"], output: Output) -> Output:
        """The vectors with W + ΔW, with the layer's treatment of padding and frequent tokens."""
        # Autocast leaves lookups in float32. On the sum it would round the base's vectors, too.
        with torch.autocast(output.device.type, enabled=False):
            adapted = super().forward(layer, input, output)
        if layer.scale_grad_by_freq:
            # Each token's gradient is divided by how often it occurs in the input. For a token that
            # occurs 4 times the share is 1/4: a quarter of its change carries the gradient, the
            # rest is detached, and together they are the full change.
            change = adapted - output
            share = 1 / input.flatten().bincount(minlength=1)[input].to(change.dtype)[..., None]
            adapted = output + change * share + (change * (1 - share)).detach()
        if layer.padding_idx is not None and self.magnitude is not None:
            # DoRA's gain is for features, so it would scale the padding token's vector as well.
            is_padding = (input == layer.padding_idx)[..., None]
            adapted = adapted.masked_fill(is_padding, 0) + output.masked_fill(~is_padding, 0)
        return adapted

    def delta_of(self, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
        """ΔW, tokens × features. The padding token's row is zero, with DoRA too."""
        delta = super().delta_of(A, B, weight)  # (*runs, tokens, features)
        if self.padding is None:
            return delta
        return delta.index_fill(-2, torch.tensor(self.padding, device=delta.device), 0)

    def drop_columns(self, A: Tensor) -> Tensor:
        """A with single numbers dropped: a token's column is what is looked up of it."""
        return self.apply_dropout(A)

    def down(
        self, layer: nn.Embedding, input: Int[Tensor, "*batch"], A: Float[Tensor, "r tokens"]
    ) -> Hidden:
        """The columns of A that belong to the tokens."""
        return self.apply_dropout(F.embedding(input, A.T, layer.padding_idx))

    def down_stacked(self, layer: nn.Embedding, input: Tensor, A: Tensor) -> Tensor:
        """One lookup for all runs where they share the tokens, else one for each."""
        if len(input) > 1:
            return torch.stack([self.down(layer, x, a) for x, a in zip(input, A, strict=True)])
        # A (runs, r, tokens) as one table of runs · r numbers a token
        hidden = F.embedding(input[0], A.flatten(0, 1).T, layer.padding_idx)  # (*batch, runs · r)
        return self.apply_dropout(hidden.unflatten(-1, A.shape[:2]).movedim(-2, 0))
