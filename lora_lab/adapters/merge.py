"""Merging adapters into the weights and out of them, and combining several in one."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lab.adapters import slots
from lora_lab.adapters.adaptable import (
    adaptable_sites,
    placed_site,
    require_one_adapter_each,
)
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.finite import raise_reasons, reason_not_finite, require_finite
from lora_lab.adapters.inject import detach, place_adapters, restore_weight
from lora_lab.adapters.quantized import dequantize, is_quantized
from lora_lab.adapters.recipe import AdapterError, python_scalar
from lora_lab.adapters.trained_in_full import FullParameter


def deltas(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """ΔW of the adapter `name`, or of the active one, by site, in the weights' shapes."""
    adapters = slots.attached(model) if name is None else slots.require_attached(model, name)
    # Another adapter may be merged: the base's weight is then the one that it keeps.
    merged_by_site = slots.merged_adapters(model).items()
    base = {site: W for site, a in merged_by_site if (W := a.weight_before_merge) is not None}
    return {
        site: adapter.delta(base.get(site, adapter.weight_of(slots.layer_of(model, site, adapter))))
        for site, adapter in adapters.items()
    }


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds each active ΔW to its weight in place: the adapted output at the base's speed.

    What is trained in full takes the place of the base's values. Sums are computed in float32 (or
    wider) whatever the weight's dtype. A copy of each weight is kept for `unmerge`. Raises
    AdapterError, and changes no weight, if an adapter is merged already, none is active, a weight
    is quantized, or a sum is not finite in the weight's dtype.
    """
    slots.require_unmerged(model)
    reasons: dict[str, str | None] = {}
    changes = {**slots.require_attached(model, None), **slots.also_trained(model)}
    for site, change in changes.items():
        layer = slots.layer_of(model, site, change)
        if is_quantized(layer, change.parameter):
            reasons[site] = "its weight is quantized, and cannot hold W + ΔW; `merged` gives a copy"
            continue
        weight = change.weight_of(layer)
        if isinstance(change, FullParameter):
            values = change.value
        else:
            delta = change.delta(weight)
            values = weight.to(delta.dtype) + delta
        if reason := reason_not_finite(weight, values):
            reasons[site] = reason
            continue
        before = weight.detach().clone()
        weight.copy_(values)
        change.weight_before_merge = before
    if reasons:
        _restore_weights(model)
        raise_reasons(reasons)
    _update_tied(model)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, bit for bit. Raises AdapterError if no adapter is merged."""
    if not slots.merged_adapters(model):
        raise AdapterError("no adapter is merged")
    _restore_weights(model)
    _update_tied(model)


def _restore_weights(model: nn.Module) -> None:
    for site, change in slots.merged_adapters(model).items():
        restore_weight(slots.layer_of(model, site, change), change)


def _update_tied(model: nn.Module) -> None:
    """Marks a layer that shares an adapted weight as merged if and only if the weight is."""
    for module in model.modules():
        if isinstance(module, Adapter) and module.source is not None:
            module.weight_before_merge = module.source.weight_before_merge


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with the active adapter merged into its weights, and no adapters.

    The weights of the copy are dense, also where the model's are quantized.
    """
    twin = copy.deepcopy(model)
    dequantize(twin)
    merge(twin)
    for adapter in slots.merged_adapters(twin).values():
        adapter.weight_before_merge = None  # so that detach does not undo the merge
    _update_tied(twin)
    detach(twin)
    return twin


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Adds, and makes active, the adapter `name` with ΔW = Σ weights[other] · ΔW[other], exactly.

    Its factors are the others' side by side, so its rank is the sum of theirs; its scale is 1. What
    they train in full is combined alike: W + Σ weights[other] · (value − W). Raises AdapterError
    for a name that does not exist, for DoRA, whose ΔW is no product, and for a share or a sum that
    is not finite.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"weights={weights!r}: must be {{adapter's name: share}}")
    weights = {other: python_scalar(share) for other, share in weights.items()}
    for other, share in weights.items():
        if not (isinstance(share, int | float) and math.isfinite(share)):
            raise AdapterError(f"the share of '{other}' is {share!r}: must be a finite number")
    shares: dict[str, list[tuple[float, Adapter]]] = {}
    for other, share in weights.items():
        for site, adapter in slots.require_attached(model, other).items():
            if adapter.magnitude is not None:
                raise AdapterError(f"the adapter '{other}' is a DoRA: its ΔW is no product B A")
            shares.setdefault(site, []).append((share, adapter))
    adaptable = adaptable_sites(model)
    sites = [placed_site(adaptable, site, of_site[0][1].kind) for site, of_site in shares.items()]
    require_one_adapter_each(sites)
    adapters = {}
    for site in sites:
        scaled = [(share * a.scale, *a.factors()) for share, a in shares[site.name]]
        A = torch.cat([A for _, A, _ in scaled], -2)  # (Σ r, rest)
        B = torch.cat([scale * B for scale, _, B in scaled], -1)  # (out, Σ r)
        first, r = shares[site.name][0][1], A.shape[-2]
        plain = {"alpha": r, "scaling": "alpha/r", "trains": "both", "init": "kaiming"}
        plain |= {"form": "lora"}
        recipe = replace(first.recipe, r=r, **plain)
        layer = model.get_submodule(site.layer)
        adapter = type(first)(layer, site.parameter, site.rows, recipe)
        adapters[site] = adapter.fill({"A": A.clone(), "B": B})
    also_trained = _combine_in_full(model, weights)
    by_name = {site.name: adapter for site, adapter in adapters.items()}
    require_finite(model, {**by_name, **also_trained})
    place_adapters(model, adapters, name, also_trained)


def _combine_in_full(model: nn.Module, weights: Mapping[str, float]) -> dict[str, FullParameter]:
    """The parameters that the adapters named in `weights` train in full, combined, by key."""
    combined: dict[str, FullParameter] = {}
    for other, share in weights.items():
        for key, parameter in slots.also_trained(model, other).items():
            layer = slots.layer_of(model, key, parameter)
            if key not in combined:
                combined[key] = FullParameter(layer, parameter.parameter)
            change = parameter.value.double() - parameter.weight_of(layer)
            value = combined[key].value
            value.copy_(value.double() + share * change)
    return combined
