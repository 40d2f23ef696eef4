"""Adapters on disk: tensors in safetensors, and how each adapter was built in a JSON file."""

import glob
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from lora_lab.adapters.adaptable import (
    adaptable_sites,
    placed_site,
    require_one_adapter_each,
)
from lora_lab.adapters.adapter import TENSOR_NAMES, Adapter
from lora_lab.adapters.finite import require_finite
from lora_lab.adapters.inject import place_adapters
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.relora import MERGED
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.slots import also_trained, merged_adapters, parameter_key, require_attached
from lora_lab.adapters.trained_in_full import FullParameter, select
from lora_lab.adapters.weight import WeightAdapter
from lora_lab.adapters.weights_hash import weights_hash
from lora_lab.runs import write_atomic

FORMAT = 2
"""The version of our folders that is written."""


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key or parameter name belongs to an adapter."""
    return "lora" in key.split(".")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the active adapter that train, by their state-dict keys.

    Tensors that do not train (LoRA-FA's A, the first values of PiSSA's factors) are left out, but
    for those that ReLoRA has merged. To load the result elsewhere, first call `attach` with the
    same arguments, which draws them again. `save` writes all tensors.
    """
    trained = {k for k, p in model.named_parameters() if p.requires_grad or k.endswith(MERGED)}
    state = model.state_dict().items()
    return {key: value for key, value in state if is_adapter_key(key) and key in trained}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without its adapters: the keys and values it had before them.

    While an adapter is merged the values are still the base's.
    """
    state = {key: value for key, value in model.state_dict().items() if not is_adapter_key(key)}
    for site, adapter in merged_adapters(model).items():
        key = parameter_key(site, adapter)
        weight = state[key].clone()
        part, before = weight, adapter.weight_before_merge
        if isinstance(adapter, Adapter):
            part = adapter.block_of(weight, adapter.rows)
        assert before is not None
        part.copy_(before)
        # The names that a tied weight also has
        merged = state[key]
        state |= {other: weight for other, value in state.items() if _is_same(value, merged)}
    return state


def _is_same(value: Any, weight: Tensor) -> bool:
    """Whether what a state dict holds, which may be sparse or no tensor, is this weight."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return is_dense and value.data_ptr() == weight.data_ptr()


def save(model: nn.Module, directory: str | Path, name: str | None = None) -> None:
    """Writes the adapter `name`, or the active one, as adapter.safetensors and adapter.json.

    Tensors are named by site (`fc1.A`), and those that are trained in full by their key in the base
    (`head.weight`). The JSON has the base's hash and how the adapter of each site was built. Raises
    AdapterError, and writes nothing, where there is no such adapter, or a change is not finite.
    """
    adapters, parameters = require_attached(model, name), also_trained(model, name)
    require_finite(model, {**adapters, **parameters})
    sites, tensors = describe(adapters)
    in_full = {key: p.value.detach() for key, p in parameters.items()}
    base = base_state_dict(model)
    description: dict[str, Any] = {"format": FORMAT, "base": weights_hash(base), "sites": sites}
    if in_full:
        description["rest_of_base"] = weights_hash(_without(base, in_full))
        description["also_trained"] = {
            key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for key, value in in_full.items()
        }
    write_folder(Path(directory), description, tensors | in_full)


def describe(
    adapters: Mapping[str, Adapter],
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """What adapter.json says of each site, and the tensors of all sites by name."""
    sites = {
        site: {
            **{"kind": a.kind, "shape": list(a.shape), "transposed": a.is_transposed},
            **{"scale": a.scale, **asdict(a.recipe)},
        }
        for site, a in adapters.items()
    }
    tensors = {
        f"{site}.{key}" if site else key: tensor.contiguous()
        for site, adapter in adapters.items()
        for key, tensor in adapter.tensors().items()
    }
    return sites, tensors


def write_folder(directory: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes adapter.safetensors, and adapter.json with the checksum of that file."""
    content = serialize(tensors, {"format": "lora_lab"})
    description = description | {"sha256": hashlib.sha256(content).hexdigest()}
    write_pair(directory, content, description, ("adapter.safetensors", "adapter.json"))


def write_pair(
    directory: Path, tensors: bytes, description: dict[str, Any], names: tuple[str, str]
) -> None:
    """Writes tensors and the JSON that describes them, under these two names in `directory`.

    The JSON is the last: until it is written, `directory` holds no adapter that could be read, or
    tensors that are not those of its older JSON, which is an error on reading.
    """
    text = json.dumps(description, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / names[0], tensors)
    write_atomic(directory / names[1], text)


def load(model: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Puts the adapter of `directory` on `model` under `name`, active, and freezes the rest.

    What trains in full takes its values from the files, so that the model's may be others: a new
    head, which each model draws for itself. Raises AdapterError, and changes nothing, where the
    files are missing, are not of one save, or do not fit: another base (by the hash of its other
    weights), a layer that does not exist, a wrong kind or shape, missing or unknown tensors.
    """
    description, tensors = read_folder(Path(directory))
    sites, in_full = description["sites"], description.get("also_trained", {})
    # Folders of earlier versions have no `rest_of_base`: all weights must be equal then.
    key = "rest_of_base" if "rest_of_base" in description else "base"
    compared = base_state_dict(model)
    if key == "rest_of_base":
        compared = _without(compared, tensors)  # those that train in full have the base's keys
    trained_on, model_hash = description[key], weights_hash(compared)
    if trained_on != model_hash:
        raise AdapterError(
            f"the adapter in {directory} belongs to another base: it was trained on weights "
            f"{trained_on[:12]}, this model's are {model_hash[:12]}"
        )
    errors: list[str] = []
    adapters: dict[Site, Adapter] = {}
    adaptable = adaptable_sites(model)
    for path, description in sites.items():
        prefix = f"{path}." if path else ""
        stored = {key: tensors.pop(prefix + key) for key in TENSOR_NAMES if prefix + key in tensors}
        try:
            site = placed_site(adaptable, path, description["kind"])
            adapters[site] = _build(model, site, description, stored)
        except (AdapterError, KeyError, TypeError) as error:
            errors.append(f"'{path}': {error}")
    also_trained, more_errors = _build_in_full(model, in_full, tensors)
    errors += more_errors
    if errors := [*errors, *(f"unknown tensor {key}" for key in tensors)]:
        raise AdapterError(f"the adapter in {directory} does not fit: {'; '.join(errors)}")
    require_one_adapter_each(adapters)
    place_adapters(model, adapters, name, also_trained)


def _build(
    model: nn.Module, site: Site, description: dict[str, Any], tensors: dict[str, Tensor]
) -> Adapter:
    """The adapter of a site, as the JSON describes it and with these tensors."""
    description = {"form": "lora", **description}  # folders of earlier versions have none
    recipe = Recipe(**{key: description[key] for key in Recipe.__dataclass_fields__})
    recipe.check()
    layer = model.get_submodule(site.layer)
    is_plain = site.kind == WeightAdapter.kind
    fitting_class = WeightAdapter if is_plain else adapter_class(layer, site.parameter)
    adapter = fitting_class(layer, site.parameter, site.rows, recipe)
    adapter.scale = description["scale"]  # stored, not computed again from alpha and r
    # A tensor read from a file may lie in memory at an address of another alignment, where kernels
    # sum in another order. A copy is aligned as any new tensor.
    device = adapter.weight_of(layer).device
    tensors = {key: tensor.to(device, copy=True) for key, tensor in tensors.items()}
    _check_fit(adapter, description, tensors)
    return adapter.fill(tensors)


def _build_in_full(
    model: nn.Module, descriptions: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, FullParameter], list[str]]:
    """What trains in full, with the values that it takes from `tensors`, and errors."""
    try:
        select(model, [glob.escape(key) for key in descriptions])
    except AdapterError as error:
        return {}, [str(error)]
    parameters: dict[str, FullParameter] = {}
    errors = []
    for key, description in descriptions.items():
        layer, _, name = key.rpartition(".")
        parameters[key] = parameter = FullParameter(model.get_submodule(layer), name)
        shape, value = list(parameter.value.shape), tensors.pop(key, None)
        if value is None:
            errors.append(f"there is no tensor {key}")
        elif not shape == list(value.shape) == description["shape"]:
            trained = f"{list(value.shape)}, described as {description['shape']}"
            errors.append(f"'{key}' has shape {shape}, the trained one {trained}")
        else:
            parameter.value.data.copy_(value)
    return parameters, errors


def base_hash(directory: str | Path) -> str:
    """The `weights_hash` of the base on which the adapter of `directory` was trained."""
    return _read_description(Path(directory))["base"]


def _without(state: dict[str, Tensor], keys: Collection[str]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


def _read_description(directory: Path) -> dict[str, Any]:
    """What adapter.json says. Raises AdapterError."""
    try:
        description = json.loads((directory / "adapter.json").read_text())
        _ = description["base"], description["sites"]
        return description
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"no adapter can be read from {directory}: {error}") from error


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter.json says, and the tensors. Raises AdapterError."""
    description, path = _read_description(directory), directory / "adapter.safetensors"
    try:
        tensors = load_file(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"no adapter can be read from {directory}: {error}") from error
    # Folders of earlier versions have no checksum.
    if description.get("sha256", sha256) != sha256:
        raise AdapterError(
            f"adapter.safetensors in {directory} has not the SHA-256 that adapter.json gives: it "
            "was changed, or one of the two is from another save; save again"
        )
    return description, tensors


def _check_fit(adapter: Adapter, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises AdapterError unless these tensors are this adapter's, by name and shape."""
    if (shape := list(adapter.shape)) != (stored := description["shape"]):
        raise AdapterError(f"has shape {shape}, the adapter's was {stored}")
    matrix = adapter.weight_to_matrix(torch.empty(adapter.shape, device="meta"))
    *experts, out, rest = matrix.shape
    r, recipe = adapter.r, adapter.recipe
    wanted = {"A": [*experts, r, rest], "B": [*experts, out, r]}
    if recipe.trains == "core":
        wanted["core"] = [*experts, r, r]
    elif "A0" in tensors or "B0" in tensors:
        wanted |= {"A0": wanted["A"], "B0": wanted["B"]}
    if adapter.form is not None:
        stored = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        of_form = adapter.form.stored_shapes(adapter.form_shapes(), stored)
        wanted = {key: [*shape] for key, shape in of_form.items()}
    if recipe.dora:
        wanted["magnitude"] = [out]
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    if shapes != wanted:
        raise AdapterError(f"tensors must be {wanted}, they are {shapes}")
