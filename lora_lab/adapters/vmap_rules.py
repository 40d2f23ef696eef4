"""How a pack's base is computed under torch.func.vmap where vmap has no rule, or a slow one.

vmap lets a model that is written for one run be computed for many. A tensor that differs between
runs is *batched*: the model sees the shape of one run, as (batch 8, in 64), and vmap keeps the
dimension of runs aside, (runs 3, batch 8, in 64). Each operation has a rule that computes it on the
tensor with that dimension. An autograd.Function can bring its own, a static method `vmap`:

- `in_dims` says for each argument where its dimension of runs is; None: it is the same for all.
- it gives the result with a dimension of runs, and where that is (here always 0).
- autograd records the operations within the rule, so that the Function needs no backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.recipe import AdapterError


# An adapted layer, for all runs at once. vmap's rules would take A and B of each run as they come:
# products broadcast over runs, in passes of their own over the outputs for the scale and the sum,
# and impossible where ranks differ. Here the stacks are computed by PackedAdapter.adapt_all_runs.
# The first adapted layer of a model, nn.Linear(64, 10), for 3 runs:
#   input (batch 8, in 64) and output (batch 8, out 10) are not batched, since all runs share them
#   → input (1, 8, 64), output (1, 8, 10) → adapt_all_runs → (3, 8, 10), batched from here on
# A later one, nn.Linear(10, 5): input (3, 8, 10), output (3, 8, 5) → (3, 8, 5).
class _AdaptAllRuns(torch.autograd.Function):
    """The outputs of an adapted layer, for (input, output, run_marker, layer, packed_adapter)."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        raise AdapterError("a pack's base is called by its pack alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        input, output, _, layer, packed_adapter = args
        is_shared = in_dims[0] is None and in_dims[1] is None
        # The dimension of runs goes first: (runs, …), or (1, …) where both are shared by the runs.
        input, output = (
            t.movedim(dim, 0)
            if dim is not None
            else t.expand(1 if is_shared else info.batch_size, *t.shape)
            for t, dim in zip((input, output), in_dims[:2], strict=True)
        )
        # Autocast leaves an embedding's lookups as they are.
        without_autocast = torch.autocast(output.device.type, enabled=False)
        with without_autocast if packed_adapter.kind == "embedding" else nullcontext():
            return packed_adapter.adapt_all_runs(layer, input, output), 0


def adapt_layer(packed_adapter: Any, layer: nn.Module, input: Tensor, output: Tensor) -> Any:
    """The output of a pack's layer with W + ΔW, from its input and the base's output.

    The run marker is not read. It is batched, and a Function's vmap rule is called only where one
    of its arguments is: at the first adapted layer all others are shared by the runs.
    """
    return _AdaptAllRuns.apply(input, output, packed_adapter.run_marker, layer, packed_adapter)


# A frozen nn.Linear, whose weight and bias all runs share. vmap's own rule for it is a product and
# then a pass over the outputs, which adds the bias. torch adds it within the product if it is given
# the dimension of runs as one more of the batch: (runs 3, batch 8, in 64) → (3, 8, out 10).
class _FrozenLinear(torch.autograd.Function):
    """A linear layer's forward, called on all runs as on one larger batch."""

    @staticmethod
    def forward(input: Tensor, layer_forward: Callable[[Tensor], Tensor]) -> Tensor:
        return layer_forward(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        input, layer_forward = args
        return layer_forward(input.movedim(in_dims[0], 0)), 0


def frozen_linear(layer_forward: Callable[[Tensor], Tensor], input: Tensor) -> Any:
    """The forward of an nn.Linear with a vmap rule that adds the bias within the product.

    It takes `input` by name, too, as a module's forward does and `apply` does not.
    """
    return _FrozenLinear.apply(input, layer_forward)


# vmap has no rule for attention: it would call it run by run. Attention treats the members of its
# batch apart, so the runs are folded into it. 3 runs, a batch of 8, 2 heads, 16 tokens:
#   query, key, value (runs 3, batch 8, heads 2, tokens 16, 4) → (24, 2, 16, 4)
#   a mask for all (tokens 16, 16) → (1, 1, 1, 16, 16) → (3, 8, 1, 16, 16) → (24, 1, 16, 16)
#   result (24, 2, 16, 4) → (3, 8, 2, 16, 4)
class _FoldedAttention(torch.autograd.Function):
    """Attention with the dimension of runs folded into the batch: (runs, batch, …) → the same."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, mask: Any, attention: Any, rest: Any) -> Any:
        return attention(q, k, v, mask, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        *tensors, attention, rest = args
        runs, query, dim = info.batch_size, tensors[0], in_dims[0]
        query = query.movedim(dim, 0) if dim is not None else query[None]  # (runs or 1, batch, …)
        folded: list[Tensor | None] = []
        for tensor, dim in zip(tensors, in_dims[:4], strict=True):
            if tensor is None:
                folded.append(None)
                continue
            tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)
            while tensor.dim() < query.dim():  # a mask for all of the batch, or all of the heads
                tensor = tensor[:, None]
            tensor = tensor.expand(runs, query.shape[1], *tensor.shape[2:])
            folded.append(tensor.flatten(0, 1))  # (runs · batch, …)
        return attention(*folded, *rest).unflatten(0, (runs, query.shape[1])), 0


@contextmanager
def folded_attention() -> Iterator[None]:
    """A context in which F.scaled_dot_product_attention is computed for all runs as one batch.

    No vmap rule can be given to an operator of torch's. So the function is replaced in
    torch.nn.functional, for all that call it by its name there, as that module does. torch's
    fast path is off: nn.TransformerEncoderLayer takes it where it sees no gradients, and it calls
    no function that could be replaced.
    """
    attention = F.scaled_dot_product_attention

    def folded(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> Any:
        return _FoldedAttention.apply(
            query, key, value, attn_mask, partial(attention, **options), rest
        )

    has_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = folded
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        torch.backends.mha.set_fastpath_enabled(has_fastpath)
