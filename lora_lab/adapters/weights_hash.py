"""The hash of a model's weights, by which an adapter knows its base."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.quantized import stored_tensors


def weights_hash(state: Mapping[str, Any]) -> str:
    """The SHA-256 of a state dict: names, dtypes, shapes and all bytes, in the order of names.

    What is no tensor, as some modules give by `get_extra_state`, is left out. Values are read one
    at a time.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        if not isinstance(tensor := state[key], Tensor):
            continue
        parts = _dense_parts(tensor.detach().cpu())
        shape = [tuple(p.shape) for p in parts] if tensor.is_nested else tuple(tensor.shape)
        digest.update(f"{key} {tensor.dtype} {shape}\n".encode())
        for part in parts:
            flat = part.resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a sparse, nested or quantized tensor is made of, or itself."""
    if len(stored := stored_tensors(tensor)) > 1:
        return stored
    if tensor.is_nested:
        return [*tensor.unbind()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]
