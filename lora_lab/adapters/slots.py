"""Which adapters a model has, which of them is active, and switching between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.trained_in_full import FullParameter
from lora_lab.adapters.watch import KINDS_ON_READING

Change = Adapter | FullParameter
"""What a slot holds: a low-rank adapter, or a parameter that is trained in full."""


MERGED = "is_merged"
"""The key in a state dict by which a slot says that its adapter is merged into the weight."""


# A layer `fc1` with two adapters, and an nn.MultiheadAttention `attn` with one, are these modules:
#   fc1.lora                                    Slot {"default": …, "second": …}, active "default"
#   fc1.lora.default.weight                     LinearAdapter; its A has the state-dict key
#                                               fc1.lora.default.weight.A
#   attn.lora.default.in_proj_weight_q          WeightAdapter on a block of in_proj_weight
#   c_attn.lora.default.weight_q                TransposedLinearAdapter on a block of its weight
# and a bias that is trained in full beside the adapter of fc1
#   fc1.lora.default.bias                       FullParameter
# So the base's keys stay as they are, and each key with `lora` between its dots is an adapter's.
class Slot(nn.ModuleDict):
    """The child `lora` of an adapted layer: {adapter's name: {part of the layer: Change}}.

    The part is "weight" for a factored adapter of all rows, and the parameter or its block for
    others.
    """

    active: str | None = None
    """The name of the adapter that acts; None: the layer is its base."""
    low_rank_acts: bool = True
    """Whether, of the active adapter, more acts than what is trained in full."""

    def active_adapters(self) -> list[Any]:
        """The adapters (of a pack: PackedAdapters) that act and are not merged into the weight."""
        if self.active is None:
            return []
        parts: Any = self._modules[self.active]
        adapters = [a for a in parts._modules.values() if a.weight_before_merge is None]
        if self.low_rank_acts:
            return adapters
        return [a for a in adapters if a.kind == FullParameter.kind]

    @property
    def is_merged(self) -> bool:
        """Whether one of the adapters is merged into the layer's weight."""
        adapters = [module for module in self.modules() if isinstance(module, Change)]
        return any(adapter.weight_before_merge is not None for adapter in adapters)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_merged:
            destination[prefix + MERGED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore
        errors: list[str] = args[-1]
        if self.is_merged:
            errors.append(f"{prefix}: merged, and unmerge would undo what is loaded; unmerge first")
        if state_dict.pop(prefix + MERGED, None) is not None:
            errors.append(
                f"{prefix}: the state dict was taken while the adapter was merged, so its weight "
                "already has the change, which would count twice; take it after unmerge, or load "
                "its base's keys alone (those without `lora`) into a model without adapters"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def all_adapters(model: nn.Module) -> dict[tuple[str, str], Adapter]:
    """All adapters in `model`, active or not, by (adapter's name, site's name).

    Not those that use the tensors of another layer's adapter.
    """
    adapters = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter) and module.source is None:
            *layer, _, name, part = path.split(".")  # layer . lora . name . part
            site = [*layer, part] if is_named_by_part(module) else layer
            adapters[name, ".".join(site)] = module
    return adapters


def all_also_trained(model: nn.Module) -> dict[tuple[str, str], FullParameter]:
    """All parameters trained in full, active or not, by (adapter's name, parameter's key)."""
    parameters = {}
    for path, module in model.named_modules():
        if isinstance(module, FullParameter):
            *layer, _, name, parameter = path.split(".")  # layer . lora . name . parameter
            parameters[name, ".".join([*layer, parameter])] = module
    return parameters


def merged_adapters(model: nn.Module) -> dict[str, Change]:
    """What is merged into the weights: adapters by site, parameters trained in full by key."""
    changes = {**all_adapters(model), **all_also_trained(model)}
    return {site: a for (_, site), a in changes.items() if a.weight_before_merge is not None}


def require_unmerged(model: nn.Module) -> None:
    """Raises AdapterError where an adapter is merged into its weights."""
    if merged := merged_adapters(model):
        shown = ", ".join(site or "the model itself" for site in merged)
        raise AdapterError(f"an adapter is merged into {shown}: unmerge it first")


def attached(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """The adapters named `name`, or the active ones, as {name of the site: adapter}.

    Sites without such an adapter are left out; the dict is empty where no site has one.
    """
    active = _active_ids(model)
    return {
        site: adapter
        for (other, site), adapter in all_adapters(model).items()
        if (id(adapter) in active if name is None else other == name)
    }


def also_trained(model: nn.Module, name: str | None = None) -> dict[str, FullParameter]:
    """What is trained in full beside the adapters named `name`, or the active ones.

    As {the parameter's key in the base: FullParameter}, empty where nothing is.
    """
    active = _active_ids(model)
    return {
        key: parameter
        for (other, key), parameter in all_also_trained(model).items()
        if (id(parameter) in active if name is None else other == name)
    }


def _active_ids(model: nn.Module) -> set[int]:
    """The ids of what is active in all slots."""
    slots = [m for m in model.modules() if isinstance(m, Slot) and m.active is not None]
    return {id(a) for slot in slots for a in slot[slot.active].children()}  # pyright: ignore


def require_attached(model: nn.Module, name: str | None) -> dict[str, Adapter]:
    """As `attached`, but raises AdapterError where nothing is attached by that name.

    The dict is empty for an adapter that only trains parameters in full.
    """
    if (adapters := attached(model, name)) or also_trained(model, name):
        return adapters
    missing = "no adapter is active" if name is None else f"there is no adapter '{name}'"
    raise AdapterError(f"{missing}; on the model: {', '.join(names(model)) or 'none'}")


def names(model: nn.Module) -> list[str]:
    """The names of the adapters on `model`, in the order of their first sites."""
    return list(dict.fromkeys(name for name, _ in [*all_adapters(model), *all_also_trained(model)]))


def is_named_by_part(adapter: Any) -> bool:
    """Whether the site is a part of its layer, by name too: `attn.in_proj_weight_q`."""
    return adapter.kind in KINDS_ON_READING or adapter.rows is not None


def layer_path(site: str, adapter: Change) -> str:
    """The name of the layer that holds a site."""
    return site.rpartition(".")[0] if is_named_by_part(adapter) else site


def layer_of(model: nn.Module, site: str, adapter: Change) -> nn.Module:
    """The layer that holds a site."""
    return model.get_submodule(layer_path(site, adapter))


def parameter_key(site: str, adapter: Change) -> str:
    """The state-dict key, in the base, of the parameter that is changed at a site."""
    return ".".join(filter(None, [layer_path(site, adapter), adapter.parameter]))


def switch(model: nn.Module, name: str | None) -> None:
    """Makes the adapter `name` the one that acts and trains; None: the base, bit for bit.

    Raises AdapterError where there is no such adapter, or one is merged.
    """
    if name is not None:
        require_attached(model, name)
    require_unmerged(model)
    for module in model.modules():
        if isinstance(module, Slot):
            module.active = name if name is not None and name in module else None
    for (other, _), adapter in [*all_adapters(model).items(), *all_also_trained(model).items()]:
        adapter.set_trainable(other == name)


@contextmanager
def disabled(model: nn.Module, also_trained: bool = True) -> Iterator[None]:
    """A context in which the model is its base, bit for bit; then adapters act as before.

    With `also_trained=False` only low-rank adapters are off, and what is trained in full still has
    its trained values.
    """
    require_unmerged(model)
    slots = {m: (m.active, m.low_rank_acts) for m in model.modules() if isinstance(m, Slot)}
    for slot in slots:
        slot.active = None if also_trained else slot.active
        slot.low_rank_acts = False
    try:
        yield
    finally:
        for slot, state in slots.items():
            slot.active, slot.low_rank_acts = state
