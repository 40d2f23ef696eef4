"""The truncation curve: the validation loss with ΔW cut to each lower rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.progress import track

from lora_lab.analysis.spectra import SVD

RanksBySite = Mapping[str, int]
"""Site → the rank to which its ΔW is cut."""

CutLosses = Callable[[Mapping[str, SVD], Sequence[RanksBySite]], Iterable[float]]
"""(SVD of ΔW by site, cuts) → the validation loss of the model under each of the cuts."""


@dataclass(frozen=True)
class Curve:
    """The validation loss with ΔW cut to its best approximation of each of `ranks`, ascending."""

    ranks: list[int]
    losses: list[float]

    def least_rank(self, loss: float) -> int:
        """The least measured rank whose loss is at most `loss`; the largest where none is."""
        fit = (r for r, value in zip(self.ranks, self.losses, strict=True) if value <= loss)
        return next(fit, self.ranks[-1])


@dataclass(frozen=True)
class Truncation:
    """The curves of one run, and a way to measure further cuts.

    `model`: all sites cut to rank k at once. `sites`: one site cut to rank k, the others uncut.
    `loss`: the loss under any ranks by site, measured where it is not known yet.
    """

    model: Curve
    sites: dict[str, Curve]
    loss: Callable[[RanksBySite], float]


def ranks_to_measure(r: int) -> list[int]:
    """The ranks at which a curve up to r is measured: 0 … 32, then by factors of √2, and r."""
    wider = {round(32 * 2 ** (i / 2)) for i in range(1, 32)}
    return sorted(k for k in {*range(33), *wider, r} if k <= r)


def model_cuts(svds: Mapping[str, SVD], ranks: Sequence[int]) -> list[RanksBySite]:
    """The cuts of all sites at once to each of `ranks`, or to what a site's ΔW has."""
    return [{site: min(k, svd.k) for site, svd in svds.items()} for k in ranks]


def truncate(
    svds: Mapping[str, SVD], losses: CutLosses, scope: Literal["sites", "model"], console: Console
) -> Truncation:
    """Measures the curve of the model and, with scope `sites`, that of each site.

    `svds` holds the SVD of ΔW at each site. A progress bar is shown on a terminal.
    """
    full = {site: svd.k for site, svd in svds.items()}
    model_ranks = ranks_to_measure(max(full.values()))
    of_model = model_cuts(svds, model_ranks)
    cut_sites = full.items() if scope == "sites" else ()
    of_sites = {s: [{**full, s: k} for k in ranks_to_measure(n)] for s, n in cut_sites}
    # Curves share cuts (each ends uncut): {(4, 2): {"fc1": 4, "fc2": 2}, …} holds each cut once.
    # All cuts name the sites in one order.
    cuts = {tuple(cut.values()): cut for curve in (of_model, *of_sites.values()) for cut in curve}
    measuring, is_hidden = losses(svds, list(cuts.values())), not console.is_terminal
    measured = track(
        measuring, "truncation", len(cuts), console=console, transient=True, disable=is_hidden
    )
    known = dict(zip(cuts, measured, strict=True))

    def loss(ranks: RanksBySite) -> float:
        if (key := tuple(ranks.values())) not in known:
            (known[key],) = losses(svds, [ranks])
        return known[key]

    curves = {
        site: Curve([cut[site] for cut in curve], list(map(loss, curve)))
        for site, curve in of_sites.items()
    }
    return Truncation(Curve(model_ranks, list(map(loss, of_model))), curves, loss)
