"""Adapters on disk: the factors in safetensors, and what they mean in a small JSON beside them."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab.adapters.adapter import is_adapter_key
from lora_lab.adapters.inject import KINDS, AdapterError, attached, kind_of, place


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, under the model's own names."""
    return {key: value for key, value in model.state_dict().items() if is_adapter_key(key)}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors without its adapters: the keys and values it had before them.

    Values are the base's also while merged.
    """
    state = {key: value for key, value in model.state_dict().items() if not is_adapter_key(key)}
    for name, adapter in attached(model).items():
        if adapter.kept is not None:
            state[f"{name}.weight" if name else "weight"] = adapter.kept
    return state


def weights_hash(state: dict[str, Tensor]) -> str:
    """The SHA-256 of a state dict: names, dtypes, shapes and every byte, in the names' order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(model: nn.Module, directory: str | Path) -> None:
    """Writes adapter.safetensors and adapter.json: only what trains, and the base it belongs to."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sites = {
        name: {
            "kind": kind_of(model.get_submodule(name)),
            "shape": list(adapter.shape),
            "r": adapter.r,
            "alpha": adapter.alpha,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "init": adapter.init,
        }
        for name, adapter in attached(model).items()
    }
    save_file(
        {k: v.contiguous() for k, v in adapter_state_dict(model).items()},
        directory / "adapter.safetensors",
    )
    description = {"format": 1, "base": weights_hash(base_state_dict(model)), "sites": sites}
    (directory / "adapter.json").write_text(json.dumps(description, indent=2) + "\n")


def load(model: nn.Module, directory: str | Path) -> None:
    """Puts the adapters of `directory` on `model`, and freezes the rest.

    Raises AdapterError where the files are missing or do not fit: another base (by the hash of
    its weights), layers that are not there, a wrong kind or shape, missing or unknown tensors.
    """
    directory = Path(directory)
    try:
        description = json.loads((directory / "adapter.json").read_text())
        tensors = load_file(directory / "adapter.safetensors")
        base, sites = description["base"], description["sites"]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise AdapterError(f"no adapter can be read from {directory}: {error}") from error
    found = weights_hash(base_state_dict(model))
    if base != found:
        raise AdapterError(
            f"the adapter in {directory} belongs to another base: it was trained on weights "
            f"{base[:12]}, this model's are {found[:12]}"
        )
    layers, wrong, made = dict(model.named_modules()), [], {}
    for name, site in sites.items():
        if name not in layers or kind_of(layers[name]) != site["kind"]:
            wrong.append(f"'{name}' is no {site['kind']} layer of this model")
            continue
        Kind = KINDS[site["kind"]]
        shape = Kind.weight_of(layers[name]).shape
        prefix = f"{name}.lora." if name else "lora."
        A, B = tensors.pop(f"{prefix}A", None), tensors.pop(f"{prefix}B", None)
        if list(shape) != site["shape"]:
            wrong.append(f"'{name}' has shape {list(shape)}, the adapter's was {site['shape']}")
        elif A is None or B is None:
            wrong.append(f"no tensors {prefix}A and {prefix}B")
        elif (A.shape, B.shape) != ((site["r"], shape[1:].numel()), (shape[0], site["r"])):
            wrong.append(f"{prefix}A {list(A.shape)} and B {list(B.shape)} do not fit '{name}'")
        else:
            how = {key: site[key] for key in ("alpha", "scale", "dropout", "init")}
            made[name] = Kind(layers[name], A, B, **how)
    if wrong := [*wrong, *(f"unknown tensor {key}" for key in tensors)]:
        raise AdapterError(f"the adapter in {directory} does not fit: {'; '.join(wrong)}")
    place(model, made)
