"""Weights that are adapted where they are read: `layer.weight` is W + ΔW, whoever asks for it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.recipe import AdapterError

KINDS_ON_READING = ("weight", "experts", "parameter")
"""The kinds of adapters that act only where a parameter is read.

A factored adapter acts on the output of its layer, and where the weight is read without a call.
"""


class ResultOfReading(torch.Tensor):
    """W + ΔW, which is computed anew each time it is read: to change it in place is an error.

    So is to ask for its `data`, from which code copies one layer's weight to another, as that which
    resizes a model's output layer. What is computed with it is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        name = getattr(func, "__name__", "")
        is_change = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if (is_change or func == DATA) and isinstance(args[0], cls):
            raise AdapterError(
                f"{'data' if func == DATA else name.strip('_')}: this weight has an adapter. What "
                "is read is W + ΔW, computed anew each time: a change in place would be lost, a "
                "copy would have the adapter in it. W itself is in model.parameters(), and is read "
                "within adapters.disabled(model). Resize a model's embeddings before attach"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func is Tensor.detach else result


IN_PLACE = {"__set__", "__setitem__"} | {
    f"__i{operation}__" for operation in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
}
"""What changes a tensor in place besides methods that end in an underscore."""

DATA: Any = getattr(Tensor.data, "__get__")  # noqa: B009
"""What `tensor.data` calls."""


# An attribute of one object can be computed only by its class, so the layer's class is swapped at
# run time for a subclass of itself, in which `weight` is a property. For an nn.Bilinear:
#   watch(layer, "weight")   type(layer) is now a subclass of nn.Bilinear, also named "Bilinear"
#   layer.weight             the property: W from layer._parameters, + ΔW of the active adapter
#   layer.state_dict()       still the key "weight" with W: it reads layer._parameters
#   unwatch(layer)           type(layer) is nn.Bilinear again
# torch's parametrizations swap the class in the same way. But they rename the parameter's key to
# parametrizations.weight.original, and they refuse to be pickled.
#
# A factored adapter on an nn.Linear adds scale · B (A x) to the layer's output, so the layer must
# compute with W alone when it is called, and yet give W + ΔW to a model that reads its weight, as
# Mamba's `self.dt_proj.weight @ x`. The subclass has another forward for that, see below.


def watch(layer: nn.Module, parameter: str, is_factored: bool = False) -> None:
    """From now on reading `parameter` of `layer` gives it with the adapters that act on it.

    With `is_factored` the layer itself, when it is called, computes without factored adapters.
    """
    unwatched_class, on_reading, factored = _watches(layer)
    if is_factored:
        factored = (*{*factored, parameter},)
    else:
        on_reading = tuple(sorted({*on_reading, parameter}))
    layer.__class__ = _watching_class(unwatched_class, on_reading, factored)


def unwatch(layer: nn.Module) -> None:
    """Undoes `watch`: reading gives the parameters themselves again."""
    layer.__class__ = base_class(layer)


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, or the one it had before `watch`."""
    return _watches(layer)[0]


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


def has_adapters_on_reading(layer: nn.Module) -> bool:
    """Whether a parameter of the layer is of a kind that acts only where it is read."""
    return bool(_watches(layer)[1])


Names = tuple[str, ...]


def _watches(layer: nn.Module) -> tuple[type[nn.Module], Names, Names]:
    """The layer's class before `watch`, and its parameters that are watched now.

    Those of adapters that act on reading alone, and those of factored adapters.
    """
    return getattr(type(layer), "_watches", (type(layer), (), ()))


# Cached, so that all layers of a class with the same watched parameters share one subclass.
@cache
def _watching_class(
    unwatched_class: type[nn.Module], on_reading: Names, factored: Names
) -> type[nn.Module]:
    """A subclass of `unwatched_class` in which the named parameters read as the adapted weights."""
    if not (on_reading or factored):
        return unwatched_class
    members: dict[str, Any] = {"_watches": (unwatched_class, on_reading, factored)}
    members |= {key: getattr(unwatched_class, key) for key in ("__module__", "__qualname__")}
    members |= {name: _adapted_parameter(name, bool(factored)) for name in (*on_reading, *factored)}
    members["__reduce_ex__"] = _reduce
    if factored:
        members["forward"] = _forward_as(_watching_class(unwatched_class, on_reading, ()))
    return type(unwatched_class.__name__, (unwatched_class,), members)


def _adapted_parameter(name: str, has_factored: bool) -> property:
    """The property by which a layer's parameter `name` is read with its adapters."""

    def read(layer: nn.Module) -> Any:
        parameter: Any = layer._parameters[name]
        slot: Any = layer._modules.get("lora")
        if parameter is None or slot is None or layer.__dict__.get("_being_copied"):
            return parameter
        # FSDP takes its parameters from here, as DTensors, and would train W + ΔW as the base.
        if hasattr(parameter, "device_mesh"):
            return parameter
        weight = parameter
        for adapter in slot.active_adapters():
            if adapter.parameter == name and adapter.kind in KINDS_ON_READING:
                weight = adapter(weight)
            elif adapter.parameter == name and has_factored:
                weight = adapter.adapted_weight(weight)
        # A step that is compiled, or recorded of a pack, takes plain tensors alone.
        is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if is_traced or weight is parameter:
            return weight
        if type(weight) not in (Tensor, nn.Parameter):
            return weight  # a LowRankSum, which is a ResultOfReading where it is formed
        return weight.as_subclass(ResultOfReading)

    return property(read)


# `forward` is called on another object of the class that the layer has without factored adapters.
# It shares the layer's __dict__, and so all parameters and attributes, also those that it sets.
# Nothing on the layer changes meanwhile, so this holds under torch.compile and in threads.
def _forward_as(class_when_called: type[nn.Module]) -> Any:
    """A forward that computes as a layer of `class_when_called` with the same state does."""

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer_when_called = object.__new__(class_when_called)
        object.__setattr__(layer_when_called, "__dict__", layer.__dict__)
        return class_when_called.forward(layer_when_called, *args, **kwargs)

    return forward


# The subclass has no name that pickle could import. So a layer is pickled, and copied, as the call
# _blank(unwatched_class, …), which builds the subclass again, and its state.
def _reduce(layer: nn.Module, protocol: Any) -> Any:
    """What `pickle` and `copy` make a layer of the watching subclass from."""
    # An LSTM keeps the weights that it read last. These are results of W + ΔW, which cannot be
    # copied, so it reads them once more while _being_copied makes reading give W.
    layer.__dict__["_being_copied"] = True
    try:
        getstate: Any = layer.__getstate__
        state = {k: v for k, v in getstate().items() if k != "_being_copied"}
    finally:
        del layer.__dict__["_being_copied"]
    return _blank, _watches(layer), state


def _blank(unwatched_class: type[nn.Module], on_reading: Names, factored: Names = ()) -> nn.Module:
    """A layer of the watching subclass without its state, which pickle sets next.

    Layers that were pickled by earlier versions name no factored parameters.
    """
    watching_class = _watching_class(unwatched_class, on_reading, factored)
    return watching_class.__new__(watching_class)
