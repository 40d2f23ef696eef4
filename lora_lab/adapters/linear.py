"""The factored adapters of linear layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.adapter import FactoredAdapter


class LinearAdapter(FactoredAdapter):
    """ΔW = scale · B A on nn.Linear: two thin products, O(r (in + out)) a row."""

    kind = "linear"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """nn.Linear itself: a subclass may have another forward."""
        return type(layer) is nn.Linear

    def down(
        self, layer: nn.Module, input: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]
    ) -> Float[Tensor, "*batch r"]:
        """A x."""
        return F.linear(self.dropped(input), A)

    def up(
        self,
        layer: nn.Module,
        hidden: Float[Tensor, "*batch r"],
        B: Float[Tensor, "out r"],
        output: Float[Tensor, "*batch out"],
    ) -> Float[Tensor, "*batch out"]:
        """One product onto the layer's output: no pass over it for the scale or the sum.

        As a batch of one, B's gradient is r × out, several times faster than out × r where r is
        small; two dimensions, mostly fewer rows, are spared the views.
        """
        if output.dim() == 2:
            return torch.addmm(output, hidden, B.T, alpha=self.scale)
        rows = output.reshape(1, -1, output.shape[-1])
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        return torch.baddbmm(rows, hidden, B.T[None], alpha=self.scale).view(output.shape)


class TransposedLinearAdapter(LinearAdapter):
    """The same on the `Conv1D` of Hugging Face's GPT-2, whose weight is in × out."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Known by its name: nothing here imports transformers."""
        made = type(layer)
        return (made.__module__, made.__name__) == ("transformers.pytorch_utils", "Conv1D")

    @staticmethod
    def matrix(weight: Float[Tensor, "in out"]) -> Float[Tensor, "out in"]:
        """out × in, as of any linear layer."""
        return weight.T

    @staticmethod
    def shaped(matrix: Float[Tensor, "out in"], shape: Sequence[int]) -> Float[Tensor, "in out"]:
        """in × out, as the weight."""
        return matrix.T
