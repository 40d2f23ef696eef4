"""A stored adapter written again with other factors, in the format it has.

The scale of each site stays, and so does all else that its files hold: what trains in full, DoRA's
magnitudes, metadata. LoHa and LoKr become LoRA, since their factors have another form.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_lab.adapters.adapter import TENSOR_NAMES
from lora_lab.adapters.files import write_folder
from lora_lab.adapters.init import INITS
from lora_lab.adapters.lycoris import LOHA, LOKR, OF_ALL, layer_and_part
from lora_lab.adapters.peft_folder import (
    lora_config,
    ranks_and_alphas,
    serialize_sorted,
    split_by_layer,
    write_peft,
)
from lora_lab.adapters.peft_parameters import experts_to_peft, key_of_path
from lora_lab.adapters.peft_tensors import (
    EMBEDDING_TENSOR_KEYS,
    alpha_for_scale,
    factors_to_peft,
    peft_scaling,
    tensor_keys,
)
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.stored import StoredAdapter, StoredUpdate, experts_by_site
from lora_lab.runs import write_atomic

KOHYA_RANKS = {"ss_network_dim", "ss_network_alpha"}
"""Metadata of a kohya file that gives one rank and one alpha for all sites."""


def rewrite(stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path) -> list[str]:
    """Writes the adapter to the folder `to` with these factors by site; other sites stay.

    Returns the sites that stay although they have an update, since PEFT would take no fewer numbers
    for it. Of PEFT's LoKr each site must have an update. Updates of experts are by the names of
    their matrices: all of a site, or none.
    """
    updates = _stacked(stored, updates)
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


def _stacked(stored: StoredAdapter, updates: Mapping[str, StoredUpdate]) -> dict[str, StoredUpdate]:
    """The updates with those of experts as one for each site: A (E, r, in) and B (E, out, r)."""
    stacked: dict[str, StoredUpdate] = {}
    for site, members in experts_by_site(stored.updates).items():
        if new := [updates[name] for name in members if name in updates]:
            factors = [torch.stack([getattr(u, part) for u in new]) for part in ("A", "B")]
            stacked[site] = replace(new[0], A=factors[0], B=factors[1])
    return stacked | {name: u for name, u in updates.items() if not u.experts_site}


def _rewrite_ours(stored: StoredAdapter, updates: Mapping[str, StoredUpdate], to: Path) -> None:
    sites, tensors = dict(stored.about["sites"]), dict(stored.tensors)
    for site, update in updates.items():
        prefix = f"{site}." if site else ""
        for name in {*TENSOR_NAMES} - {"magnitude"}:
            tensors.pop(prefix + name, None)
        tensors |= {f"{prefix}A": update.A.contiguous(), f"{prefix}B": update.B.contiguous()}
        sites[site] = sites[site] | _recipe_of_product(sites[site], update.A.shape[-2])
    write_folder(to, stored.about | {"sites": sites}, tensors)


def _recipe_of_product(about: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What changes in a site's recipe where it is a plain product, of which both factors train."""
    alpha = alpha_for_scale(about["scale"], k, about["scaling"])
    recipe: dict[str, Any] = {"r": k, "alpha": alpha, "trains": "both", "form": "lora"}
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
    by_layer = split_by_layer(stored.tensors)[0]
    experts = experts_by_site(stored.updates)
    for path, named in by_layer.items():
        key = key_of_path(path, by_layer, config["target_parameters"])
        # The patterns of ranks have the name of the parameter, the updates that of the site.
        name, site = key or path, (key or path).removesuffix(".weight")
        if site in experts:
            old = stored.updates[experts[site][0]]
            ranks[name] = len(old.A)
            if (new := updates.get(site)) is not None:
                ranks[name] = new.A.shape[-2]
                for part, tensor in experts_to_peft(new.A, new.B).items():
                    tensors[f"{PREFIX}{path}.{tensor_keys('linear')[part]}"] = tensor.contiguous()
            alphas[name] = alpha_for_scale(old.scale, ranks[name], peft_scaling(config))
            continue
        keys = tensor_keys("embedding" if EMBEDDING_TENSOR_KEYS["A"] in named else "linear")
        old_A, old_B, old = named[keys["A"]], named[keys["B"]], stored.updates[site]
        groups, ranks[name] = len(old_A) // old_B.shape[1], len(old_A)
        if (new := updates.get(site)) is not None:
            rank = groups * len(new.A)
            if rank < len(old_A) or (rank == len(old_A) and len(new.A) == len(old.A)):
                parts = factors_to_peft(new.A, new.B, groups, tuple(old_A.shape[2:]))
                for part, tensor in parts.items():
                    tensors[f"{PREFIX}{path}.{keys[part]}"] = tensor.contiguous()
                ranks[name] = rank
            else:
                kept_as_they_are.append(site)
        alphas[name] = alpha_for_scale(old.scale, ranks[name], peft_scaling(config))
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
