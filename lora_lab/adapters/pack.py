"""Many runs' adapters over one base, computed in one pass: torch.func.vmap over the runs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, AdapterError
from lora_lab.adapters.inject import freeze, sit
from lora_lab.adapters.slots import layer_path
from lora_lab.adapters.stacks import Stack, of_near_rank
from lora_lab.adapters.weight import WeightAdapter

Run = Mapping[str, Adapter]
"""One run's adapters, by the names of their sites."""


class Pack(nn.Module):
    """The adapters of several runs on one base, computed in one pass as if each were alone.

    `base` is the model without adapters, whose weights the pack shares; `runs` sit on models of
    their own with the same weights. At every site the tensors of consecutive runs of one dropout
    and setting (`settings`: whatever else must be one in a parameter) are laid side by side in one
    parameter of which each run's own become views, so that every run's model is at all times what
    it would be alone. Ranks are padded to one where that takes few zeros (PADDED).

    A call gives the outputs of all runs, (runs, …). What precedes the first adapter is computed
    once for all, under vmap. Raises AdapterError for runs that `refusal` refuses.
    """

    def __init__(self, base: nn.Module, runs: Sequence[Run], settings: Sequence[object] = ()):
        super().__init__()
        if cause := refusal(base, runs):
            raise AdapterError(cause)
        self.base, self.runs = copy_sharing_weights(base), list(runs)
        freeze(self.base)
        self.seats: list[PackedAdapter] = []
        self.stacks: list[tuple[int, Stack]] = []
        """Every site's, each with the place of its first run."""
        for site, first in runs[0].items():
            own = settings or [None] * len(runs)
            keys = [(r[site].recipe.dropout, s) for r, s in zip(runs, own, strict=True)]
            at, stacks = 0, []
            for key, same in groupby(keys):
                for members in of_near_rank([run[site] for run in runs[at : at + len([*same])]]):
                    stacks.append(Stack(members, key[-1]))
                    self.stacks.append((at, stacks[-1]))
                    at += len(members)
            layer = self.base.get_submodule(layer_path(site, first))
            self.seats.append(seat := PackedAdapter(layer, first, stacks))
            sit(layer, "pack", site, seat)
            layer.lora.active = "pack"  # pyright: ignore
        for layer in self.base.modules():
            if type(layer) is nn.Linear:  # none whose weight an adapter changes: that is each run's
                layer.forward = partial(_linear, layer.forward)
        # So that they are in the mode, and among the parameters, of the pack.
        self.stacked = nn.ModuleList(stack.adapter for _, stack in self.stacks)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The outputs of all runs for one batch: (runs, …)."""
        dense = [seat for seat in self.seats if seat.kind == WeightAdapter.kind]
        changes = [
            torch.cat([stack.change(seat.weight()) for stack in seat.stacks]) for seat in dense
        ]

        def run(which: Tensor, changes: list[Tensor]) -> Tensor:
            for seat in self.seats:
                seat.which = which
            for seat, change in zip(dense, changes, strict=True):
                seat.change = change
            return self.base(*inputs)

        which = torch.zeros(len(self.runs), device=next(self.parameters()).device)
        with _attention():
            return torch.vmap(run, randomness="different")(which, changes)


class PackedAdapter(nn.Module):
    """What acts on a site of a pack's base in the place of an adapter: the stacks of all runs."""

    kept = None
    which: Tensor
    """In a pass something that vmap knows to differ between runs, as the adapters do."""
    change: Tensor
    """In a pass the run's change of a weight that is no factored adapter's."""

    def __init__(self, layer: nn.Module, first: Adapter, stacks: list[Stack]):
        super().__init__()
        self.kind, self.parameter, self.stacks = first.kind, first.parameter, stacks
        # A call, since it is no parameter of this module.
        self.weight: Callable[[], Any] = partial(layer._parameters.get, first.parameter)

    def forward(self, *given: Any) -> Tensor:
        """As of any adapter, for the one run that vmap makes of all."""
        if self.kind == WeightAdapter.kind:
            (weight,) = given
            return weight + self.change
        layer, input, output = given
        lifted: Any = _Lifted.apply(input, output, self.which, layer, self)
        return lifted

    def lifted(self, layer: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        """All runs' outputs of the layer, from theirs of the base: (runs, …).

        `input` and `output` are (runs, …), or (1, …): the same for all.
        """
        hidden, B, gains = [], [], []
        adapter: Any = None
        runs = [len(stack.run_adapters) for stack in self.stacks]
        # Of slices backward would add up as many gradients of the whole; of a split it joins them.
        inputs = [input] * len(runs) if 1 in (len(input), len(runs)) else input.split(runs)
        for stack, own in zip(self.stacks, inputs, strict=True):
            adapter = stack.adapter
            down, up = adapter.factors()
            hidden.append(adapter.down_stacked(layer, own, down.to(output.dtype)))
            B.append((stack.scale.to(up.device) * up).to(output.dtype))
            if adapter.magnitude is not None:
                gains.append(adapter.gain(adapter.weight_of(layer)))
        adapted = adapter.up_stacked(layer, hidden, B, output)
        if not gains:
            return adapted
        bias = getattr(layer, "bias", None)
        linear = adapted if bias is None else adapted - adapter.along(bias, output)
        gain = adapter.along(torch.cat(gains).to(output.dtype), output)  # (runs, out, …)
        gain = gain.view(len(gain), *[1] * (adapted.dim() - gain.dim()), *gain.shape[1:])
        return adapted + (gain - 1) * linear


class _Lifted(torch.autograd.Function):
    """A site under vmap: all runs' at once, where vmap's own rules would broadcast and add up."""

    @staticmethod
    def forward(*given: Any) -> Tensor:
        raise AdapterError("a pack's base is called by its pack alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        input, output, _, layer, seat = args
        shared = in_dims[0] is None and in_dims[1] is None
        input, output = (
            t.movedim(dim, 0)
            if dim is not None
            else t.expand(1 if shared else info.batch_size, *t.shape)
            for t, dim in zip((input, output), in_dims[:2], strict=True)
        )
        # Autocast leaves an embedding's lookups as they are.
        plain = torch.autocast(output.device.type, enabled=False)
        with plain if seat.kind == "embedding" else nullcontext():
            return seat.lifted(layer, input, output), 0


def _linear(plain: Callable[[Tensor], Tensor], input: Tensor) -> Any:
    """As a module's forward is called: `apply` takes nothing by its name."""
    return _Linear.apply(input, plain)


class _Linear(torch.autograd.Function):
    """A frozen linear layer under vmap, whose own rule adds the bias in a pass over the output."""

    @staticmethod
    def forward(input: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        return plain(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        input, plain = args
        return plain(input.movedim(in_dims[0], 0)), 0


@contextmanager
def _attention() -> Iterator[None]:
    """Within it attention under vmap is computed on all runs as one batch, not run by run.

    vmap has no rule for it, and none can be given to an operator of torch's own; whoever calls it
    by its name in torch.nn.functional, as that module itself, gets this one. The path without
    gradients is off that nn.TransformerEncoderLayer takes where it sees none.
    """
    plain = F.scaled_dot_product_attention

    def folded(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **how: Any
    ) -> Any:
        return _Folded.apply(query, key, value, attn_mask, partial(plain, **how), rest)

    quick = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = folded
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
        torch.backends.mha.set_fastpath_enabled(quick)


class _Folded(torch.autograd.Function):
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
        runs = info.batch_size
        first = tensors[0].movedim(in_dims[0], 0) if in_dims[0] is not None else tensors[0][None]
        folded: list[Tensor | None] = []
        for tensor, dim in zip(tensors, in_dims[:4], strict=True):
            if tensor is None:
                folded.append(None)
                continue
            tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)
            while tensor.dim() < first.dim():  # a mask for all of the batch, or all of the heads
                tensor = tensor[:, None]
            tensor = tensor.expand(runs, first.shape[1], *tensor.shape[2:])
            folded.append(tensor.flatten(0, 1))
        return attention(*folded, *rest).unflatten(0, (runs, first.shape[1])), 0


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights are the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def refusal(base: nn.Module, runs: Sequence[Run]) -> str | None:
    """Why these runs cannot be computed in one pass over `base`; None where they can."""
    for site, first in runs[0].items():
        for run in runs:
            if list(run) != list(runs[0]):
                return "their adapters sit on different sites"
            adapter = run[site]
            if type(adapter) is not type(first) or adapter.shape != first.shape:
                return f"'{site}' is not the same in all"
            same = [[t is None for t in (a.core, a.A0, a.magnitude)] for a in (adapter, first)]
            if adapter.recipe.trains != first.recipe.trains or same[0] != same[1]:
                return f"at '{site}' different tensors train"
            if adapter.tied:
                return f"'{site}' is tied to another layer"
        layer: Any = base.get_submodule(layer_path(site, first))
        if getattr(layer, "scale_grad_by_freq", False):
            return f"'{site}' scales its gradient by frequency"
        if getattr(layer, "padding_idx", None) is not None and first.magnitude is not None:
            return f"'{site}' has a padding token, and DoRA"
    return None
