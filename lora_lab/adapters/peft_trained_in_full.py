"""What trains in full, in PEFT's folders: `modules_to_save`, and the biases that `bias` names.

PEFT has two ways. For a Linear `fc` with LoRA, a LayerNorm `norm` and a Linear `head` without:

- modules_to_save=["head"]: all of the module is copied and trained. Its tensors are stored by their
  keys, `base_model.model.head.weight` and `.bias`, and buffers with them.
- bias="all" or "lora_only": the biases of all layers, or of those with LoRA, are trained in place,
  and stored as `base_model.model.norm.bias` or, with LoRA, `base_model.model.fc.base_layer.bias`.
"""

import difflib
import glob
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.trained_in_full import BIAS, FullParameter, select

PREFIX = "base_model.model."
"""What PEFT writes before each name of the model."""

COPY = r"\.modules_to_save\."

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT trains in full by itself, by task_type, if their names end so."""


@dataclass
class InFull:
    """What a folder holds of the parameters that train in full, and what it cannot hold."""

    modules: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def heads_of_task(names: Iterable[str], task_type: str | None) -> list[str]:
    """Those of `names`, modules of a model, that PEFT trains in full by itself for a task_type.

    A name below one of them counts too: `classifier.dense`.
    """
    heads = HEADS.get(task_type or "", ())
    return [name for name in names if any(part.endswith(heads) for part in name.split("."))]


def to_peft(
    model: nn.Module,
    base: Mapping[str, Tensor],
    also_trained: Mapping[str, FullParameter],
    adapted: Collection[str],
    task_type: str | None,
) -> InFull:
    """The tensors and the config of what trains in full.

    `base` is the base's state dict, `adapted` the names of the layers with LoRA.
    """
    names = [name for name, _ in model.named_modules() if name and "lora" not in name.split(".")]
    owners = {key.rpartition(".")[0] for key in also_trained if key.rpartition(".")[2] != BIAS}
    owners |= {name for name in names if name.endswith(HEADS.get(task_type or "", ()))}
    result = InFull(
        modules=[name for name in names if name in owners and not _within(name, owners)]
    )
    if "" in owners:
        shown = ", ".join(key for key in also_trained if "." not in key)
        result.errors.append(f"{shown}: of the model itself, and PEFT trains modules of a model")
    for name in result.modules:
        if inside := [layer for layer in adapted if layer == name or _within(layer, {name})]:
            result.errors.append(
                f"'{name}': PEFT trains all of this module in full, "
                f"and there is an adapter in it ({', '.join(inside)})"
            )
        for key, value in base.items():
            if key.startswith(f"{name}."):
                value = also_trained[key].value if key in also_trained else value
                result.tensors[PREFIX + key] = value.detach().clone().contiguous()
    # PEFT compares the end of a name. Where the name is also the end of another, as `fc` of
    # `block.fc`, only the name with the prefix is of one module.
    config_names = [
        PREFIX + name if any(other != name and other.endswith(name) for other in names) else name
        for name in result.modules
    ]
    for key, parameter in also_trained.items():
        layer, _, last = key.rpartition(".")
        if last == BIAS and layer not in owners and not _within(layer, owners):
            result.biases.append(key)
            path = [layer, "base_layer", BIAS] if layer in adapted else [layer, BIAS]
            result.tensors[PREFIX + ".".join(filter(None, path))] = parameter.value.detach().clone()
    of_lora = all(key.rpartition(".")[0] in adapted for key in result.biases)
    result.config = {
        "modules_to_save": config_names or None,
        "bias": ("lora_only" if of_lora else "all") if result.biases else "none",
    }
    return result


def _within(name: str, modules: Collection[str]) -> bool:
    """Whether one of `modules` holds the module or parameter of this name."""
    return any(name.startswith(f"{module}.") for module in modules if module)


def from_peft(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> tuple[dict[str, FullParameter], list[str]]:
    """The parameters that PEFT trained in full, by key, and an error for each tensor that misfits.

    `tensors` are those of a folder that are not LoRA's. PEFT may also store weights of the base:
    these must be this model's.
    """
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    trained: dict[str, Tensor] = {}
    errors: list[str] = []
    for key, tensor in tensors.items():
        name, of_original = _base_key(key, base)
        if name not in base:
            near = difflib.get_close_matches(name, base, n=1, cutoff=0.6)
            errors.append(f"unknown tensor {key}{f'; nearest: {near[0]}' if near else ''}")
        elif tensor.shape != base[name].shape:
            shapes = list(tensor.shape), list(base[name].shape)
            errors.append(f"{key} has shape {shapes[0]}, this model's '{name}' {shapes[1]}")
        elif not of_original and name in parameters and _trains_in_full(name, config):
            trained[name] = tensor
        elif not torch.equal(tensor.to(base[name]), base[name]):
            errors.append(f"{key} is not this model's '{name}': load that into the model first")
    try:
        select(model, [glob.escape(name) for name in trained])
    except AdapterError as error:
        return {}, [*errors, str(error).replace("also_train: ", "")]
    built: dict[str, FullParameter] = {}
    for name, tensor in trained.items():
        layer, _, last = name.rpartition(".")
        built[name] = FullParameter(model.get_submodule(layer), last)
        built[name].value.data.copy_(tensor)
    return built, errors


def _base_key(key: str, base: Collection[str]) -> tuple[str, bool]:
    """The base's key of a tensor, and whether the tensor is of the copy that does not train.

    With bias="all" PEFT also writes the biases of both copies of a module that it saves:
    `pooler.original_module.dense.bias` and `pooler.modules_to_save.default.dense.bias`, where the
    adapter's name is left out if it stands before the last word.
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    of_original = ".original_module." in name
    name = name.replace(".original_module.", ".")
    short, long = (re.sub(copy, ".", name) for copy in (COPY, rf"{COPY}[^.]+\."))
    return short if short in base else long, of_original


def _trains_in_full(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT trains the parameter `name` in full, by the config of a folder."""
    if config["bias"] != "none" and name.rpartition(".")[2] == BIAS:
        return True
    ends = [*(config["modules_to_save"] or ()), *HEADS.get(config["task_type"] or "", ())]
    path = (PREFIX + name).split(".")
    modules = [".".join(path[:depth]) for depth in range(1, len(path))]
    return any(module.endswith(end) for module in modules for end in ends)
