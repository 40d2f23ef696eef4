"""Parameters that change where they are read: `layer.weight` gives W + ΔW, whoever asks for it."""

from functools import cache
from typing import Any

from torch import nn

KINDS_ON_READING = ("weight", "parameter")
"""The kinds of adapters that act where a parameter is read; others act on the layer's output."""


# An attribute of one object can be computed only by its class, so the layer's class is swapped at
# run time for a subclass of itself, in which `weight` is a property. For an nn.Bilinear:
#   watch(layer, "weight")   type(layer) is now a subclass of nn.Bilinear, also named "Bilinear"
#   layer.weight             the property: W from layer._parameters, + ΔW of the active adapter
#   layer.state_dict()       still the key "weight" with W: it reads layer._parameters
#   unwatch(layer)           type(layer) is nn.Bilinear again
# torch's parametrizations swap the class in the same way. But they rename the parameter's key to
# parametrizations.weight.original, and they refuse to be pickled.


def watch(layer: nn.Module, parameter: str) -> None:
    """From now on reading `parameter` of `layer` gives it with the adapters that act on it."""
    unwatched_class, watched = _class_and_watched(layer)
    layer.__class__ = _watching_class(unwatched_class, tuple(sorted({*watched, parameter})))


def unwatch(layer: nn.Module) -> None:
    """Undoes `watch`: reading gives the parameters themselves again."""
    layer.__class__ = base_class(layer)


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, or the one it had before `watch`."""
    return _class_and_watched(layer)[0]


def keeps_forward(layer: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether a layer is of a `kind`, or of a subclass with the same methods and parameters."""
    Layer = base_class(layer)
    if Layer is kind:
        return True
    is_same = isinstance(layer, kind) and all(
        getattr(Layer, name) is getattr(kind, name) for name in methods
    )
    parts = {*layer._parameters, *layer._buffers, *layer._modules}
    return is_same and parts <= {"weight", "bias", "lora"}


def _class_and_watched(layer: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The layer's class before `watch`, and the parameters that are watched now."""
    return getattr(type(layer), "_watches", (type(layer), ()))


# Cached, so that all layers of a class with the same watched parameters share one subclass.
@cache
def _watching_class(
    unwatched_class: type[nn.Module], parameters: tuple[str, ...]
) -> type[nn.Module]:
    """A subclass of `unwatched_class` in which each of `parameters` reads as the adapted weight."""

    def adapted_parameter(name: str) -> property:
        def read(layer: nn.Module) -> Any:
            weight = layer._parameters[name]
            slot: Any = layer._modules.get("lora")
            if weight is None or slot is None or layer.__dict__.get("_being_copied"):
                return weight
            # FSDP takes its parameters from here, as DTensors, and would train W + ΔW as the base.
            if hasattr(weight, "device_mesh"):
                return weight
            for adapter in slot.active_adapters():
                if adapter.parameter == name and adapter.kind in KINDS_ON_READING:
                    weight = adapter(weight)
            return weight

        return property(read)

    # The subclass has no name that pickle could import. So a layer is pickled, and copied, as the
    # call _blank(unwatched_class, parameters), which builds the subclass again, and its state.
    def __reduce_ex__(layer: nn.Module, protocol: Any) -> Any:  # noqa: N807
        # An LSTM keeps the weights that it read last. These are results of W + ΔW, which cannot be
        # copied, so it reads them once more while _being_copied makes reading give W.
        layer.__dict__["_being_copied"] = True
        try:
            getstate: Any = layer.__getstate__
            state = {k: v for k, v in getstate().items() if k != "_being_copied"}
        finally:
            del layer.__dict__["_being_copied"]
        return _blank, (unwatched_class, parameters), state

    members = {"_watches": (unwatched_class, parameters), "__reduce_ex__": __reduce_ex__}
    members |= {key: getattr(unwatched_class, key) for key in ("__module__", "__qualname__")}
    members |= {name: adapted_parameter(name) for name in parameters}
    return type(unwatched_class.__name__, (unwatched_class,), members)


def _blank(unwatched_class: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    """A layer of the watching subclass without its state, which pickle sets next."""
    watching_class = _watching_class(unwatched_class, parameters)
    return watching_class.__new__(watching_class)
