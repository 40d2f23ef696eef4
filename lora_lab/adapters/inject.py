"""Which layers get an adapter, and putting adapters on them, off, into and out of the weights."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.init import INITS
from lora_lab.adapters.linear import LinearAdapter
from lora_lab.adapters.scaling import SCALINGS
from lora_lab.seeding import generator

KINDS: dict[str, type[Adapter]] = {"linear": LinearAdapter}
"""Every kind of site. Tests run over this table."""


class AdapterError(ValueError):
    """An adapter that cannot be made, loaded, merged or switched as asked."""


class TargetError(AdapterError):
    """A target that picks no layer, or not the ones its writer can have meant."""


class RankError(AdapterError):
    """A rank that the weight cannot have."""


@dataclass(frozen=True)
class Target:
    """A rule that picks sites: layers of `kind` (None: any kind) whose name fits the glob."""

    kind: str | None = None
    match: str = "*"


@dataclass(frozen=True)
class Site:
    """A place where an adapter sits: a layer's name, its kind, and its weight as a matrix."""

    name: str
    kind: str
    shape: tuple[int, int]  # (out, rest)


def kind_of(layer: nn.Module) -> str | None:
    """The kind of site that `layer` is, by its exact type; None where no adapter fits."""
    return next((kind for kind, adapter in KINDS.items() if type(layer) in adapter.types), None)


def find(model: nn.Module, targets: Mapping[str, Target], r: int | None = None) -> list[Site]:
    """The sites that `targets` pick in `model`, in the model's own order.

    Works on a model on the meta device: no weight is read. With `r`, also checks that every site
    can have that rank. Raises TargetError when a target picks nothing, when two pick one layer,
    or when a picked weight is tied to another layer's; RankError when r is over a site's rank.
    """
    layers = dict(model.named_modules())
    kinds = {name: kind for name, layer in layers.items() if (kind := kind_of(layer))}
    picked: dict[str, str] = {}
    for label, target in targets.items():
        hits = [
            name
            for name, kind in kinds.items()
            if target.kind in (None, kind) and fnmatchcase(name, target.match)
        ]
        if not hits:
            raise TargetError(_no_match(label, target, layers))
        for name in hits:
            if name in picked:
                raise TargetError(
                    f"targets '{picked[name]}' and '{label}' both pick layer '{name}': "
                    "a layer takes one adapter; leave one of the two out, or narrow its match"
                )
            picked[name] = label

    owners: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_place_in_memory(parameter), []).append(name)
    sites = []
    for name in (name for name in layers if name in picked):
        weight = KINDS[kinds[name]].weight_of(layers[name])
        if not isinstance(weight, nn.Parameter):
            raise TargetError(
                f"the weight of layer '{name}' is no parameter but computed from others (a norm or "
                "another parametrization): exclude it by a glob"
            )
        if len(tied := owners[_place_in_memory(weight)]) > 1:
            raise TargetError(
                f"the weight of layer '{name}' is tied ({' = '.join(tied)}): an adapter would "
                "change one use of it and not the other; untie it first, or exclude it by a glob"
            )
        out, rest = weight.flatten(1).shape
        if r is not None and not 1 <= r <= min(out, rest):
            raise RankError(
                f"r={r} exceeds the rank of '{name}' (weight {out} × {rest}): "
                f"at most {min(out, rest)}"
                if r > 0
                else f"r={r}: must be at least 1"
            )
        sites.append(Site(name, kinds[name], (out, rest)))
    return sites


def _place_in_memory(weight: Tensor) -> object:
    """What two tied weights share, also where each is a Parameter of its own."""
    if weight.is_meta:
        return id(weight)
    return weight.untyped_storage().data_ptr(), weight.storage_offset()


def _no_match(label: str, target: Target, layers: Mapping[str, nn.Module]) -> str:
    wanted = [t.__name__ for k, a in KINDS.items() if target.kind in (None, k) for t in a.types]
    fit = [n for n in layers if n and target.match != "*" and fnmatchcase(n, target.match)]
    if fit:
        shown = ", ".join(f"{n} ({type(layers[n]).__name__})" for n in fit[:3])
        return f"target '{label}' picks no {' or '.join(wanted)} layer, only {shown}"
    names = [n for n, m in layers.items() if (k := kind_of(m)) and target.kind in (None, k)]
    if not names:
        return f"target '{label}' picks nothing: the model has no {' or '.join(wanted)} layer"
    nearest = difflib.get_close_matches(target.match, names, n=3, cutoff=0.0)
    return f"target '{label}' picks no layer; nearest names: {', '.join(nearest)}"


def attach(
    model: nn.Module,
    targets: Mapping[str, Target] | str = "linear",
    *,
    r: int,
    alpha: float,
    init: str = "kaiming",
    scaling: str = "alpha/r",
    dropout: float = 0.0,
    seed: int = 0,
) -> list[Site]:
    """Puts an adapter on every site that `targets` pick, freezes the rest of the model.

    `targets` may be the name of a kind. Layers keep their object, class, weight and state-dict
    key. Each adapter is drawn from a generator of its own, seeded by (seed, site, r): what else
    is targeted never changes it. Raises what `find` raises, and AdapterError where a layer has
    an adapter already.
    """
    for name, value, table in (("init", init, INITS), ("scaling", scaling, SCALINGS)):
        if value not in table:
            raise AdapterError(f"{name}={value!r}: must be one of {', '.join(table)}")
    targets = {targets: Target(kind=targets)} if isinstance(targets, str) else targets
    sites = find(model, targets, r)
    made = {}
    for site in sites:
        layer, Kind = model.get_submodule(site.name), KINDS[site.kind]
        weight = Kind.weight_of(layer).detach().flatten(1)
        A, B = INITS[init](weight, r, generator(seed, site.name, r))
        scale = SCALINGS[scaling](alpha, r)
        made[site.name] = Kind(layer, A, B, alpha=alpha, scale=scale, dropout=dropout, init=init)
    place(model, made)
    return sites


def place(model: nn.Module, made: Mapping[str, Adapter]) -> None:
    """Puts adapters on the layers they are named by, and freezes every other parameter."""
    if taken := [name for name in made if hasattr(model.get_submodule(name), "lora")]:
        raise AdapterError(f"these layers have an adapter already: {', '.join(taken)}")
    if merged := [name for name, adapter in attached(model).items() if adapter.kept is not None]:
        raise AdapterError(f"these layers are merged: {', '.join(merged)}; unmerge them first")
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            continue
        if name.rpartition(".")[2] == "lora":
            raise AdapterError(f"the model's own module '{name}' has the name of an adapter")
        # Remembered by each module, so that detach thaws it, from any root and after deepcopy.
        own = dict(module.named_parameters(recurse=False))
        if thaw := [key for key, parameter in own.items() if parameter.requires_grad]:
            module.__dict__.setdefault("_frozen_by_lora", []).extend(thaw)
        for parameter in own.values():
            parameter.requires_grad_(False)
    for name, adapter in made.items():
        layer = model.get_submodule(name)
        layer.lora = adapter.train(layer.training)
        layer.register_forward_hook(_add, with_kwargs=True)


def _add(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
    """The forward hook: the layer's output plus its adapter's."""
    adapter = layer.lora
    assert isinstance(adapter, Adapter)
    if adapter.enabled and adapter.kept is None:
        return output + adapter(*args, **kwargs)
    return None


def attached(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter in `model`, by the name of its site."""
    return {
        name.removesuffix("lora").removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }


def detach(model: nn.Module) -> None:
    """Takes every adapter off again and leaves the model as it was before any was attached."""
    if any(adapter.kept is not None for adapter in attached(model).values()):
        unmerge(model)
    for name in attached(model):
        layer = model.get_submodule(name)
        for key, hook in list(layer._forward_hooks.items()):
            if hook is _add:
                del layer._forward_hooks[key]
                layer._forward_hooks_with_kwargs.pop(key, None)
        del layer.lora
    for module in model.modules():
        for name in module.__dict__.pop("_frozen_by_lora", []):
            module.get_parameter(name).requires_grad_(True)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every ΔW to its weight in place: the plain model's speed, the adapted model's output.

    The sum is formed in float32 (or wider) whatever the weight's dtype, and the weight is kept
    aside for `unmerge`. Raises AdapterError if merged already or disabled.
    """
    for name, adapter in attached(model).items():
        if adapter.kept is not None:
            raise AdapterError(f"the adapter of '{name}' is merged already: unmerge it first")
        if not adapter.enabled:
            raise AdapterError(f"the adapter of '{name}' is disabled: merging would enable it")
    for name, adapter in attached(model).items():
        weight = adapter.weight_of(model.get_submodule(name))
        delta = adapter.delta()
        adapter.kept = weight.detach().clone()
        weight.copy_(weight.to(delta.dtype) + delta)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Puts back the weights that `merge` kept, bit for bit. Raises AdapterError if not merged."""
    for name, adapter in attached(model).items():
        if adapter.kept is None:
            raise AdapterError(f"the adapter of '{name}' is not merged")
    for name, adapter in attached(model).items():
        assert adapter.kept is not None
        adapter.weight_of(model.get_submodule(name)).copy_(adapter.kept)
        adapter.kept = None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base, bit for bit; after it, each adapter is as it was."""
    before = {adapter: adapter.enabled for adapter in attached(model).values()}
    for name, adapter in attached(model).items():
        if adapter.kept is not None:
            raise AdapterError(f"the adapter of '{name}' is merged: unmerge it, then disable it")
    try:
        for adapter in before:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled
