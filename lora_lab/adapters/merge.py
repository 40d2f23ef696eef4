"""Adapters into the weights and out again, and several into one."""

import copy
import glob
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, AdapterError
from lora_lab.adapters.inject import detach, place, put_back
from lora_lab.adapters.slots import all_adapters, attached, chosen, layer_of, names
from lora_lab.adapters.targets import Target, find_sites


def deltas(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """ΔW of the adapter `name`, or of the active one, at every site, in the weights' own shapes."""
    made = attached(model) if name is None else chosen(model, name)
    # Another adapter may be merged: the base's weight is then the one it keeps.
    kept = {site: a.kept for (_, site), a in all_adapters(model).items() if a.kept is not None}
    return {
        site: adapter.delta(kept.get(site, adapter.weight_of(layer_of(model, site, adapter))))
        for site, adapter in made.items()
    }


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every active ΔW to its weight in place: the plain model's speed, the adapted output.

    The sum is formed in float32 (or wider) whatever the weight's dtype, and the weight is kept
    aside for `unmerge`. Raises AdapterError if one is merged already, or none is active.
    """
    for (_, site), adapter in all_adapters(model).items():
        if adapter.kept is not None:
            raise AdapterError(f"the adapter of '{site}' is merged already: unmerge it first")
    made = attached(model)
    if not made:
        raise AdapterError("no adapter is active: there is nothing to merge")
    for site, adapter in made.items():
        weight = adapter.weight_of(layer_of(model, site, adapter))
        delta = adapter.delta(weight)
        kept = weight.detach().clone()
        weight.copy_(weight.to(delta.dtype) + delta)
        adapter.kept = kept
    _tell_twins(model)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Puts back the weights that `merge` kept, bit for bit. Raises AdapterError if not merged."""
    merged = {site: a for (_, site), a in all_adapters(model).items() if a.kept is not None}
    if not merged:
        raise AdapterError("no adapter is merged")
    for site, adapter in merged.items():
        put_back(layer_of(model, site, adapter), adapter)
    _tell_twins(model)


def _tell_twins(model: nn.Module) -> None:
    """A layer that shares an adapted weight is merged when the weight is."""
    for module in model.modules():
        if isinstance(module, Adapter) and module.source is not None:
            module.kept = module.source.kept


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with the active adapter in its weights, and no adapters."""
    twin = copy.deepcopy(model)
    merge(twin)
    for _, adapter in all_adapters(twin).items():
        adapter.kept = None
    _tell_twins(twin)
    detach(twin)
    return twin


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Adds, and makes active, the adapter `name` with ΔW = Σ weights[other] · ΔW[other], exactly.

    Its factors are the others' side by side, so its rank is the sum of theirs; its scale is 1.
    Raises AdapterError for a name that is not there, and for DoRA, whose ΔW is no product.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"weights={weights!r}: must be {{adapter's name: share}}")
    if missing := [other for other in weights if other not in names(model)]:
        raise AdapterError(
            f"there is no adapter {', '.join(missing)}, only {', '.join(names(model))}"
        )
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    like: dict[str, Adapter] = {}
    for other, share in weights.items():
        for site, adapter in attached(model, other).items():
            if adapter.magnitude is not None:
                raise AdapterError(f"the adapter '{other}' is a DoRA: its ΔW is no product B A")
            A, B = adapter.factors()
            parts.setdefault(site, []).append((A, share * adapter.scale * B))
            like.setdefault(site, adapter)
    targets = {site: Target(match=glob.escape(site), tied=True) for site in parts}
    sites = find_sites(model, targets)
    if len(sites) < len(parts):
        raise AdapterError("the adapters sit on a tied weight by its different names: attach alike")
    made = {}
    for site in sites:
        A = torch.cat([A for A, _ in parts[site.name]])
        B = torch.cat([B for _, B in parts[site.name]], 1)
        old, r = like[site.name], A.shape[0]
        recipe = replace(old.recipe, r=r, alpha=r, scaling="alpha/r", trains="both", init="kaiming")
        new = type(old)(model.get_submodule(site.layer), site.parameter, site.rows, recipe)
        made[site] = new.fill({"A": A.clone(), "B": B})
    place(model, made, name)
