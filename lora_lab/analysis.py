"""What a finished update is worth: rank by rank, and against the base it changed."""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import track

from lora_lab import bases, spectra
from lora_lab.config import Spectra
from lora_lab.runs import write_atomic
from lora_lab.spectra import SVD
from lora_lab.updates import Updates

TRIPLES = 64
"""Singular triples of every site that spectra.npz keeps, at most."""

INTRUDERS_AMONG = 10
"""Left singular vectors of W + ΔW that are asked whether W has their like."""


@dataclass(frozen=True)
class Curve:
    """The validation loss with ΔW cut to its best approximation of each of `ranks`."""

    ranks: list[int]
    losses: list[float]

    def least(self, loss: float) -> int:
        """The least rank that gives no more than `loss`."""
        fit = (r for r, value in zip(self.ranks, self.losses, strict=True) if value <= loss)
        return next(fit, self.ranks[-1])


@dataclass(frozen=True)
class Advice:
    """The least ranks by site that keep a share of what adaptation gained."""

    ranks: dict[str, int]
    loss: float
    uncut: float
    before: float

    @property
    def share(self) -> float:
        """How much of the gain is kept with ΔW cut to these ranks."""
        return (self.before - self.loss) / (self.before - self.uncut)

    @property
    def overrides(self) -> str:
        """The ranks as `lora-lab train` takes them."""
        r = max(self.ranks.values())
        lower = ",".join(f"{site}:{k}" for site, k in self.ranks.items() if k < r)
        return f"adapter.r={r}" + (f" 'adapter.rank_pattern={{{lower}}}'" if lower else "")


@dataclass
class Findings:
    """What an analysis found: numbers by metric, arrays for spectra.npz, and the advice."""

    metrics: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    advice: Advice | None = None


def analyze(
    updates: Updates, loss: Callable[[], float], cfg: Spectra, bases_dir: str, console: Console
) -> Findings:
    """Everything there is to say of a trained model's ΔW. `loss` is the validation loss right now.

    Singular triples always; the truncation curve and the advice, the comparison with the base as
    `cfg` asks for them.
    """
    found = {site: updates.svd(site) for site in updates.sites}
    said = Findings()
    for site, svd in found.items():
        kept = svd.first(TRIPLES)
        for name, tensor in (("U", kept.U), ("S", kept.S), ("Vh", kept.Vh)):
            said.arrays[f"{site}/{name}"] = tensor.cpu().float().numpy()
    if cfg.against_base:
        for site, svd in found.items():
            _against(updates, site, svd, Path(bases_dir), said)
    if cfg.truncation != "none":
        _truncate(updates, found, loss, cfg, console, said)
    return said


def _against(updates: Updates, site: str, svd: SVD, directory: Path, said: Findings) -> None:
    """How ΔW's directions lie to W's (Hu et al. 2021, section 7.3), and which are new."""
    W = updates.before(site).to(svd.S)
    base = bases.decomposed(W, directory)
    rank = int((svd.S[0] * max(W.shape) * torch.finfo(torch.float32).eps < svd.S).sum())
    seen = svd.first(rank)
    metrics = {"projection": spectra.projection(W, seen)}
    metrics["amplification"] = spectra.amplification(W, seen)
    after = spectra.svd_of_matrix(W + svd.cut(len(svd.S))).first(INTRUDERS_AMONG)
    metrics["intruders"] = float(spectra.intruders(base.U, after.U))
    said.metrics |= {f"spectra/{site}/{k}": v for k, v in metrics.items() if np.isfinite(v)}
    if rank:
        phi = spectra.similarity(seen.first(TRIPLES).U, base.first(TRIPLES).U)
        said.arrays[f"{site}/phi_base"] = phi.cpu().float().numpy()


def steps(r: int) -> list[int]:
    """The ranks that a curve is measured at: 0 … 8, then by factors of √2, and r."""
    wider = {round(8 * 2 ** (i / 2)) for i in range(1, 32)}
    return sorted(k for k in {*range(9), *wider, r} if k <= r)


def _truncate(
    updates: Updates,
    found: Mapping[str, SVD],
    loss: Callable[[], float],
    cfg: Spectra,
    console: Console,
    said: Findings,
) -> None:
    whole = {site: len(svd.S) for site, svd in found.items()}
    known: dict[tuple[int, ...], float] = {}

    def cut(ranks: dict[str, int]) -> float:
        if (key := tuple(ranks.values())) not in known:
            with updates.cut(found, ranks):
                known[key] = loss()
        return known[key]

    top = steps(max(whole.values()))
    asked = {"": [{site: min(k, n) for site, n in whole.items()} for k in top]}
    if cfg.truncation == "sites":
        asked |= {site: [{**whole, site: k} for k in steps(n)] for site, n in whole.items()}
    curves: dict[str, Curve] = {}
    passes = [(name, ranks) for name, every in asked.items() for ranks in every]
    for name, ranks in _shown(passes, console):
        curve = curves.setdefault(name, Curve([], []))
        curve.ranks.append(ranks[name] if name else top[len(curve.ranks)])
        curve.losses.append(cut(ranks))
    for name, curve in curves.items():
        prefix = f"{name}/truncation" if name else "truncation"
        said.arrays[f"{prefix}/ranks"] = np.array(curve.ranks)
        said.arrays[f"{prefix}/loss"] = np.array(curve.losses)
    if cfg.truncation == "sites":
        said.advice = advise(curves, cfg.keep, cut)
    if said.advice is not None:
        metrics = {"loss": said.advice.loss, "share": said.advice.share}
        said.metrics |= {f"advice/{name}": value for name, value in metrics.items()}


def write(directory: Path, arrays: Mapping[str, np.ndarray], advice: Advice | None) -> None:
    """spectra.npz, and the advice as config that `lora-lab train` takes."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomic(directory / "spectra.npz", content.getvalue())
    if advice is not None:
        r = max(advice.ranks.values())
        pattern = {site: k for site, k in advice.ranks.items() if k < r}
        text = (
            f"# ΔW cut to these ranks keeps {advice.share:.1%} of the gain: val/loss "
            f"{advice.loss:.5g}, {advice.uncut:.5g} uncut, {advice.before:.5g} before.\n"
            f"# lora-lab train {advice.overrides}\n"
        )
        text += yaml.safe_dump({"adapter": {"r": r, "rank_pattern": pattern}}, sort_keys=False)
        write_atomic(directory / "advice.yaml", text)


def _shown(passes: list, console: Console) -> Iterable:
    return track(
        passes,
        "truncation",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def advise(
    curves: Mapping[str, Curve], keep: float, cut: Callable[[dict[str, int]], float]
) -> Advice | None:
    """The least ranks that together keep the share `keep` of the gain; None where nothing is won.

    Each site alone may lose a part of what all may, halved until all together (by `cut`) lose no
    more than they may.
    """
    whole = curves[""]
    before, uncut = whole.losses[0], whole.losses[-1]
    allowed = (1 - keep) * (before - uncut)
    if not before > uncut:
        return None
    sites = {site: curve for site, curve in curves.items() if site}
    for halved in range(12):
        bound = uncut + allowed / 2**halved
        ranks = {site: max(1, curve.least(bound)) for site, curve in sites.items()}
        if (loss := cut(ranks)) <= uncut + allowed:
            return Advice(ranks, loss, uncut, before)
    return Advice({site: curve.ranks[-1] for site, curve in sites.items()}, uncut, uncut, before)
