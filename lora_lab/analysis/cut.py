"""Adapters at lower ranks: each site's ΔW cut to its best approximation, written in its format.

The scale of a site stays, so that training can go on from the result as it would have from the
original. The factors share the singular values evenly: A = √S Vᵀ and B = U √S.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from lora_lab.adapters.rewrite import rewrite
from lora_lab.adapters.stored import StoredAdapter, StoredUpdate, experts_by_site
from lora_lab.analysis.directions import is_intruder
from lora_lab.analysis.leading_svd import first_triples, left_vectors
from lora_lab.analysis.spectra import INTRUDERS_AMONG, SVD, Spectrum
from lora_lab.analysis.stored_spectra import svd_of_update

RankRule = Callable[[str, Spectrum], int]
"""(site, spectrum of its ΔW without scale and magnitude) → the rank to which it is cut."""


@dataclass(frozen=True)
class CutSite:
    """One site's ΔW at its new rank, or as it was where its rank is not above that."""

    r: int
    """The rank of the factors before: 2r where ΔW is measured from A₀ and B₀, r² of LoHa."""
    k: int
    kept: float
    """The share of ‖B A‖²_F that is kept, DoRA's magnitude aside."""
    intruders: int = 0
    update: StoredUpdate | None = None
    """The new factors; None where they are the old ones."""
    stays: bool = False
    """Whether it is as it was because the cut saves nothing: see `rewrite`."""


def cut_update(site: str, update: StoredUpdate, rule: RankRule) -> CutSite:
    """ΔW of a site cut to the rank that `rule` says, or to its numerical rank if that is less."""
    # Without the scale, which the new factors have too.
    values, svd = svd_of_update(replace(update, scale=1.0))
    spectrum = Spectrum(values, update.shape, torch.finfo(torch.float32).eps)
    k = rule(update.experts_site or site, spectrum)
    if k >= update.r and update.outer is None:
        return CutSite(update.r, update.r, 1.0)
    k = max(1, min(k, spectrum.numerical_rank))
    total = spectrum.frobenius**2
    kept = values[:k].square().sum().item() / total if total else 1.0
    return CutSite(update.r, k, kept, update=_product(update, svd, k))


def _product(update: StoredUpdate, svd: SVD, k: int) -> StoredUpdate:
    """The first k triples of an update's B A as its factors."""
    A, B = balanced_factors(svd, k)
    if update.outer is None:
        # Where ΔW has a row or column of zeros, as for a padding token, rounding must not fill it.
        A = A.masked_fill((update.A == 0).all(0), 0)
        B = B.masked_fill((update.B == 0).all(1)[:, None], 0)
    return replace(update, A=A.to(update.A.dtype), B=B.to(update.B.dtype), outer=None)


def balanced_factors(svd: SVD, k: int) -> tuple[Tensor, Tensor]:
    """A (k, rest) and B (out, k) whose product is the matrix cut to rank k.

    Where a singular value is zero the column of B is, and the row of A is the unit vector: were
    both zero, no gradient would ever reach them.
    """
    root = svd.S[:k].sqrt()
    return torch.where(root > 0, root, 1)[:, None] * svd.Vh[:k], svd.U[:, :k] * root


def scale_intruders(site: str, update: StoredUpdate, W: Tensor, factor: float) -> CutSite:
    """ΔW of a site with the intruder dimensions of W + ΔW multiplied by `factor`.

    These are the singular triples of W + ΔW, of the first INTRUDERS_AMONG, whose left vector has no
    |cos| of 0.5 with one of W. W + ΔW becomes W + ΔW − (1 − factor) Σ σᵢuᵢvᵢᵀ over them, and what
    that is beyond W is cut to the site's rank (Shuttleworth et al. 2024; PEFT issue 2907, where the
    factor is called mitigation_lambda).
    """
    adapted, _ = first_triples(W.double() + update.product(), INTRUDERS_AMONG)
    adapted = adapted.first(INTRUDERS_AMONG)
    chosen = is_intruder(left_vectors(W), adapted.U) & (adapted.S > 0)
    if not chosen.any():
        return cut_update(site, update, lambda *_: update.r)
    if update.outer is not None:
        update = _product(update, svd_of_update(replace(update, scale=1.0))[1], update.r)
    change = (factor - 1) / update.scale * adapted.U[:, chosen] * adapted.S[chosen]
    A = torch.cat([update.A.double(), adapted.Vh[chosen]])
    B = torch.cat([update.B.double(), change], 1)
    values, svd = svd_of_update(replace(update, A=A, B=B, scale=1.0))
    new = _product(replace(update, A=A, B=B), svd, update.r)
    new = replace(new, A=new.A.to(update.A), B=new.B.to(update.B))
    kept = values[: update.r].square().sum() / values.square().sum()
    return CutSite(update.r, len(new.A), kept.item(), int(chosen.sum()), new)


def cut_adapter(
    stored: StoredAdapter, to: Path, cut: Callable[[str, StoredUpdate], CutSite]
) -> dict[str, CutSite]:
    """Writes a stored adapter to the folder `to`, with each site as `cut` gives it.

    What trains in full and DoRA's magnitudes stay. Returns the sites. The experts of one site have
    one rank, the largest that `cut` gives one of them; what is returned of them is the mean.
    """
    cuts = {name: cut(name, update) for name, update in stored.updates.items()}
    experts = experts_by_site(stored.updates)
    for names in experts.values():
        cuts |= _at_one_rank({name: (stored.updates[name], cuts[name]) for name in names})
    updates = {name: c.update for name, c in cuts.items() if c.update is not None}
    kept_as_they_are = rewrite(stored, updates, to)
    sites = {name: c for name, c in cuts.items() if not stored.updates[name].experts_site}
    for site in kept_as_they_are:
        sites[site] = replace(sites[site], k=sites[site].r, kept=1.0, update=None, stays=True)
    for site, names in experts.items():
        members = [cuts[name] for name in names]
        kept = fmean(member.kept for member in members)
        intruders = sum(member.intruders for member in members)
        sites[site] = replace(members[0], kept=kept, intruders=intruders)
    return sites


def _at_one_rank(experts: Mapping[str, tuple[StoredUpdate, CutSite]]) -> dict[str, CutSite]:
    """The cuts of one site's experts at the largest rank of them; where that is r, none is cut."""
    k = max(cut.k for _, cut in experts.values())
    if all(cut.update is None for _, cut in experts.values()):
        return {name: cut for name, (_, cut) in experts.items()}
    cuts = {}
    for name, (update, cut) in experts.items():
        new = update if cut.update is None else cut.update
        if len(new.A) < k and not cut.intruders:
            values, svd = svd_of_update(replace(update, scale=1.0))
            new = _product(update, svd, k)
            total = values.square().sum()
            cut = replace(cut, kept=(values[:k].square().sum() / total).item() if total else 1.0)
        cuts[name] = replace(cut, k=k, update=new)
    return cuts
