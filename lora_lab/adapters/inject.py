"""Putting adapters on a model, and taking them off."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters import slots
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.calibration import Calibration, draw_adapters
from lora_lab.adapters.quantized import is_packed, keep_as_loaded, let_change
from lora_lab.adapters.rank_redistribution import check_rho, redistributed
from lora_lab.adapters.recipe import AdapterError, Recipe, python_scalar
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.slots import Change, Slot
from lora_lab.adapters.target import Target
from lora_lab.adapters.targets import find_sites
from lora_lab.adapters.trained_in_full import FullParameter, select
from lora_lab.adapters.watch import KINDS_ON_READING, unwatch, watch

log = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    targets: Mapping[str, Target] | str = "linear",
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    init: str = "kaiming",
    scaling: str = "alpha/r",
    trains: str = "both",
    dora: bool = False,
    form: str = "lora",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    also_train: str | Sequence[str] = (),
    over_rank: str = "clip",
    calibration: Calibration | Sequence[Any] | None = None,
    rho: float = 1.0,
    seed: int = 0,
    name: str = "default",
) -> list[Site]:
    """Puts an adapter on each site that `targets` pick, freezes the rest, and makes it active.

    Args:
        targets: {label: Target}, or one of GROUPS, as "linear", "attention" or "all".
        r, alpha, dropout, init, scaling, trains, dora, form: see Recipe; alpha None is r, which is
            a scale of 1.
        rank_pattern, alpha_pattern: {glob on names: r or alpha} for single sites.
        also_train: globs on the names of parameters, or of modules, that train in full beside the
            adapters; `bias` is each bias. Their weights take no adapter.
        over_rank: what becomes of r over a weight's rank: "clip" (the weight's rank, and the same
            scale), "error" or "allow".
        calibration: batches for the inits eva, corda and lora_ga, which start from data: each is
            what the model is called with. lora_ga needs `Calibration(batches, loss)`.
        rho: above 1 the sites with init eva share the sum of their ranks by the variance of their
            inputs, and get at most rho · r each; one that gets none has no adapter.
        seed: Each site's factors are drawn from a generator of that site, seeded by (seed, site,
            r): what else is targeted never changes them.
        name: A second call with another name puts another adapter beside the first.

    Returns the adapted sites, and logs what is clipped and which weights are left out. Raises
    what `find_sites` and `trained_in_full.select` raise, and AdapterError where a layer already has
    an adapter of that name.

    Layers keep their object, weight and state-dict key. Norms with running statistics are held in
    eval mode while they are frozen.

    Load the base before attaching DoRA or an init that starts from the weight: they read it here.
    Code that reads a weight without calling its layer, as F.linear(x, embed.weight), gets W + ΔW as
    a new tensor. W itself is in the state dict and among the parameters.
    """
    if type(seed := python_scalar(seed)) is not int:
        raise AdapterError(f"seed={seed!r}: must be an integer")
    recipe = Recipe(r, r if alpha is None else alpha, dropout, init, scaling, trains, dora, form)
    keys = select(model, also_train)
    sites = find_sites(
        model, targets, recipe, rank_pattern, alpha_pattern, keys, over_rank, note=log.warning
    )
    if not sites and not keys:
        raise AdapterError(f"targets={targets!r}: picks nothing, and also_train is empty too")
    if not isinstance(calibration, Calibration | None):
        calibration = Calibration(calibration)
    check_rho(rho, sites)
    if rho != 1:
        sites = redistributed(model, sites, calibration, rho, note=log.warning)
    adapters = draw_adapters(model, sites, calibration, seed)
    also_trained = {}
    for key in keys:
        layer, _, parameter = key.rpartition(".")
        also_trained[key] = FullParameter(model.get_submodule(layer), parameter)
    place_adapters(model, adapters, name, also_trained)
    return sites


def place_adapters(
    model: nn.Module,
    adapters: Mapping[Site, Adapter],
    name: str,
    also_trained: Mapping[str, FullParameter] | None = None,
) -> None:
    """Puts adapters on their sites under `name`, active, and freezes all other parameters.

    `also_trained` are those that train in full, by key. Raises AdapterError, and changes nothing,
    where that cannot be.
    """
    also_trained = also_trained or {}
    _check_placeable(model, adapters, name, also_trained)
    placements: list[tuple[nn.Module, str, Change]] = []
    for site, adapter in adapters.items():
        owner = model.get_submodule(site.layer)
        placements.append((owner, site.name, adapter))
        for other in site.tied_to:
            path, _, parameter = other.rpartition(".")
            layer = model.get_submodule(path)
            if layer is not owner:  # it may be one layer under two names
                placements.append((layer, other, _twin(layer, owner, site, parameter, adapter)))
    for key, parameter in also_trained.items():
        placements.append((slots.layer_of(model, key, parameter), key, parameter))
    freeze_base(model)
    for layer, site, adapter in placements:
        place_on_layer(layer, name, site, adapter)
    slots.switch(model, name)


def _check_placeable(
    model: nn.Module,
    sites: Mapping[Site, Adapter],
    name: str,
    also_trained: Mapping[str, FullParameter],
) -> None:
    if not isinstance(name, str) or not name.isidentifier() or hasattr(Slot(), name):
        raise AdapterError(f"name={name!r}: must be a plain word, and not one of nn.ModuleDict's")
    slots.require_unmerged(model)
    names, keys = {site.name for site in sites}, {site.key for site in sites}
    if both := sorted(keys & set(also_trained)):
        raise AdapterError(f"{', '.join(both)}: a weight takes an adapter or trains in full")
    attached, in_full = slots.attached(model, name), slots.also_trained(model, name)
    taken = [site for site in attached if site in names]
    taken += [
        site
        for site, adapter in attached.items()
        if slots.parameter_key(site, adapter) in also_trained
    ]
    taken += [key for key in in_full if key in keys or key in also_trained]
    if taken:
        shown = ", ".join(site or "the model itself" for site in taken)
        raise AdapterError(f"adapter '{name}' sits on {shown}: detach it, or take another name")
    for path, module in model.named_modules():
        if isinstance(module, Slot):
            continue  # of an adapter that is itself named `lora`
        children = {**module._modules, **module._parameters, **module._buffers}
        if not isinstance(children.get("lora"), Slot | None):
            key = ".".join(filter(None, [path, "lora"]))
            raise AdapterError(f"the model's own '{key}' has the name of an adapter")


def freeze_base(model: nn.Module) -> None:
    """Freezes all parameters but the adapters', and holds norms with running statistics in eval."""
    for module in model.modules():
        if isinstance(module, Change):
            continue
        keep_as_loaded(module)
        parameters = dict(module.named_parameters(recurse=False))
        # Each module remembers what was frozen here, so that detach undoes it, from whichever
        # parent it is called and after a deepcopy.
        if trained := [key for key, parameter in parameters.items() if parameter.requires_grad]:
            module.__dict__.setdefault("_frozen_by_lora", []).extend(trained)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        if getattr(module, "track_running_stats", False) and "_held_by_lora" not in vars(module):
            module.__dict__["_held_by_lora"] = True
            # Before each call, since model.train() puts the norm in train mode again.
            module.register_forward_pre_hook(_hold_in_eval_mode)


def place_on_layer(layer: nn.Module, name: str, site: str, adapter: Any) -> None:
    """Puts an adapter, or a pack's PackedAdapter, on its layer under `name`."""
    if not isinstance(slot := getattr(layer, "lora", None), Slot):
        layer.lora = slot = Slot()
    on_reading = adapter.kind in KINDS_ON_READING
    if on_reading or not is_packed(layer):
        watch(layer, adapter.parameter, is_factored=not on_reading)
    if not on_reading and _adapt_output not in layer._forward_hooks.values():
        # First of all hooks: the others are meant for the layer's full output.
        layer.register_forward_hook(_adapt_output, with_kwargs=True, prepend=True)
    if name not in slot:
        slot[name] = nn.ModuleDict()
    parts: Any = slot[name]
    parts[site.rpartition(".")[2] if slots.is_named_by_part(adapter) else "weight"] = adapter
    adapter.train(layer.training)


def _twin(
    layer: nn.Module, owner: nn.Module, site: Site, parameter: str, adapter: Adapter
) -> Adapter:
    """The adapter for another `layer` that uses the weight of `owner`, with the same factors.

    Raises AdapterError where they cannot be shared.
    """
    twin = adapter_class(layer, parameter)(layer, parameter, None, adapter.recipe)
    adapter.recipe.check_shared(site.name)
    if site.rows is not None:
        raise AdapterError(f"'{site.name}' is a block of a tied weight: untie it, or exclude it")
    weights = (twin.weight_of(layer), adapter.weight_of(owner))
    if len({(weight.shape, weight.stride()) for weight in weights}) > 1:
        raise AdapterError(f"'{site.name}' is tied to a transpose or a part of it: exclude it")
    twin.fill({})
    object.__setattr__(twin, "source", adapter)  # not a child: see Adapter.__init__
    adapter.is_tied = True
    # An embedding's padding token has no gradient, but the other layer would change its row.
    tokens = (getattr(one, "padding", None) for one in (twin, adapter))
    twin.masked_token = adapter.masked_token = next((t for t in tokens if t is not None), None)
    return twin


def _hold_in_eval_mode(norm: nn.Module, args: tuple) -> None:
    """The forward pre-hook of a frozen norm, so that its running statistics stay as they are."""
    norm.eval()


def _adapt_output(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The forward hook of layers with a factored adapter: the output with W + ΔW."""
    slot: Any = layer._modules["lora"]
    for adapter in slot.active_adapters():
        if adapter.kind in KINDS_ON_READING:
            continue
        input = args[0] if args else next(iter(kwargs.values()))
        output = _adapted(layer, adapter, input, output)
    return output


def _adapted(layer: nn.Module, adapter: Any, input: Tensor, output: Tensor) -> Tensor:
    """The output of a factored adapter, also for nested tensors."""
    if not output.is_nested:
        return adapter(layer, input, output)
    if output.layout == torch.jagged:
        ragged: Any = output
        values = adapter(layer, input.values(), ragged.values())
        return torch.nested.nested_tensor_from_jagged(values, ragged.offsets())
    # nn.TransformerEncoder makes these of padded sequences in eval mode.
    pairs = zip(input.unbind(), output.unbind(), strict=True)
    return torch.nested.as_nested_tensor([adapter(layer, *pair) for pair in pairs])


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes the adapter `name` off, or all adapters: the model is then as before `attach`.

    Whatever is merged is unmerged first. If the active adapter is taken off, none is active.
    """
    if name is not None:
        slots.require_attached(model, name)
    for site, adapter in slots.merged_adapters(model).items():
        restore_weight(slots.layer_of(model, site, adapter), adapter)
    for layer in list(model.modules()):
        if not isinstance(slot := layer._modules.get("lora"), Slot):
            continue
        for other in [other for other in slot if name in (None, other)]:
            del slot[other]
        slot.active = None if name in (None, slot.active) else slot.active
        if not len(slot):
            _remove_slot(layer)
    if not slots.names(model):
        _unfreeze_base(model)


def restore_weight(layer: nn.Module, adapter: Change) -> None:
    """Undoes a merge: the weight is what it was before, bit for bit."""
    assert adapter.weight_before_merge is not None
    adapter.weight_of(layer).data.copy_(adapter.weight_before_merge)
    adapter.weight_before_merge = None


def _unfreeze_base(model: nn.Module) -> None:
    for module in model.modules():
        let_change(module)
        for key in module.__dict__.pop("_frozen_by_lora", []):
            module.get_parameter(key).requires_grad_(True)
        if module.__dict__.pop("_held_by_lora", False):
            _unhook(module._forward_pre_hooks, _hold_in_eval_mode)
            module.train(model.training)


def _remove_slot(layer: nn.Module) -> None:
    _unhook(layer._forward_hooks, _adapt_output)
    for key in set(layer._forward_hooks_with_kwargs) - set(layer._forward_hooks):
        del layer._forward_hooks_with_kwargs[key]
    unwatch(layer)
    del layer.lora


def _unhook(hooks: dict[int, Any], hook: Any) -> None:
    for key in [key for key, one in hooks.items() if one is hook]:
        del hooks[key]
