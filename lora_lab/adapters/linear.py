"""The factored adapters of linear layers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.adapter import FactoredAdapter, Stacks


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
        small, and so is the hidden gradient by a B laid out as r × out; two dimensions, mostly
        fewer rows, are spared the views.
        """
        if output.dim() == 2:
            return torch.addmm(output, hidden, B.T, alpha=self.scale)
        rows = output.reshape(1, -1, output.shape[-1])
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        across = B.T.contiguous()[None]
        return torch.baddbmm(rows, hidden, across, alpha=self.scale).view(output.shape)

    def down_stacked(self, layer: nn.Module, input: Tensor, A: Tensor) -> Tensor:
        """One product for all runs where they share the input, and none drops its own of it."""
        if len(input) == 1 and not (self.recipe.dropout and self.training):
            return F.linear(input[0], A.flatten(0, 1)).unflatten(-1, A.shape[:2]).movedim(-2, 0)
        input = self.dropped(input.expand(len(A), *input.shape[1:]))
        hidden: Any = _Lowered.apply(input.reshape(len(A), -1, input.shape[-1]), A)
        return hidden.view(*input.shape[:-1], A.shape[1])

    def up_stacked(self, layer: nn.Module, hidden: Stacks, B: Stacks, output: Tensor) -> Tensor:
        """One product for each stack, all into one result: no copy to join them."""
        onto, *hidden = (t.reshape(len(t), -1, t.shape[-1]) for t in (output, *hidden))
        added: Any = _Added.apply(onto, len(B), *hidden, *B)
        return added.view(-1, *output.shape[1:])


class _Lowered(torch.autograd.Function):
    """x Aᵀ of k runs: x (k, M, in), A (k, r, in); A's gradient as r × in, not in × r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        hidden = torch.bmm(x, A.mT)
        ctx.save_for_backward(x.to(hidden.dtype), A.to(hidden.dtype))
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        x, A = ctx.saved_tensors
        to_x, to_A = ctx.needs_input_grad
        return (
            torch.bmm(gradient, A) if to_x else None,
            torch.bmm(gradient.mT, x) if to_A else None,
        )


class _Added(torch.autograd.Function):
    """onto + h Bᵀ for runs in stacks: onto (runs or 1, M, out), h (k, M, r), B (k, out, r).

    Thin products are several times faster with their long side contiguous: B is laid out as
    r × out, and so is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, onto: Tensor, stacks: int, *factors: Tensor) -> Tensor:
        kind = onto.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else onto.dtype
        onto = onto.to(dtype)
        hidden = [h.to(dtype) for h in factors[:stacks]]
        across = [B.mT.to(dtype).contiguous() for B in factors[stacks:]]
        result = onto.new_empty(sum(map(len, hidden)), *onto.shape[1:])
        at = 0
        for h, b in zip(hidden, across, strict=True):
            part = slice(at, at := at + len(h))
            torch.baddbmm(onto if len(onto) == 1 else onto[part], h, b, out=result[part])
        ctx.save_for_backward(*hidden, *across)
        ctx.stacks, ctx.shared = stacks, len(onto) == 1 < len(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        hidden, across = ctx.saved_tensors[: ctx.stacks], ctx.saved_tensors[ctx.stacks :]
        to_onto = None
        if ctx.needs_input_grad[0]:
            to_onto = gradient.sum(0, keepdim=True) if ctx.shared else gradient
        parts = gradient.split([len(h) for h in hidden])
        to_hidden = [torch.bmm(g, b.mT) for g, b in zip(parts, across, strict=True)]
        to_B = [torch.bmm(h.mT, g).mT for h, g in zip(hidden, parts, strict=True)]
        return to_onto, None, *to_hidden, *to_B


class TransposedLinearAdapter(LinearAdapter):
    """The same on the `Conv1D` of Hugging Face's GPT-2, whose weight is in × out."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Known by its name: nothing here imports transformers."""
        made = type(layer)
        return (made.__module__, made.__name__) == ("transformers.pytorch_utils", "Conv1D")

    @staticmethod
    def weight_to_matrix(weight: Float[Tensor, "in out"]) -> Float[Tensor, "out in"]:
        """out × in, as of any linear layer."""
        return weight.T

    @staticmethod
    def matrix_to_weight(
        matrix: Float[Tensor, "out in"], shape: Sequence[int]
    ) -> Float[Tensor, "in out"]:
        """in × out, as the weight."""
        return matrix.T
