"""Files of LyCORIS and kohya: LoRA and LoCon, LoHa and LoKr, each as factors of ΔW.

A file has tensors `<layer>.<part>`, as `lora_unet_mid_block_attn.lora_down.weight`. Each kind
has a form for convolutions (Tucker), in which a further tensor T (r, r, k…) holds the kernel.

- LoRA: ΔW = scale · up · down. With lora_mid, T: ΔW[o, i, k…] = scale · Σ up[o, p] T[p, q, k…]
  down[q, i].
- LoHa: ΔW = scale · (a₁ b₁) ∘ (a₂ b₂), entry by entry. Its rank is at most r²: with the products of
  each pair of columns of a₁ and a₂, and of each pair of rows of b₁ and b₂, it is one product.
- LoKr: ΔW = scale · w₁ ⊗ w₂, Kronecker's product, where w₁ and w₂ are each whole or a product a b.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora_lab.adapters.loha import hadamard_factors
from lora_lab.adapters.recipe import AdapterError

LORA = {"lora_up.weight", "lora_down.weight", "lora_mid.weight"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
OF_ALL = {"alpha", "dora_scale"}

NOT_READ = {
    "diff": "is a full difference, of no low rank; `--before A --after B` compares checkpoints",
    "diff_b": "is the difference of a bias, and no matrix",
    "w_norm": "is the difference of a norm's weight, and no matrix",
    "b_norm": "is the difference of a norm's bias, and no matrix",
    "oft_blocks": "turns W instead of adding to it",
    "oft_diag": "turns W instead of adding to it",
    "on_input": "scales W instead of adding to it",
    "lora_A.weight": "is of PEFT's format: give its folder, with the config that has the scale",
    "lora_B.weight": "is of PEFT's format: give its folder, with the config that has the scale",
}
"""Ends of keys that are known and not read → why."""


def read_lycoris(
    path: Path,
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, Tensor]]:
    """The fields of a `StoredUpdate` for each layer of a file, its metadata, and its tensors.

    Raises AdapterError where the file is damaged, or with each key that is not read and the reason.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"no tensors can be read from {path}: {error}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    errors: list[str] = []
    for key, tensor in tensors.items():
        layer, part = layer_and_part(key)
        if part is None:
            known = (why for end, why in NOT_READ.items() if key.endswith(f".{end}"))
            errors.append(f"{key} {next(known, 'is no part of LoRA, LoHa or LoKr')}")
        else:
            layers.setdefault(layer, {})[part] = tensor
    updates = {}
    for name, parts in layers.items():
        try:
            updates[name] = update_of_parts(parts)
        except (AdapterError, RuntimeError) as error:  # shapes that do not go together
            errors.append(f"{name}: {error}")
        except KeyError as error:
            errors.append(f"{name}: there is no {error.args[0]}, only {', '.join(parts)}")
    if errors:
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise AdapterError(f"{path} cannot be read: {'; '.join(errors[:5])}{more}")
    return updates, metadata, tensors


def layer_and_part(key: str) -> tuple[str, str | None]:
    """The layer's name in a key of a file, and the part that the tensor is; None for no known."""
    part = next((p for p in LORA | LOHA | LOKR | OF_ALL if key.endswith(f".{p}")), None)
    return key.removesuffix(f".{part}"), part


def update_of_parts(parts: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of one layer's `StoredUpdate`, from its tensors by the names of their parts.

    Products of 16-bit parts are computed in float32. Raises KeyError for a part that is missing,
    AdapterError where shapes do not fit.
    """
    update: dict[str, Any]
    if LOHA & parts.keys():
        update, r = _loha(parts)
    elif LOKR & parts.keys():
        update, r = _lokr(parts)
    else:
        up, down, mid = parts["lora_up.weight"], parts["lora_down.weight"], "lora_mid.weight"
        A = down.flatten(1) if mid not in parts else _tucker(parts[mid], down.flatten(1))
        kernel = tuple(parts.get(mid, down).shape[2:])
        update, r = {"A": A, "B": up.flatten(1), "kernel": kernel}, len(down)
    # Without alpha, or with 0, alpha is the rank. LoKr without factors has no rank and scale 1.
    alpha = parts["alpha"].item() if "alpha" in parts else 0
    update["scale"] = alpha / r if alpha and r else 1.0
    if update["A"].shape[0] != update["B"].shape[1]:
        raise AdapterError(
            f"B {tuple(update['B'].shape)} and A {tuple(update['A'].shape)} do not fit"
        )
    if (magnitude := parts.get("dora_scale")) is not None:
        out = len(update["B"]) * (len(update["outer"]) if "outer" in update else 1)
        if magnitude.shape[0] != out or magnitude.numel() != out:
            raise AdapterError(f"dora_scale {tuple(magnitude.shape)} is not over the {out} outputs")
        update["magnitude"] = magnitude.flatten()
    return update


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _tucker(T: Tensor, down: Tensor) -> Tensor:
    """A (r, in · k…) of a kernel T (r, r, k…) and the factor `down` (r, in)."""
    return torch.einsum("pq...,qi->pi...", _wide(T), _wide(down)).flatten(1)


def _loha(parts: dict[str, Tensor]) -> tuple[dict[str, Any], int]:
    """The factors of LoHa's ΔW, of rank up to r², and r. Without Tucker's T no kernel is known."""
    factors, kernel = [], None
    for i in (1, 2):
        a, b = _wide(parts[f"hada_w{i}_a"]), _wide(parts[f"hada_w{i}_b"])
        if f"hada_t{i}" in parts:  # a (r, out), b (r, in)
            factors.append((_tucker(parts[f"hada_t{i}"], b), a.T))
            kernel = tuple(parts[f"hada_t{i}"].shape[2:])
        else:  # a (out, r), b (r, in · k…)
            factors.append((b.flatten(1), a))
    (A1, B1), (A2, B2) = factors
    A, B = hadamard_factors(A1, B1, A2, B2)
    return {"A": A, "B": B, "kernel": kernel}, len(parts["hada_w1_b"])


def _lokr(parts: dict[str, Tensor]) -> tuple[dict[str, Any], int]:
    """LoKr's w₁ as `outer` and w₂ as factors, and the rank of those that are products, or 0."""
    r, kernel = 0, None
    if "lokr_w1" in parts:
        outer = parts["lokr_w1"]
    else:
        outer, r = _wide(parts["lokr_w1_a"]) @ _wide(parts["lokr_w1_b"]), len(parts["lokr_w1_b"])
    if "lokr_w2" in parts:  # (out₂, in₂, k…)
        B = parts["lokr_w2"].flatten(1)
        A, kernel = torch.eye(B.shape[1], dtype=B.dtype), tuple(parts["lokr_w2"].shape[2:])
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        r = len(b)
        has_kernel = "lokr_t2" in parts  # then a is (r, out₂), else (out₂, r)
        A, B = (_tucker(parts["lokr_t2"], b), a.T) if has_kernel else (b.flatten(1), a)
        kernel = tuple(parts["lokr_t2"].shape[2:]) if has_kernel else None
    return {"A": A, "B": B, "outer": outer, "kernel": kernel}, r
