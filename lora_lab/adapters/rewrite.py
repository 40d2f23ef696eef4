"""A stored adapter written again with other factors, in the format it has.

The scale of each site stays, and so does all else that its files hold: what trains in full, DoRA's
magnitudes, metadata. LoHa and LoKr become LoRA, since their factors have another form.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_lab.adapters.files import write_folder
from lora_lab.adapters.init import INITS
from lora_lab.adapters.lycoris import LOHA, LOKR, OF_ALL, layer_and_part
from lora_lab.adapters.peft import (
    lora_config,
    ranks_and_alphas,
    serialize_sorted,
    split_by_layer,
    write_peft,
)
from lora_lab.adapters.peft_tensors import (
    EMBEDDING_TENSOR_KEYS,
    alpha_for_scale,
    factors_to_peft,
    peft_scaling,
    tensor_keys,
)
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.stored import StoredAdapter, StoredUpdate
from lora_lab.runs import write_atomic

KOHYA_RANKS = {"ss_network_dim", "ss_network_alpha"}
"""Metadata of a kohya file that gives one rank and one alpha for all sites."""


def rewrite(stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path) -> list[str]:
    """Writes the adapter to the folder `to` with these factors by site; other sites stay.

    Returns the sites that stay although they have an update, since PEFT would take no fewer numbers
    for it. Of PEFT's LoKr each site must have an update.
    """
    match stored.format:
        case "lora_lab":
            _rewrite_ours(stored, updates, to)
        case "kohya":
            _rewrite_kohya(stored, updates, to)
        case "peft" if stored.about["peft_type"] == "LORA":
            return _rewrite_peft(stored, updates, to)
        case "peft":
            _lora_of_peft_lycoris(stored, updates, to)
    return []


def _rewrite_ours(stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path) -> None:
    sites, tensors = dict(stored.about["sites"]), dict(stored.tensors)
    for site, update in updates.items():
        prefix = f"{site}." if site else ""
        for name in ("core", "A0", "B0"):
            tensors.pop(prefix + name, None)
        tensors |= {f"{prefix}A": update.A.contiguous(), f"{prefix}B": update.B.contiguous()}
        sites[site] = sites[site] | _recipe_of_product(sites[site], len(update.A))
    write_folder(to, stored.about | {"sites": sites}, tensors)


def _recipe_of_product(about: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What changes in a site's recipe where it is a plain product, of which both factors train."""
    alpha = alpha_for_scale(about["scale"], k, about["scaling"])
    recipe: dict[str, Any] = {"r": k, "alpha": alpha, "trains": "both"}
    if INITS[about["init"]].starts_nonzero:
        recipe["init"] = "kaiming"
    return recipe


# In PEFT a grouped convolution's A is block diagonal, with a block for each group. With 2 groups
# and r = 4 it has 2 rows for each group. Where these differ from group to group, ΔW as a matrix has
# rank 4, and its cut to k = 3 takes 3 rows for each group: 6, more than there were.
def _rewrite_peft(
    stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path
) -> list[str]:
    tensors, config = dict(stored.tensors), stored.about
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    kept_as_they_are: list[str] = []
    for site, named in split_by_layer(stored.tensors)[0].items():
        keys = tensor_keys("embedding" if EMBEDDING_TENSOR_KEYS["A"] in named else "linear")
        old_A, old_B, old = named[keys["A"]], named[keys["B"]], stored.updates[site]
        groups, ranks[site] = len(old_A) // old_B.shape[1], len(old_A)
        if (new := updates.get(site)) is not None:
            rank = groups * len(new.A)
            if rank < len(old_A) or (rank == len(old_A) and len(new.A) == len(old.A)):
                parts = factors_to_peft(new.A, new.B, groups, tuple(old_A.shape[2:]))
                for name, tensor in parts.items():
                    tensors[f"{PREFIX}{site}.{keys[name]}"] = tensor.contiguous()
                ranks[site] = rank
            else:
                kept_as_they_are.append(site)
        alphas[site] = alpha_for_scale(old.scale, ranks[site], peft_scaling(config))
    write_peft(to, config | ranks_and_alphas(ranks, alphas), tensors)
    return kept_as_they_are


def _lora_of_peft_lycoris(
    stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path
) -> None:
    """Writes PEFT's LoRA in the place of its LoHa or LoKr; a LoHa that stays is one of rank r²."""
    updates = {**stored.updates, **updates}
    tensors, dtypes = dict(stored.tensors), {}
    for key in stored.tensors:
        site, _, part = key.removeprefix(PREFIX).rpartition(".")
        if part in LOHA | LOKR:
            dtypes[site] = tensors.pop(key).dtype
    ranks = {site: len(update.A) for site, update in updates.items()}
    alphas = {site: alpha_for_scale(u.scale, ranks[site], "alpha/r") for site, u in updates.items()}
    for site, update in updates.items():
        for name, tensor in factors_to_peft(update.A, update.B, 1, update.kernel or ()).items():
            key = f"{PREFIX}{site}.{tensor_keys('linear')[name]}"
            tensors[key] = tensor.to(dtypes[site]).contiguous()
    same = ("modules_to_save", "base_model_name_or_path", "revision", "task_type", "auto_mapping")
    settings = {key: stored.about[key] for key in same if key in stored.about}
    write_peft(to, lora_config(ranks, alphas, **settings), tensors)


def _rewrite_kohya(stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path) -> None:
    tensors, dtypes = dict(stored.tensors), {}
    for key in stored.tensors:
        site, part = layer_and_part(key)
        if site in updates and part not in OF_ALL:
            dtypes[site] = tensors.pop(key).dtype
    for site, update in updates.items():
        parts = factors_to_peft(update.A, update.B, 1, update.kernel or ())
        tensors[f"{site}.lora_down.weight"] = parts["A"].to(dtypes[site]).contiguous()
        tensors[f"{site}.lora_up.weight"] = parts["B"].to(dtypes[site]).contiguous()
        alpha = alpha_for_scale(update.scale, len(update.A), "alpha/r")
        tensors[f"{site}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    # kohya's own tools write this word where ranks differ from site to site.
    metadata = stored.about | dict.fromkeys(KOHYA_RANKS & stored.about.keys(), "Dynamic")
    to.mkdir(parents=True, exist_ok=True)
    write_atomic(to / stored.path.name, serialize_sorted(tensors, metadata))
