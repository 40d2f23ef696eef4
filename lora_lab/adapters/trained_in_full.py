"""Parameters that train in full beside the adapters: a new head, norms, biases."""

import difflib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lab.adapters.globs import as_list, check_globs, matching
from lora_lab.adapters.memory import (
    memory_span,
    names_at,
    names_of_parts,
    parameters_in_memory,
)
from lora_lab.adapters.quantized import is_quantized
from lora_lab.adapters.recipe import AdapterError

BIAS = "bias"
"""The word that selects each parameter whose last name is `bias`."""


class FullParameter(nn.Module):
    """A trained copy of one parameter, which takes its place wherever the parameter is read.

    The base's own parameter stays as it is, frozen and under its state-dict key. So the adapter can
    be switched off, merged as itself and stored, and many runs can share one base. `value` is in
    float32, or in the parameter's dtype where that is wider.
    """

    kind: ClassVar[str] = "parameter"
    rows: ClassVar[None] = None
    """All rows of the parameter are replaced."""

    value: nn.Parameter
    weight_before_merge: Tensor | None
    """A copy of the base's parameter from before `merge` changed it; None while not merged."""

    def __init__(self, layer: nn.Module, parameter: str):
        """A copy of what `layer` holds under the name `parameter`."""
        super().__init__()
        self.parameter = parameter
        weight = self.weight_of(layer).detach()
        if weight.is_meta:
            raise AdapterError("the model is on the meta device: attach once it has its weights")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.value = nn.Parameter(weight.to(dtype, copy=True).contiguous())
        self.register_buffer("weight_before_merge", None, persistent=False)

    def weight_of(self, layer: nn.Module) -> Tensor:
        """The base's parameter (unless this one is merged into it)."""
        weight = layer._parameters[self.parameter]
        assert weight is not None
        return weight

    def forward(self, weight: Tensor) -> Tensor:
        """The trained value, in the dtype of the base's parameter `weight`."""
        return self.value.to(weight.dtype)

    def set_trainable(self, trainable: bool) -> None:
        """Turns the gradient on or off."""
        self.value.requires_grad_(trainable)

    def extra_repr(self) -> str:
        """The shape that print(model) shows."""
        return f"shape={tuple(self.value.shape)}"


def select(model: nn.Module, globs: str | Sequence[str]) -> list[str]:
    """The keys of the parameters that `globs` pick, in the model's order.

    A glob picks a parameter by its name (`encoder.norm.weight`), or by that of a module that holds
    it (`encoder.norm`, `encoder`). A glob that is itself such a name, as `blocks[0]` may be, stands
    for that name alone. The word `bias` picks each parameter whose last name is `bias`.
    Adapters are left out. Works on a model on the meta device.

    Raises AdapterError for a glob that picks nothing, and for a parameter that cannot be trained
    beside its base.
    """
    check_globs("also_train", globs)
    globs = as_list(globs)
    parameters = {
        key: parameter
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if "lora" not in key.split(".")
    }
    names = dict.fromkeys(name for key in parameters for name in _names(key))
    picked: set[str] = set()
    for glob in globs:
        if glob == BIAS:
            matches = {key for key in parameters if key.rpartition(".")[2] == BIAS}
        else:
            matches = matching(glob, names)
        if not matches:
            near = ", ".join(difflib.get_close_matches(glob, names, n=3, cutoff=0.0))
            raise AdapterError(f"also_train: '{glob}' fits no parameter; nearest: {near}")
        picked |= matches
    keys = [key for key in parameters if not picked.isdisjoint(_names(key))]
    if errors := _reasons_not_trainable(model, {key: parameters[key] for key in keys}):
        raise AdapterError(f"also_train: {'; '.join(errors)}")
    return keys


def _names(key: str) -> list[str]:
    """The names that a glob may fit: of `a.b.weight`, they are `a`, `a.b` and `a.b.weight`."""
    return list(accumulate(key.split("."), "{}.{}".format))


def _reasons_not_trainable(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[str]:
    """Why some of these parameters cannot be trained beside their base."""
    in_memory = parameters_in_memory(model)
    reasons = []
    for key, parameter in parameters.items():
        layer = model.get_submodule(key.rpartition(".")[0])
        if nn.parameter.is_lazy(parameter):
            reasons.append(f"'{key}' has no shape before the model's first call")
            continue
        span = memory_span(parameter)
        others = [name for name in names_at(span, in_memory) if name != key]
        parts = names_of_parts(span, in_memory)
        if is_quantized(layer, key.rpartition(".")[2]):
            reasons.append(f"'{key}' is quantized, and cannot train: leave it to an adapter")
        elif not parameter.is_floating_point():
            reasons.append(f"'{key}' is of {parameter.dtype}, which takes no gradient")
        elif others or parts:
            reasons.append(
                f"'{key}' is tied to {', '.join(others + parts)}: each name's trained copy would "
                "change apart from the other, so name the other parameters by globs that leave it "
                "out, leave it to an adapter (target: tied=true), or untie it first"
            )
        elif isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            kind = type(layer).__name__  # a child `lora` would be one more of its modules
            reasons.append(f"'{key}' is held by a {kind}, a list of modules and no layer")
    return reasons
