"""The adapters of many runs over one base, computed in one pass: torch.func.vmap over the runs."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.experts import ExpertsAdapter
from lora_lab.adapters.inject import freeze_base, place_on_layer
from lora_lab.adapters.model_call import Inputs, logits
from lora_lab.adapters.quantized import is_packed, shared_state, weight_or_shape
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.slots import layer_path
from lora_lab.adapters.stacks import FullStack, Stack, group_by_rank
from lora_lab.adapters.trained_in_full import FullParameter
from lora_lab.adapters.vmap_rules import (
    adapt_layer,
    adapted_when_used,
    folded_attention,
    frozen_conv,
    frozen_linear,
    frozen_packed_linear,
)
from lora_lab.adapters.watch import KINDS_ON_READING, base_class, has_adapters_on_reading
from lora_lab.adapters.weight import WeightAdapter

RunAdapters = Mapping[str, Adapter]
"""The adapters of one run, by site."""


class Pack(nn.Module):
    """The adapters of several runs on one base, computed in one pass.

    A call gives the outputs of all runs, (runs, …), to rounding what each run's model gives. What
    comes before the first adapter is computed once for all runs.

    `base` is the model without adapters, whose weights the pack shares. `runs` are the adapters of
    each run, on a model of that run with the same weights. At each site the tensors of consecutive
    runs are stacked in one parameter, and each run's tensors become views of it: while the pack
    trains, each run's model is what it would be if it trained by itself. Runs share a stack if they
    have the same dropout and the same of `settings`, one for each run, which holds whatever else
    must be the same within a parameter. Different ranks are padded with zeros where few do
    (`stacks.MAX_PADDING`). `in_full` are the parameters that each run trains in full, by key.

    Raises AdapterError for runs that cannot be a pack (`reason_not_packable`).
    """

    def __init__(
        self,
        base: nn.Module,
        runs: Sequence[RunAdapters],
        settings: Sequence[Any] = (),
        in_full: Sequence[Mapping[str, FullParameter]] = (),
    ):
        super().__init__()
        in_full = in_full or [{}] * len(runs)
        if reason := reason_not_packable(base, runs, in_full):
            raise AdapterError(reason)
        self.base, self.runs = copy_sharing_weights(base), list(runs)
        freeze_base(self.base)
        self.packed_adapters: list[PackedAdapter] = []
        self.stacks: list[tuple[int, Stack | FullStack]] = []
        """The stacks of all sites, each with the index of its first run."""
        settings = settings or [None] * len(runs)
        for site, adapter in runs[0].items():
            self._place(site, adapter, self._stack_runs(site, settings))
        for key, parameter in in_full[0].items():
            self._place(
                key, parameter, self._stack_in_full([run[key] for run in in_full], settings)
            )
        for layer in self.base.modules():
            if has_adapters_on_reading(layer):
                continue  # the parameter is each run's, and vmap's rule is right for it
            if base_class(layer) is nn.Linear:
                layer.forward = partial(frozen_linear, layer.forward)
            elif is_packed(layer):
                layer.forward = partial(frozen_packed_linear, layer.forward)
            elif base_class(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
                layer.forward = partial(frozen_conv, layer.forward)
        # As children, they follow the pack's train() and eval(), and are among its parameters().
        self.stacked_adapters = nn.ModuleList(stack.adapter for _, stack in self.stacks)

    def _place(self, site: str, first: Any, stacks: Sequence[Stack | FullStack]) -> None:
        """Puts a PackedAdapter with these stacks in the place of the adapter `first`."""
        layer = self.base.get_submodule(layer_path(site, first))
        self.packed_adapters.append(packed := PackedAdapter(layer, first, stacks))
        place_on_layer(layer, "pack", site, packed)
        layer.lora.active = "pack"  # pyright: ignore

    def _stack_runs(self, site: str, settings: Sequence[Any]) -> list[Stack]:
        """Stacks the runs' adapters on one site, in the order of the runs."""
        pairs = zip(self.runs, settings, strict=True)
        keys = [(run[site].recipe.dropout, setting) for run, setting in pairs]
        first_run, stacks = 0, []
        for key, neighbours in groupby(keys):
            runs = self.runs[first_run : first_run + len([*neighbours])]
            for run_adapters in group_by_rank([run[site] for run in runs]):
                stacks.append(Stack(run_adapters, key[-1]))
                self.stacks.append((first_run, stacks[-1]))
                first_run += len(run_adapters)
        return stacks

    def _stack_in_full(
        self, parameters: Sequence[FullParameter], settings: Sequence[Any]
    ) -> list[FullStack]:
        """Stacks one parameter of the runs, in their order."""
        first_run, stacks = 0, []
        for setting, neighbours in groupby(settings):
            runs = slice(first_run, first_run + len([*neighbours]))
            stacks.append(FullStack(list(parameters[runs]), setting))
            self.stacks.append((first_run, stacks[-1]))
            first_run = runs.stop
        return stacks

    # The model of one run is computed once, under vmap, for all runs. In forward_one_run a batched
    # tensor has the shape of one run: run_marker (runs,) looks like (), a delta (runs, out, in)
    # like (out, in). `inputs` are not batched. They and all that is computed from them alone are
    # computed once, up to the first adapter: there run_marker comes in, and makes vmap use the rule
    # that computes all runs (see vmap_rules.py).
    def forward(self, *inputs: Inputs, outputs_of: Callable[..., Tensor] = logits) -> Tensor:
        """The outputs of all runs for one batch: (runs, …).

        `outputs_of` takes the model of one run, and inputs.
        """
        # Those that act where a parameter is read, and for each (runs, *weight), or factors.
        on_reading = [packed for packed in self.packed_adapters if packed.kind in KINDS_ON_READING]
        all_values = [packed.values_of_runs() for packed in on_reading]

        def forward_one_run(run_marker: Tensor, values: list[Any]) -> Tensor:
            for packed in self.packed_adapters:
                packed.run_marker = run_marker
            for packed, value in zip(on_reading, values, strict=True):
                packed.run_value = value
            return outputs_of(self.base, *inputs)

        run_marker = torch.zeros(len(self.runs), device=next(self.parameters()).device)
        with folded_attention():
            return torch.vmap(forward_one_run, randomness="different")(run_marker, all_values)


class PackedAdapter(nn.Module):
    """What acts at one site of a pack's base in the place of an adapter: the stacks of all runs."""

    weight_before_merge = None  # as of an adapter: a pack is never merged
    run_marker: Tensor
    """A dummy batched tensor that makes vmap treat this layer's output as each run's own."""
    run_value: Any
    """Within a call, of a parameter that is changed where it is read: one run's ΔW, or its value
    where it is trained in full (*weight); of experts, its factors A and scale · B."""

    def __init__(self, layer: nn.Module, first: Any, stacks: Sequence[Stack | FullStack]):
        super().__init__()
        self.kind, self.parameter, self.rows = first.kind, first.parameter, first.rows
        self.stacks = stacks
        # A function, since as an attribute the weight would become a parameter of this module.
        self.base_weight: Callable[[], Any] = partial(layer._parameters.get, first.parameter)
        # Here, since a step is recorded of plain tensors alone.
        self.lazy_weight = adapted_when_used(self, weight_or_shape(layer, first.parameter))

    def forward(self, *args: Any) -> Tensor:
        """As the forward of the adapter, for the one run that vmap shows.

        (weight,) → the weight + ΔW, or the trained value, where it is changed where it is read; of
        a factored adapter (layer, input, output) → the layer's output with W + ΔW.
        """
        if self.kind == WeightAdapter.kind:
            return args[0] + self.run_value
        if self.kind == ExpertsAdapter.kind:
            return self.stacks[0].adapter.adapted(args[0], *self.run_value, scale=1.0)
        if self.kind == FullParameter.kind:
            return self.run_value.to(args[0].dtype)
        return adapt_layer(self, *args)

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """The weight + ΔW of the one run that vmap shows, of a factored adapter.

        It is formed, for all runs, where something is computed with it.
        """
        return self.lazy_weight

    def adapted_weights(self, weight: Tensor) -> Tensor:
        """The weight + ΔW of all runs: (runs, *weight)."""
        return torch.cat([stack.adapter.adapted_weight(weight) for stack in self.stacks])

    def values_of_runs(self) -> Any:
        """`run_value` of all runs: (runs, *weight); of experts, the two factors."""
        if self.kind == FullParameter.kind:
            return torch.cat([stack.adapter.value for stack in self.stacks])
        if self.kind == ExpertsAdapter.kind:
            r = max(stack.adapter.factors()[0].shape[-2] for stack in self.stacks)
            factors = [stack.adapter.factors_of_runs(r) for stack in self.stacks]
            return [torch.cat(of_stacks) for of_stacks in zip(*factors, strict=True)]
        weight = self.base_weight()
        return torch.cat([stack.adapter.parameter_delta(weight) for stack in self.stacks])

    def adapt_all_runs(self, layer: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        """The layer's outputs in all runs, (runs, …): FactoredAdapter.forward, stack by stack.

        `input` and `output` are the layer's with W: (runs, …), or (1, …) where all runs share them.
        """
        hidden, B, gains = [], [], []
        adapter: Any = None
        runs = [len(stack.run_adapters) for stack in self.stacks]
        # split, not slices: backward joins the gradients of a split, and of k slices it adds up k
        # tensors of full size.
        inputs = [input] * len(runs) if 1 in (len(input), len(runs)) else input.split(runs)
        for stack, stack_input in zip(self.stacks, inputs, strict=True):
            adapter = stack.adapter
            stack_A, stack_B = adapter.factors()  # (k, r, rest), (k, out, r)
            hidden.append(adapter.down_stacked(layer, stack_input, stack_A.to(output.dtype)))
            stack_B = adapter.in_all_rows(adapter.scale.to(stack_B.device) * stack_B, -2)
            B.append(stack_B.to(output.dtype))
            if adapter.magnitude is not None:
                gains.append(adapter.row_gain(adapter.weight_of(layer)))  # (k, out)
        adapted = adapter.up_stacked(layer, hidden, B, output)
        if not gains:
            return adapted
        bias = getattr(layer, "bias", None)
        linear = adapted if bias is None else adapted - adapter.align_with_output(bias)
        # (runs, out) → of a convolution (runs, out, 1…) → over the batch (runs, 1…, out, 1…)
        gain = adapter.align_with_output(torch.cat(gains).to(output.dtype))
        gain = gain.view(len(gain), *[1] * (adapted.dim() - gain.dim()), *gain.shape[1:])
        return adapted + (gain - 1) * linear


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are the same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [state for layer in model.modules() for state in shared_state(layer)]
    return copy.deepcopy(model, {id(one): one for one in shared})


def reason_not_packable(
    base: nn.Module,
    runs: Sequence[RunAdapters],
    in_full: Sequence[Mapping[str, FullParameter]] = (),
) -> str | None:
    """Why these runs cannot be computed in one pass over `base`; None where they can."""
    if any(list(parameters) != list(in_full[0]) for parameters in in_full):
        return "they train other parameters in full"
    for site, first in runs[0].items():
        for run in runs:
            if list(run) != list(runs[0]):
                return "their adapters sit on different sites"
            adapter = run[site]
            if type(adapter) is not type(first) or adapter.shape != first.shape:
                return f"'{site}' is not the same in all"
            tensors = [a.tensors().keys() for a in (adapter, first)]
            trains = [(a.recipe.trains, a.starts_at_zero) for a in (adapter, first)]
            if trains[0] != trains[1] or tensors[0] != tensors[1]:
                return f"at '{site}' different tensors train"
            if adapter.is_tied:
                return f"'{site}' is tied to another layer"
        layer: Any = base.get_submodule(layer_path(site, first))
        if first.magnitude is not None and any(f"{site}.bias" in keys for keys in in_full):
            return f"'{site}' has DoRA, and a bias that is trained in full"
        if getattr(layer, "scale_grad_by_freq", False):
            return f"'{site}' scales its gradient by frequency"
        if getattr(layer, "padding_idx", None) is not None and first.magnitude is not None:
            return f"'{site}' has a padding token, and DoRA"
    return None
