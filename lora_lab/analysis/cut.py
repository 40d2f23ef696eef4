"""Adapters at lower ranks: each site's ΔW cut to its best approximation, written in its format.

The scale of a site stays, so that training can go on from the result as it would have from the
original. The factors share the singular values evenly: A = √S Vᵀ and B = U √S.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lora_lab.adapters import INITS
from lora_lab.adapters.files import read_folder, write_pair
from lora_lab.adapters.peft import ranks_and_alphas, read_peft, split_by_layer, write_peft
from lora_lab.adapters.peft_tensors import (
    EMBEDDING_TENSOR_KEYS,
    alpha_for_scale,
    factors_to_peft,
    rank_and_scale,
    tensor_keys,
)
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.stored import StoredUpdate, read_updates
from lora_lab.analysis.leading_svd import first_triples, left_vectors
from lora_lab.analysis.spectra import SVD, Spectrum, svd_of_factors
from lora_lab.analysis.stored_spectra import INTRUDERS_AMONG

RankRule = Callable[[str, Spectrum], int]
"""(site, spectrum of its B A) → the rank to which it is cut."""


@dataclass(frozen=True)
class CutSite:
    """One site's ΔW at its new rank, or as it was where its rank is not above that."""

    r: int
    """The rank of the factors before: 2r where ΔW is measured from A₀ and B₀."""
    k: int
    kept: float
    """The share of ‖B A‖²_F that is kept, DoRA's magnitude aside."""
    intruders: int = 0
    update: StoredUpdate | None = None
    """The new factors; None where they are the old ones."""


def cut_update(site: str, update: StoredUpdate, rule: RankRule) -> CutSite:
    """ΔW of a site cut to the rank that `rule` says."""
    # Without the scale, which the new factors have too.
    svd = svd_of_factors(update.A, update.B)
    spectrum = Spectrum(svd.S, update.shape, torch.finfo(torch.float32).eps)
    k = max(1, rule(site, spectrum))
    if k >= len(update.A):
        return CutSite(len(update.A), len(update.A), 1.0)
    A, B = balanced_factors(svd, k)
    # Where ΔW has a row or column of zeros, as for a padding token, rounding must not fill it.
    A = A.masked_fill((update.A == 0).all(0), 0)
    B = B.masked_fill((update.B == 0).all(1)[:, None], 0)
    cut = replace(update, A=A.to(update.A.dtype), B=B.to(update.B.dtype))
    total = spectrum.frobenius**2
    kept = svd.S[:k].square().sum().item() / total if total else 1.0
    return CutSite(len(update.A), k, kept, update=cut)


def balanced_factors(svd: SVD, k: int) -> tuple[Tensor, Tensor]:
    """A (k, rest) and B (out, k) whose product is the matrix cut to rank k."""
    root = svd.S[:k].sqrt()
    return root[:, None] * svd.Vh[:k], svd.U[:, :k] * root


def scale_intruders(site: str, update: StoredUpdate, W: Tensor, factor: float) -> CutSite:
    """ΔW of a site with the intruder dimensions of W + ΔW multiplied by `factor`.

    These are the singular triples of W + ΔW, of the first INTRUDERS_AMONG, whose left vector has no
    |cos| of 0.5 with one of W. W + ΔW becomes W + ΔW − (1 − factor) Σ σᵢuᵢvᵢᵀ over them, and what
    that is beyond W is cut to the site's rank (Shuttleworth et al. 2024; PEFT issue 2907, where the
    factor is called mitigation_lambda).
    """
    adapted, _ = first_triples(W.double() + update.product(), INTRUDERS_AMONG)
    adapted = adapted.first(INTRUDERS_AMONG)
    cosines = (left_vectors(W).T @ adapted.U).abs()  # (directions of W, 10)
    chosen = (cosines < 0.5).all(0) & (adapted.S > 0)
    if not chosen.any():
        return CutSite(len(update.A), len(update.A), 1.0)
    change = (factor - 1) / update.scale * adapted.U[:, chosen] * adapted.S[chosen]
    A = torch.cat([update.A.double(), adapted.Vh[chosen]])
    B = torch.cat([update.B.double(), change], 1)
    cut = cut_update(site, replace(update, A=A, B=B), lambda *_: len(update.A))
    assert cut.update is not None
    new = replace(cut.update, A=cut.update.A.to(update.A), B=cut.update.B.to(update.B))
    return CutSite(len(update.A), cut.k, cut.kept, int(chosen.sum()), new)


def cut_folder(
    directory: Path, to: Path, cut: Callable[[str, StoredUpdate], CutSite]
) -> dict[str, CutSite]:
    """Writes the adapter of a PEFT folder, or of one of ours, with each site as `cut` gives it.

    What trains in full and DoRA's magnitudes stay. Returns the sites. Raises AdapterError where the
    folder cannot be read.
    """
    sites = {site: cut(site, update) for site, update in read_updates(directory).items()}
    write = _write_ours if (directory / "adapter.json").is_file() else _write_peft
    cuts = {site: c.update for site, c in sites.items() if c.update is not None}
    unchanged = write(directory, to, cuts)
    return sites | {site: CutSite(sites[site].r, sites[site].r, 1.0) for site in unchanged}


def _write_peft(directory: Path, to: Path, cuts: Mapping[str, StoredUpdate]) -> list[str]:
    """Writes PEFT's folder, and returns the sites that stay as they were though they have a cut.

    In a grouped convolution PEFT has a rank for each group, so that the rank of the cut is
    multiplied by the groups: where that saves nothing, the site stays.
    """
    config, tensors = read_peft(directory)
    by_layer, _ = split_by_layer(tensors)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    unchanged: list[str] = []
    for site, named in by_layer.items():
        keys = tensor_keys("embedding" if EMBEDDING_TENSOR_KEYS["A"] in named else "linear")
        old_A, old_B = named[keys["A"]], named[keys["B"]]
        ranks[site], scale = rank_and_scale(config, site)
        if (update := cuts.get(site)) is not None:
            groups, kernel = len(old_A) // old_B.shape[1], tuple(old_A.shape[2:])
            if groups * len(update.A) > len(old_A) or (groups > 1 and len(update.A) == len(old_A)):
                unchanged.append(site)
            else:
                parts = factors_to_peft(update.A, update.B, groups, kernel)
                ranks[site] = len(parts["A"])
                for name, tensor in parts.items():
                    tensors[f"{PREFIX}{site}.{keys[name]}"] = tensor.contiguous()
        alphas[site] = alpha_for_scale(scale, ranks[site], config["use_rslora"])
    write_peft(to, config | ranks_and_alphas(ranks, alphas), tensors)
    return unchanged


def _write_ours(directory: Path, to: Path, cuts: Mapping[str, StoredUpdate]) -> list[str]:
    """Writes our folder, in which each cut has its place."""
    description, tensors = read_folder(directory)
    for site, update in cuts.items():
        about, prefix = description["sites"][site], f"{site}." if site else ""
        for name in ("core", "A0", "B0"):
            tensors.pop(prefix + name, None)
        tensors |= {f"{prefix}A": update.A.contiguous(), f"{prefix}B": update.B.contiguous()}
        description["sites"][site] = about | _recipe_of_cut(about, len(update.A))
    content = serialize(tensors, {"format": "lora_lab"})
    description["sha256"] = hashlib.sha256(content).hexdigest()
    write_pair(to, content, description, ("adapter.safetensors", "adapter.json"))
    return []


def _recipe_of_cut(about: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What changes in a site's recipe: it is a plain product now, of which both factors train."""
    recipe: dict[str, Any] = {"r": k, "trains": "both"}
    if about["scaling"] != "alpha":
        is_sqrt = about["scaling"] == "alpha/sqrt(r)"
        recipe["alpha"] = alpha_for_scale(about["scale"], k, is_sqrt)
    if INITS[about["init"]].from_weight:
        recipe["init"] = "kaiming"
    return recipe
