"""PEFT's target_parameters: adapters on parameters, as on the experts of a mixture.

PEFT wraps a module once for each of its parameters that are adapted, in the module's order, so that
the last one's wrapper is the outermost. Of `experts` with gate_up_proj (E, 2i, h) and down_proj
(E, h, i) these are the tensors:

- `experts.base_layer.lora_A.weight`, of gate_up_proj: (E · r, h), one expert's A after the other
- `experts.base_layer.lora_B.weight`: (2i, r · E), the first column of each expert's B, then the
  second of each
- `experts.lora_A.weight` and `experts.lora_B.weight`, of down_proj
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.sites import candidate_sites
from lora_lab.adapters.slots import layer_of, parameter_key

RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last names of layers that PEFT takes for experts where its target_modules name them.

It does in mixtures of most kinds, as transformers 4 held experts as layers of these names. So it
would adapt the experts and not the dense MLP of DeepSeek-V3's first block, nor its shared experts.
"""


def held_as_parameters(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Site → the key of its parameter, of those that PEFT is to adapt as parameters."""
    is_mixture = holds_experts(model)
    return {
        site: parameter_key(site, adapter)
        for site, adapter in adapters.items()
        if is_held_as_parameter(layer_of(model, site, adapter), site, adapter.kind, is_mixture)
    }


def is_held_as_parameter(layer: nn.Module, site: str, kind: str, is_mixture: bool) -> bool:
    """Whether PEFT is to adapt a site as a parameter.

    These are experts and routers, and in a mixture also linear layers that PEFT would rename.
    """
    of_router = kind == "weight" and is_router(layer)
    return kind == "experts" or of_router or (is_mixture and kind == "linear" and is_renamed(site))


LAST_OF_EXPERTS = "down_proj"
"""The parameter of experts that comes last in transformers' modules: its wrapper is outside."""


def holds_experts(model: nn.Module) -> bool:
    """Whether a model has experts that are held as one parameter."""
    return any(site.kind == "experts" for site in candidate_sites(model))


def is_renamed(layer: str) -> bool:
    """Whether PEFT takes the layer for an expert in a mixture, by its name."""
    return layer.rpartition(".")[2] in RENAMED


def targeted(model: nn.Module, target_parameters: Iterable[str]) -> list[str]:
    """The keys of the parameters that PEFT's target_parameters pick: by name, or by its end."""
    keys = [key for key, _ in model.named_parameters() if "lora" not in key.split(".")]
    names = tuple(target_parameters)
    ends = tuple(f".{name}" for name in names)
    return [key for key in keys if key in names or key.endswith(ends)]


def paths_of_tensors(model: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """Key of a parameter that PEFT adapts → what stands before `lora_A` in its tensors' keys."""
    paths = {}
    for layer, module in model.named_modules():
        names = [name for name in module._parameters if f"{layer}.{name}" in keys]
        for outer, name in enumerate(reversed(names)):
            paths[f"{layer}.{name}"] = layer + ".base_layer" * outer
    return paths


def key_of_path(path: str, paths: Collection[str], target_parameters: Iterable[str]) -> str | None:
    """The key of the parameter whose tensors are stored as `path`, one of `paths`, without a model.

    None where `path` is a layer's, which no name of target_parameters picks. Of a module with
    several parameters only the names tell which comes first in it: transformers has down_proj last.
    Raises AdapterError where they do not tell.
    """
    layer = path.removesuffix(".base_layer")
    while layer.endswith(".base_layer"):
        layer = layer.removesuffix(".base_layer")
    names = {
        target.rpartition(".")[2]
        for target in target_parameters
        if f".{layer}.{target.rpartition('.')[2]}".endswith(f".{target}")
    }
    if not names:
        return None
    of_layer = sorted(p for p in paths if re.fullmatch(rf"{re.escape(layer)}(\.base_layer)*", p))
    inner_last = sorted(names - {LAST_OF_EXPERTS}), [LAST_OF_EXPERTS] * (LAST_OF_EXPERTS in names)
    if len(names) != len(of_layer) or len(inner_last[0]) > 1:
        shown = ", ".join(sorted(names))
        raise AdapterError(f"which of {shown} the tensors of '{path}' are of, only the model tells")
    return f"{layer}.{[*inner_last[1], *inner_last[0]][of_layer.index(path)]}"


def is_router(layer: nn.Module) -> bool:
    """Whether a layer chooses experts, so that it alone reads its weight, when it is called."""
    return type(layer).__name__.endswith(("Router", "Gate", "Gating"))


def reason_no_parameter(layer: nn.Module, kind: str, dora: bool) -> str | None:
    """Why PEFT cannot adapt this weight as a parameter; None where it can."""
    if dora:
        return "PEFT has no DoRA for target_parameters, as which it is held"
    if kind == "weight" and not is_router(layer):
        return f"PEFT cannot adapt this weight of {type(layer).__name__} wherever it is read"
    if kind not in ("experts", "weight", "linear") or TransposedLinearAdapter.fits(layer):
        return f"a weight of {type(layer).__name__} among PEFT's target_parameters is not read"
    return None


def experts_to_peft(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (E, r, in) and B (E, out, r) in PEFT's shapes: (E · r, in) and (out, r · E)."""
    return {"A": A.flatten(0, 1), "B": B.permute(1, 2, 0).flatten(1)}


def experts_from_peft(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of `experts_to_peft`."""
    stacked = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return stacked[0], stacked[1].contiguous(memory_format=torch.contiguous_format)
