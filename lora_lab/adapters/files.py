"""Adapters on disk: the tensors in safetensors, and what they mean in a small JSON beside them."""

import glob
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab.adapters.adapter import TENSORS, Adapter, AdapterError, Recipe
from lora_lab.adapters.inject import place
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.slots import all_adapters, chosen, layer_path
from lora_lab.adapters.targets import Target, find_sites


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key or parameter name belongs to an adapter."""
    return "lora" in key.split(".")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What trains of the active adapter, under the model's own names.

    What it also needs and never moves (LoRA-FA's A, the start of PiSSA's factors) the same `attach`
    makes again; `save` writes it all.
    """
    own = {k for k, p in model.named_parameters() if is_adapter_key(k) and p.requires_grad}
    return {key: value for key, value in model.state_dict().items() if key in own}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors without its adapters: the keys and values it had before them.

    Values are the base's also while merged.
    """
    state = {key: value for key, value in model.state_dict().items() if not is_adapter_key(key)}
    merged = [(site, a) for (_, site), a in all_adapters(model).items() if a.kept is not None]
    for site, adapter in merged:
        key = ".".join(filter(None, [layer_path(site, adapter), adapter.parameter]))
        weight = state[key].clone()
        part = weight if adapter.rows is None else weight[slice(*adapter.rows)]
        part.copy_(adapter.kept)
        shared = state[key].data_ptr()
        state |= {other: weight for other, value in state.items() if value.data_ptr() == shared}
    return state


def weights_hash(state: dict[str, Tensor]) -> str:
    """The SHA-256 of a state dict: names, dtypes, shapes and every byte, in the names' order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(model: nn.Module, directory: str | Path, name: str | None = None) -> None:
    """Writes the adapter `name`, or the active one, as adapter.safetensors and adapter.json.

    Tensors are named by site (`fc1.A`); the JSON holds how each was made and the base's hash.
    """
    made = chosen(model, name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{site}.{key}" if site else key: tensor.contiguous()
        for site, adapter in made.items()
        for key, tensor in adapter.tensors().items()
    }
    sites = {
        site: {"kind": a.kind, "shape": list(a.shape), "scale": a.scale, **asdict(a.recipe)}
        for site, a in made.items()
    }
    description = {"format": 2, "base": weights_hash(base_state_dict(model)), "sites": sites}
    save_file(tensors, directory / "adapter.safetensors", {"format": "lora_lab"})
    (directory / "adapter.json").write_text(json.dumps(description, indent=2) + "\n")


def load(model: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Puts the adapter of `directory` on `model` under `name`, active, and freezes the rest.

    Raises AdapterError where the files are missing or do not fit: another base (by the hash of
    its weights), weights that are not there, a wrong kind or shape, missing or unknown tensors.
    """
    base, sites, tensors = _read(Path(directory))
    found = weights_hash(base_state_dict(model))
    if base != found:
        raise AdapterError(
            f"the adapter in {directory} belongs to another base: it was trained on weights "
            f"{base[:12]}, this model's are {found[:12]}"
        )
    wrong: list[str] = []
    made: dict[Site, Adapter] = {}
    for path, about in sites.items():
        prefix = f"{path}." if path else ""
        own = {key: tensors.pop(prefix + key) for key in TENSORS if prefix + key in tensors}
        try:
            (site,) = find_sites(model, {path: Target(about["kind"], glob.escape(path), tied=True)})
            recipe = Recipe(**{key: about[key] for key in Recipe.__dataclass_fields__})
            recipe.check()
            layer = model.get_submodule(site.layer)
            adapter = adapter_class(layer)(layer, site.parameter, site.rows, recipe)
            adapter.scale = about["scale"]  # stored, not derived again
            # A copy is aligned in memory as a tensor made here, and sums in the same order.
            device = adapter.weight_of(layer).device
            own = {key: tensor.to(device, copy=True) for key, tensor in own.items()}
            _check_fit(adapter, about, own)
            made[site] = adapter.fill(own)
        except (AdapterError, KeyError, TypeError) as error:
            wrong.append(f"'{path}': {error}")
    if wrong := [*wrong, *(f"unknown tensor {key}" for key in tensors)]:
        raise AdapterError(f"the adapter in {directory} does not fit: {'; '.join(wrong)}")
    place(model, made, name)


def base_hash(directory: str | Path) -> str:
    """The hash of the base that the adapter of `directory` was trained on."""
    return _read(Path(directory))[0]


def _read(directory: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The base's hash, what is said of each site, and the tensors."""
    try:
        description = json.loads((directory / "adapter.json").read_text())
        tensors = load_file(directory / "adapter.safetensors")
        return description["base"], description["sites"], tensors
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise AdapterError(f"no adapter can be read from {directory}: {error}") from error


def _check_fit(adapter: Adapter, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises AdapterError unless these tensors are this adapter's, by name and shape."""
    if list(adapter.shape) != about["shape"]:
        was = about["shape"]
        raise AdapterError(f"has shape {list(adapter.shape)}, the adapter's was {was}")
    out, rest = adapter.weight_to_matrix(torch.empty(adapter.shape, device="meta")).shape
    r, recipe = adapter.r, adapter.recipe
    wanted = {"A": [r, rest], "B": [out, r]}
    if recipe.trains == "core":
        wanted["core"] = [r, r]
    elif "A0" in tensors or "B0" in tensors:
        wanted |= {"A0": [r, rest], "B0": [out, r]}
    if recipe.dora:
        wanted["magnitude"] = [out]
    found = {key: list(tensor.shape) for key, tensor in tensors.items()}
    if found != wanted:
        raise AdapterError(f"tensors must be {wanted}, they are {found}")
