"""The factored adapters of linear layers."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lab.adapters.factored import ByStack, FactoredAdapter, Hidden, Output
from lora_lab.adapters.linear_trial import computes_as_linear
from lora_lab.adapters.quantized import is_bitsandbytes_linear
from lora_lab.adapters.watch import base_class


class LinearAdapter(FactoredAdapter):
    """ΔW = scale · B A on nn.Linear: two thin products, which cost O(r (in + out)) a row."""

    kind = "linear"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """nn.Linear, bitsandbytes', and each subclass that computes x Wᵀ + b when it is called.

        Not the out_proj of nn.MultiheadAttention, whose weight is read and which is never called.
        """
        if (Layer := base_class(layer)) is nn.Linear or is_bitsandbytes_linear(Layer):
            return True
        is_called = Layer is not NonDynamicallyQuantizableLinear
        return is_called and isinstance(layer, nn.Linear) and computes_as_linear(layer)

    def add_change(self, layer: Any, input: Tensor, output: Output) -> Output:
        """As of all factored adapters; another form than LoRA computes it in its cheapest order."""
        if self.form is None:
            return super().add_change(layer, input, output)
        tensors = {name: t.to(output.dtype) for name, t in self.form_tensors().items()}
        change = self.form.product(tensors, self.apply_dropout(input))  # (*batch, out)
        return output + self.scale * self.in_all_rows(change, dim=-1)

    def down(
        self, layer: Any, input: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]
    ) -> Hidden:
        """A x."""
        return F.linear(self.apply_dropout(input), A)

    def up(self, layer: Any, hidden: Hidden, B: Float[Tensor, "out r"], output: Output) -> Output:
        """`output` + scale · `hidden` Bᵀ, in one product without another pass over the output."""
        # Two dimensions mostly have few rows, and are spared the views below.
        if output.dim() == 2:
            return torch.addmm(output, hidden, B.T, alpha=self.scale)
        # As a batch of one, with B laid out as r × out: the gradients of `hidden` and of B are then
        # products with their long side contiguous, several times faster where r is small.
        # output (batch 8, tokens 16, out 64) → (1, 128, 64), hidden → (1, 128, r), B → (1, r, 64)
        rows = output.reshape(1, -1, output.shape[-1])
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        B_transposed = B.T.contiguous()[None]  # (1, r, out)
        return torch.baddbmm(rows, hidden, B_transposed, alpha=self.scale).view(output.shape)

    def down_stacked(self, layer: Any, input: Tensor, A: Tensor) -> Tensor:
        """One product for all runs where they share the input and none drops entries of it."""
        if len(input) == 1 and not (self.recipe.dropout and self.training):
            hidden = F.linear(input[0], A.flatten(0, 1))  # (*batch, runs · r)
            return hidden.unflatten(-1, A.shape[:2]).movedim(-2, 0)  # (runs, *batch, r)
        input = self.apply_dropout(input.expand(len(A), *input.shape[1:]))
        hidden: Any = _StackedDown.apply(input.reshape(len(A), -1, input.shape[-1]), A)
        return hidden.view(*input.shape[:-1], A.shape[1])

    def up_stacked(self, layer: Any, hidden: ByStack, B: ByStack, output: Tensor) -> Tensor:
        """One product for each stack, all into one result that nothing has to join."""
        rows, *hidden = (t.reshape(len(t), -1, t.shape[-1]) for t in (output, *hidden))
        result: Any = _StackedUp.apply(rows, len(B), *hidden, *B)
        return result.view(-1, *output.shape[1:])


# x Aᵀ for the runs of a stack, as torch.bmm(x, A.mT) with a faster backward. For 3 runs, 128 rows,
# 64 features and r = 4: x (3, 128, 64), A (3, 4, 64), the result (3, 128, 4). torch's backward
# computes the gradient of A.mT, xᵀ g (3, 64, 4), and transposes it. Here it is gᵀ x (3, 4, 64), the
# same numbers with the long side contiguous: such thin products are several times faster.
class _StackedDown(torch.autograd.Function):
    """x Aᵀ of k runs: x (k, rows, in) and A (k, r, in) → (k, rows, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        hidden = torch.bmm(x, A.mT)  # (k, rows, r)
        # Under autocast the product is in a lower precision than x and A, and so is its backward.
        ctx.save_for_backward(x.to(hidden.dtype), A.to(hidden.dtype))
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        x, A = ctx.saved_tensors
        needs_x, needs_A = ctx.needs_input_grad
        return (
            torch.bmm(gradient, A) if needs_x else None,  # (k, rows, in)
            torch.bmm(gradient.mT, x) if needs_A else None,  # (k, r, in)
        )


# output + h Bᵀ for all runs of a pack. Stacks have different ranks, so each is a product. It writes
# its runs of the one result, so that nothing is concatenated. Two stacks, of 2 runs with r = 4 and
# of 1 run with r = 16, on 128 rows and 64 output features:
#   output (1, 128, 64), shared by the runs, or (3, 128, 64)
#   hidden (2, 128, 4) and (1, 128, 16), B (2, 64, 4) and (1, 64, 16)
#   result (3, 128, 64): the first product writes result[0:2], the second result[2:3]
# B is laid out as r × out and so is its gradient, since thin products are several times faster with
# their long side contiguous.
class _StackedUp(torch.autograd.Function):
    """output + h Bᵀ of all runs, stack by stack: h (k, rows, r), B (k, out, r) → (runs, rows, out).

    `output` is (runs, rows, out), or (1, rows, out) where the runs share it. `factors` are first
    the h of all `stacks` stacks, then their B.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, stacks: int, *factors: Tensor) -> Tensor:
        # Autocast does not act on products with `out=`, so its dtype is applied here.
        kind = output.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
        output = output.to(dtype)
        hidden = [h.to(dtype) for h in factors[:stacks]]
        B_transposed = [B.mT.to(dtype).contiguous() for B in factors[stacks:]]  # (k, r, out)
        result = output.new_empty(sum(map(len, hidden)), *output.shape[1:])
        first_run = 0
        for h, b in zip(hidden, B_transposed, strict=True):
            runs = slice(first_run, first_run := first_run + len(h))
            torch.baddbmm(output if len(output) == 1 else output[runs], h, b, out=result[runs])
        ctx.save_for_backward(*hidden, *B_transposed)
        ctx.stacks, ctx.is_shared = stacks, len(output) == 1 < len(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        hidden, B_transposed = ctx.saved_tensors[: ctx.stacks], ctx.saved_tensors[ctx.stacks :]
        to_output = None
        if ctx.needs_input_grad[0]:
            to_output = gradient.sum(0, keepdim=True) if ctx.is_shared else gradient
        parts = gradient.split([len(h) for h in hidden])  # (k, rows, out) for each stack
        to_hidden = [torch.bmm(g, b.mT) for g, b in zip(parts, B_transposed, strict=True)]
        to_B = [torch.bmm(h.mT, g).mT for h, g in zip(hidden, parts, strict=True)]  # (k, out, r)
        return to_output, None, *to_hidden, *to_B


class TransposedLinearAdapter(LinearAdapter):
    """LinearAdapter on the `Conv1D` of Hugging Face's GPT-2, whose weight is in × out."""

    is_transposed: ClassVar = True

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """The class is known by its name, so that nothing here imports transformers."""
        Layer = type(layer)
        return (Layer.__module__, Layer.__name__) == ("transformers.pytorch_utils", "Conv1D")

    @staticmethod
    def weight_to_matrix(weight: Float[Tensor, "in out"]) -> Float[Tensor, "out in"]:
        """The transpose, out × in as for nn.Linear."""
        return weight.T

    @staticmethod
    def matrix_to_weight(matrix: Float[Tensor, "*runs out in"], shape: Sequence[int]) -> Tensor:
        """The transpose, in × out as the weight."""
        return matrix.mT


def is_fused_qkv(layer: Any, name: str) -> bool:
    """Whether a layer gives queries, keys and values, one behind the other: GPT-2's `c_attn`.

    Fused layers of other models hold the heads in other orders, or are read without a call.
    """
    return name == "c_attn" and TransposedLinearAdapter.fits(layer) and layer.nf == 3 * layer.nx
