"""How a pack's base is computed under torch.func.vmap where vmap has no rule, or a slow one.

vmap lets a model that is written for one run be computed for many. A tensor that differs between
runs is *batched*: the model sees the shape of one run, as (batch 8, in 64), and vmap keeps the
dimension of runs aside, (runs 3, batch 8, in 64). Each operation has a rule that computes it on the
tensor with that dimension. Here are rules for adapted layers, adapted weights that are read without
a call, frozen layers and attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.watch import ResultOfReading


# An autograd.Function can bring its own rule for vmap. For `function(a, b)` with a (3, 8, 64)
# batched along its first dimension and b the same for all runs, vmap calls
# `rule(3, (0, None), function, a, b)`: the number of runs, where each argument has its dimension of
# runs (None: nowhere), the function and the arguments. The result must have the dimension of runs
# first. autograd records what the rule does, so that no backward is needed.
# Where no argument is batched, vmap calls `function` itself, once for all runs.
class _WithVmapRule(torch.autograd.Function):
    """`function(*args)`, computed by `rule` where an argument is batched."""

    @staticmethod
    def forward(function: Callable[..., Tensor], rule: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        function, rule, *arguments = args
        return rule(info.batch_size, in_dims[2:], function, *arguments), 0


def adapt_layer(packed_adapter: Any, layer: nn.Module, input: Tensor, output: Tensor) -> Any:
    """The output of a pack's layer with W + ΔW, from its input and the base's output.

    The run marker is batched and not read. At the first adapted layer all other arguments are
    shared by the runs, and without it the rule would not be called.
    """
    args = (input, output, packed_adapter.run_marker, layer, packed_adapter)
    return _WithVmapRule.apply(_outside_of_pack, _adapt_all_runs, *args)


def _outside_of_pack(*args: Any) -> Tensor:
    raise AdapterError("a pack's base is called by its pack alone")


# vmap's rules would take A and B of each run as they come: products broadcast over runs, passes of
# their own over the outputs for the scale and the sum, and nothing for runs of different ranks.
# Here PackedAdapter.adapt_all_runs computes the stacks of all runs.
# The first adapted layer of a model, nn.Linear(64, 10), for 3 runs:
#   input (batch 8, in 64) and output (batch 8, out 10) are not batched, since all runs share them
#   → input (1, 8, 64), output (1, 8, 10) → adapt_all_runs → (3, 8, 10), batched from here on
# A later one, nn.Linear(10, 5): input (3, 8, 10), output (3, 8, 5) → (3, 8, 5)
def _adapt_all_runs(runs: int, in_dims: Any, function: Any, *args: Any) -> Tensor:
    input, output, _, layer, packed_adapter = args
    is_shared = in_dims[0] is None and in_dims[1] is None
    # The dimension of runs goes first: (runs, …), or (1, …) where both are shared by the runs.
    input, output = (
        t.movedim(dim, 0) if dim is not None else t.expand(1 if is_shared else runs, *t.shape)
        for t, dim in zip((input, output), in_dims[:2], strict=True)
    )
    # Autocast leaves an embedding's lookups as they are.
    without_autocast = torch.autocast(output.device.type, enabled=False)
    with without_autocast if packed_adapter.kind == "embedding" else nullcontext():
        return packed_adapter.adapt_all_runs(layer, input, output)


# A model may ask for a weight only to see its dtype, as T5 does for each layer. So what it gets is
# a tensor that looks like W, and becomes W + ΔW of all runs where something is computed with it:
#   wo.weight.dtype            torch.float32, and nothing is formed
#   F.linear(x, wo.weight)     F.linear(x, w), where w is (out, in) to the model and (runs, out, in)
#                              to vmap
# Under vmap also an autograd.Function that gets it asks __torch_function__ first.
class _AdaptedWhenUsed(ResultOfReading):
    """A weight in a pack that is read without a call: W to look at, W + ΔW to compute with."""

    packed_adapter: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        if func in LOOKS:
            return func(args[0].packed_adapter.base_weight(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(cls, _adapted, (args, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


LOOKS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}
"""What can be asked of W + ΔW without forming it."""


def adapted_when_used(packed_adapter: Any, weight: Any) -> Tensor:
    """A weight of a pack's layer that becomes W + ΔW where something is computed with it."""
    lazy = weight.as_subclass(_AdaptedWhenUsed)
    lazy.packed_adapter = packed_adapter
    return lazy


def _adapted(lazy: _AdaptedWhenUsed) -> Any:
    packed = lazy.packed_adapter
    args = (packed.base_weight(), packed.run_marker, packed)
    return _WithVmapRule.apply(_outside_of_pack, _adapted_weights_of_all_runs, *args)


def _adapted_weights_of_all_runs(runs: int, in_dims: Any, function: Any, *args: Any) -> Tensor:
    weight, _, packed_adapter = args
    return packed_adapter.adapted_weights(weight)


def frozen_linear(layer_forward: Callable[[Tensor], Tensor], input: Tensor) -> Any:
    """The forward of an nn.Linear whose weight and bias all runs share.

    It takes `input` by name, too, as a module's forward does and `apply` does not.
    """
    return _WithVmapRule.apply(layer_forward, _linear_of_all_runs, input)


# vmap's own rule is a product and then a pass over the outputs, which adds the bias. torch adds it
# within the product where the runs are one more dimension of the batch:
#   (runs 3, batch 8, in 64) → (3, 8, out 10)
def _linear_of_all_runs(runs: int, in_dims: Any, layer_forward: Any, input: Tensor) -> Tensor:
    return layer_forward(input.movedim(in_dims[0], 0))


def frozen_packed_linear(layer_forward: Callable[[Tensor], Tensor], input: Tensor) -> Any:
    """The forward of a linear layer of bitsandbytes, which takes no more than three dimensions."""
    return _WithVmapRule.apply(layer_forward, _packed_linear_of_all_runs, input)


# (runs 3, batch 8, tokens 16, in 64) → (384, 64) → (384, out 10) → (3, 8, 16, 10)
def _packed_linear_of_all_runs(
    runs: int, in_dims: Any, layer_forward: Any, input: Tensor
) -> Tensor:
    input = input.movedim(in_dims[0], 0)
    return layer_forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])


def frozen_conv(layer_forward: Callable[[Tensor], Tensor], input: Tensor) -> Any:
    """The forward of a convolution whose weight and bias all runs share."""
    return _WithVmapRule.apply(layer_forward, _conv_of_all_runs, input)


# vmap takes a convolution apart before autocast sees it, which then casts the input and not the
# bias. Here the layer itself is called, with the runs folded into the batch:
#   (runs 3, batch 8, in 4, 6, 6) → (24, 4, 6, 6) → (24, out 5, 6, 6) → (3, 8, 5, 6, 6)
# An input without a batch has the runs in its place.
def _conv_of_all_runs(runs: int, in_dims: Any, layer_forward: Any, input: Tensor) -> Tensor:
    input, layer = input.movedim(in_dims[0], 0), layer_forward.__self__
    if input.dim() == layer._parameters["weight"].dim():
        return layer_forward(input)
    return layer_forward(input.flatten(0, 1)).unflatten(0, input.shape[:2])


# vmap has no rule for attention: it would call it run by run. Attention treats the members of its
# batch apart, so the runs are folded into it. 3 runs, a batch of 8, 2 heads, 16 tokens:
#   query, key, value (runs 3, batch 8, heads 2, tokens 16, 4) → (24, 2, 16, 4)
#   a mask for all (tokens 16, 16) → (1, 1, 1, 16, 16) → (3, 8, 1, 16, 16) → (24, 1, 16, 16)
#   result (24, 2, 16, 4) → (3, 8, 2, 16, 4)
def _attention_of_all_runs(runs: int, in_dims: Any, attention: Any, *args: Any) -> Tensor:
    tensors, rest, dim = args[:4], args[4:], in_dims[0]  # query, key, value and mask
    query = tensors[0].movedim(dim, 0) if dim is not None else tensors[0][None]
    folded: list[Tensor | None] = []
    for tensor, dim in zip(tensors, in_dims[:4], strict=True):
        if tensor is None:
            folded.append(None)
            continue
        tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)  # (runs or 1, …)
        while tensor.dim() < query.dim():  # a mask for all of the batch, or all of the heads
            tensor = tensor[:, None]
        tensor = tensor.expand(runs, query.shape[1], *tensor.shape[2:])
        folded.append(tensor.flatten(0, 1))  # (runs · batch, …)
    return attention(*folded, *rest).unflatten(0, (runs, query.shape[1]))


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
        args = (query, key, value, attn_mask, *rest)
        return _WithVmapRule.apply(partial(attention, **options), _attention_of_all_runs, *args)

    has_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = folded
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        torch.backends.mha.set_fastpath_enabled(has_fastpath)
