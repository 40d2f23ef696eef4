"""What a model carries: every adapter on it, which of them acts, and switching between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_lab.adapters.adapter import Adapter, AdapterError


class Slot(nn.ModuleDict):
    """What a layer carries as its child `lora`: {adapter's name: {part of the layer: Adapter}}."""

    active: str | None = None
    """The adapter that acts; None: the layer is its base."""

    def acting(self) -> list[Any]:
        """The active adapters, or a pack's seats, that are not merged into the weight already."""
        if self.active is None:
            return []
        parts: Any = self._modules[self.active]
        return [adapter for adapter in parts._modules.values() if adapter.kept is None]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore
        error_msgs: list[str] = args[-1]
        if any(isinstance(m, Adapter) and m.kept is not None for m in self.modules()):
            error_msgs.append(
                f"{prefix}: merged, and unmerge would undo what is loaded; unmerge first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def all_adapters(model: nn.Module) -> dict[tuple[str, str], Adapter]:
    """Every adapter in `model`, active or not, by its name and the name of its site."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter) and module.source is None:
            parts = path.split(".")
            at = len(parts) - 3  # layer . lora . name . part
            layer, (name, part) = ".".join(parts[:at]), parts[at + 1 :]
            inside = part if module.kind == "weight" else ""
            found[name, ".".join(filter(None, [layer, inside]))] = module
    return found


def attached(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """The adapters of that `name`, or the active ones, by the names of their sites."""
    slots = [m for m in model.modules() if isinstance(m, Slot) and m.active is not None]
    active = {id(a) for slot in slots for a in slot[slot.active].children()}  # pyright: ignore
    return {
        site: adapter
        for (other, site), adapter in all_adapters(model).items()
        if (id(adapter) in active if name is None else other == name)
    }


def chosen(model: nn.Module, name: str | None) -> dict[str, Adapter]:
    """As `attached`, but raises AdapterError where that is none."""
    if made := attached(model, name):
        return made
    asked = "no adapter is active" if name is None else f"there is no adapter '{name}'"
    raise AdapterError(f"{asked}; on the model: {', '.join(names(model)) or 'none'}")


def names(model: nn.Module) -> list[str]:
    """The names of the adapters on `model`, in the order of their first sites."""
    return list(dict.fromkeys(name for name, _ in all_adapters(model)))


def layer_path(site: str, adapter: Adapter) -> str:
    """The name of the layer that a site is on."""
    return site.rpartition(".")[0] if adapter.kind == "weight" else site


def layer_of(model: nn.Module, site: str, adapter: Adapter) -> nn.Module:
    """The layer that a site is on."""
    return model.get_submodule(layer_path(site, adapter))


def switch(model: nn.Module, name: str | None) -> None:
    """Makes the adapter `name` the one that acts and trains; None: the base, bit for bit.

    Raises AdapterError where there is no such adapter, or one is merged.
    """
    if name is not None and name not in names(model):
        raise AdapterError(
            f"name={name!r}: there is no such adapter, only {', '.join(names(model))}"
        )
    _check_unmerged(model)
    for module in model.modules():
        if isinstance(module, Slot):
            module.active = name if name is not None and name in module else None
    for (other, _), adapter in all_adapters(model).items():
        adapter.thaw(other == name)


def _check_unmerged(model: nn.Module) -> None:
    for (name, site), adapter in all_adapters(model).items():
        if adapter.kept is not None:
            raise AdapterError(f"the adapter '{name}' of '{site}' is merged: unmerge it first")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base, bit for bit; after it, each adapter is as it was."""
    _check_unmerged(model)
    slots = {m: m.active for m in model.modules() if isinstance(m, Slot)}
    for slot in slots:
        slot.active = None
    try:
        yield
    finally:
        for slot, active in slots.items():
            slot.active = active
