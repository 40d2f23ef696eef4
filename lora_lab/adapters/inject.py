"""Putting adapters on a model, and taking them off."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters import weight
from lora_lab.adapters.adapter import Adapter, AdapterError, Recipe
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.slots import Slot, all_adapters, chosen, layer_of, switch
from lora_lab.adapters.targets import Target, find_sites
from lora_lab.seeding import generator


def attach(
    model: nn.Module,
    targets: Mapping[str, Target] | str = "linear",
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    init: str = "kaiming",
    scaling: str = "alpha/r",
    trains: str = "both",
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> list[Site]:
    """Puts an adapter on every site that `targets` pick, freezes the rest, and makes it active.

    `targets` may be a kind ("linear"), "attention" or "all". Layers keep their object, weight and
    state-dict key; norms that keep running statistics are held in eval mode while they are frozen.
    Each site's factors are drawn from a generator of its own, seeded by (seed, site, r): what else
    is targeted never changes them. A second call with another `name` puts another adapter beside
    the first. Raises what `find_sites` raises, and AdapterError where a layer has an adapter of
    that name already.

    Load the base before attaching DoRA or an init that starts from the weight: they read it here.
    Code that reads the weight of a Linear, Conv or Embedding without calling the layer, as
    F.linear(x, embed.weight), reads the base's.
    """
    targets = {targets: Target(kind=targets)} if isinstance(targets, str) else targets
    recipe = Recipe(r, alpha, dropout, init, scaling, trains, dora)
    sites = find_sites(model, targets, recipe, rank_pattern, alpha_pattern)
    made = {}
    for site in sites:
        assert site.recipe is not None
        layer = model.get_submodule(site.layer)
        adapter = adapter_class(layer)(layer, site.parameter, site.rows, site.recipe)
        made[site] = adapter.draw(layer, generator(seed, site.name, site.recipe.r))
    place(model, made, name)
    return sites


def place(model: nn.Module, made: Mapping[Site, Adapter], name: str) -> None:
    """Puts adapters on their sites under `name`, active, and freezes every other parameter."""
    if not name.isidentifier() or hasattr(Slot(), name):
        raise AdapterError(f"name={name!r}: must be a plain word, and not one of nn.ModuleDict's")
    there = all_adapters(model)
    if merged := [site for (_, site), adapter in there.items() if adapter.kept is not None]:
        shown = ", ".join(site or "the model itself" for site in merged)
        raise AdapterError(f"these layers are merged: {shown}; unmerge them first")
    if taken := [site.name for site in made if (name, site.name) in there]:
        raise AdapterError(
            f"there is an adapter '{name}' already on {', '.join(taken) or 'the model itself'}; "
            "detach it, or give this one another name"
        )
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "lora" and not isinstance(module, Slot):
            raise AdapterError(f"the model's own module '{path}' has the name of an adapter")
    seats = []
    for site, adapter in made.items():
        owner = model.get_submodule(site.layer)
        seats.append((owner, site.name, adapter))
        for other in site.tied_to:
            path, _, parameter = other.rpartition(".")
            layer = model.get_submodule(path)
            if layer is not owner:  # it may be one layer under two names
                seats.append((layer, other, _shared(layer, owner, site, parameter, adapter)))
    freeze(model)
    for layer, site, adapter in seats:
        sit(layer, name, site, adapter)
    switch(model, name)


def freeze(model: nn.Module) -> None:
    """Lets nothing of `model` but its adapters train, and holds running statistics."""
    for module in model.modules():
        if isinstance(module, Adapter):
            continue
        # Remembered by each module, so that detach thaws it, from any root and after deepcopy.
        own = dict(module.named_parameters(recurse=False))
        if thaw := [key for key, parameter in own.items() if parameter.requires_grad]:
            module.__dict__.setdefault("_frozen_by_lora", []).extend(thaw)
        for parameter in own.values():
            parameter.requires_grad_(False)
        if getattr(module, "track_running_stats", False) and "_held_by_lora" not in vars(module):
            module.__dict__["_held_by_lora"] = True
            module.register_forward_pre_hook(_hold)


def sit(layer: nn.Module, name: str, site: str, adapter: Any) -> None:
    """Puts an adapter, or what acts in its place, on its layer under `name`."""
    if not isinstance(slot := getattr(layer, "lora", None), Slot):
        layer.lora = slot = Slot()
        if adapter.kind != "weight":
            # First of all hooks: the others are meant for the layer's whole output.
            layer.register_forward_hook(_adapt, with_kwargs=True, prepend=True)
    if adapter.kind == "weight":
        weight.watch(layer, adapter.parameter)
    if name not in slot:
        slot[name] = nn.ModuleDict()
    parts: Any = slot[name]
    parts[site.rpartition(".")[2] if adapter.kind == "weight" else "weight"] = adapter
    adapter.train(layer.training)


def _shared(
    layer: nn.Module, owner: nn.Module, site: Site, parameter: str, adapter: Adapter
) -> Adapter:
    """The adapter of another layer that uses the same weight: the very same factors."""
    twin = adapter_class(layer)(layer, parameter, None, adapter.recipe)
    if adapter.recipe.dora or adapter.core is not None or adapter.A0 is not None:
        raise AdapterError(
            f"'{site.name}' is tied: only plain A and B can be shared; leave it to an adapter "
            "without DoRA and with an init whose B is zero"
        )
    if site.rows is not None:
        raise AdapterError(f"'{site.name}' is a block of a tied weight: untie it, or exclude it")
    weights = (twin.weight_of(layer), adapter.weight_of(owner))
    if len({(weight.shape, weight.stride()) for weight in weights}) > 1:
        raise AdapterError(f"'{site.name}' is tied to a transpose or a part of it: exclude it")
    twin.fill({})
    object.__setattr__(twin, "source", adapter)
    adapter.tied = True
    tokens = (getattr(one, "padding", None) for one in (twin, adapter))
    twin.masked = adapter.masked = next((token for token in tokens if token is not None), None)
    return twin


def _hold(norm: nn.Module, args: tuple) -> None:
    """A frozen norm's running statistics stay what they are."""
    norm.eval()


def _adapt(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
    """The forward hook: the layer's output as it is with the adapter."""
    slot: Any = layer._modules["lora"]
    for adapter in slot.acting():
        input = args[0] if args else next(iter(kwargs.values()))
        if not output.is_nested:
            return adapter(layer, input, output)
        if output.layout == torch.jagged:
            ragged: Any = output
            values = adapter(layer, input.values(), ragged.values())
            return torch.nested.nested_tensor_from_jagged(values, ragged.offsets())
        # nn.TransformerEncoder's, of padded sequences in eval mode
        pairs = zip(input.unbind(), output.unbind(), strict=True)
        return torch.nested.as_nested_tensor([adapter(layer, *pair) for pair in pairs])
    return None


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes the adapter `name` off, or every adapter: the model is then as before any was attached.

    Whatever is merged is unmerged first. Where the active adapter goes, none is active.
    """
    if name is not None:
        chosen(model, name)
    for (_, site), adapter in all_adapters(model).items():
        if adapter.kept is not None:
            put_back(layer_of(model, site, adapter), adapter)
    for layer in list(model.modules()):
        if not isinstance(slot := layer._modules.get("lora"), Slot):
            continue
        for other in [name] if name is not None else list(slot):
            if other in slot:
                del slot[other]
            slot.active = None if slot.active == other else slot.active
        if not len(slot):
            _clear(layer)
    if not all_adapters(model):
        for module in model.modules():
            for key in module.__dict__.pop("_frozen_by_lora", []):
                module.get_parameter(key).requires_grad_(True)
            if module.__dict__.pop("_held_by_lora", False):
                _unhook(module._forward_pre_hooks, _hold)
                module.train(model.training)


def put_back(layer: nn.Module, adapter: Adapter) -> None:
    """The weight as it was before the merge, bit for bit."""
    assert adapter.kept is not None
    adapter.weight_of(layer).data.copy_(adapter.kept)
    adapter.kept = None


def _unhook(hooks: dict[int, Any], hook: Any) -> None:
    for key in [key for key, one in hooks.items() if one is hook]:
        del hooks[key]


def _clear(layer: nn.Module) -> None:
    _unhook(layer._forward_hooks, _adapt)
    for key in set(layer._forward_hooks_with_kwargs) - set(layer._forward_hooks):
        del layer._forward_hooks_with_kwargs[key]
    weight.unwatch(layer)
    del layer.lora
