"""What a finished update is worth: rank by rank, and against the base it changed."""

import glob
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track

from lora_lab import spectra
from lora_lab.config.schema import Spectra
from lora_lab.runs import write_atomic
from lora_lab.spectra import SVD, Spectrum
from lora_lab.training import bases
from lora_lab.updates import Updates

TRIPLES = 64
"""Singular triples of every site that spectra.npz keeps, at most."""

INTRUDERS_AMONG = 10
"""Left singular vectors of W + ΔW that are asked whether W has their like."""


Losses = Callable[[Mapping[str, SVD], Sequence[Mapping[str, int]]], Iterable[float]]
"""The validation losses with the ΔW that these SVDs are of cut to each of these ranks by site."""


@dataclass(frozen=True)
class Curve:
    """The validation loss with ΔW cut to its best approximation of each of `ranks`."""

    ranks: list[int]
    losses: list[float]

    def least(self, loss: float) -> int:
        """The least rank that gives no more than `loss`, of those measured."""
        fit = (r for r, value in zip(self.ranks, self.losses, strict=True) if value <= loss)
        return next(fit, self.ranks[-1])


@dataclass(frozen=True)
class Advice:
    """The least ranks of ΔW by site that keep the share `keep` of what it gains.

    Losses on validation: with ΔW cut to these ranks, uncut, and without ΔW.
    """

    ranks: dict[str, int]
    loss: float
    uncut: float
    without: float
    keep: float

    @property
    def share(self) -> float:
        """How much of the gain is kept with ΔW cut to these ranks."""
        return (self.without - self.loss) / (self.without - self.uncut)

    @property
    def overrides(self) -> str:
        """The ranks as `lora-lab train` takes them, each site by its name."""
        pattern = ",".join(f"{_as_key(site)}:{k}" for site, k in self.ranks.items())
        return f"adapter.r={max(self.ranks.values())} 'adapter.rank_pattern={{{pattern}}}'"

    def text(self) -> str:
        """advice.yaml: what it keeps, and the adapter's settings."""
        adapter = {
            "r": max(self.ranks.values()),
            "rank_pattern": {_as_glob(site): k for site, k in self.ranks.items()},
        }
        content = {
            "keep": self.keep,
            "share": self.share,
            "loss": {"cut": self.loss, "uncut": self.uncut, "without": self.without},
            "adapter": adapter,
        }
        return (
            "# The least ranks of ΔW that keep the share `keep` of what it gains in val/loss.\n"
            "# With the run's own settings (alpha too: alpha/r then scales each site anew) add\n"
            f"#   {self.overrides}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"
        )


def _as_glob(site: str) -> str:
    """A glob that fits this name alone."""
    return glob.escape(site)


def _as_key(site: str) -> str:
    """The same where Hydra reads it: signs of its grammar escaped, no name a number."""
    try:
        whole = str(yaml.safe_load(site)) == site
    except yaml.YAMLError:
        whole = True
    name = _as_glob(site) if whole else f"{_as_glob(site[:-1])}[{site[-1]}]"
    return re.sub(r"([\[\]{}:,=\\()])", r"\\\1", name)


@dataclass
class Findings:
    """What an analysis found: numbers by metric, arrays for spectra.npz, and the advice."""

    metrics: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    advice: Advice | None = None


def analyze(
    updates: Updates, losses: Losses, cfg: Spectra, bases_dir: str, console: Console
) -> Findings:
    """All there is to say of a trained model's ΔW. `losses` are the validation's with it cut.

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
        for site in found:
            _against(updates, site, found[site], Path(bases_dir), said)
    if cfg.truncation != "none":
        _truncate(found, losses, cfg, console, said)
    return said


def _against(updates: Updates, site: str, svd: SVD, directory: Path, said: Findings) -> None:
    """How ΔW's directions lie to W's (Hu et al. 2021, section 7.3), and which are new.

    The directions of a product are all that it has; of a dense ΔW, whose smallest are of any kind,
    those that hold 90% of its energy.
    """
    W = updates.before(site).to(svd.S)
    base, seen = bases.decomposed(W, directory).seen(), svd.seen()
    if not updates.is_product(site):
        seen = seen.first(Spectrum(seen.S.cpu(), (W.shape[0], W.shape[1]), 0).energy_90)
    after = spectra.svd_of_matrix(W + svd.cut(len(svd.S))).seen().first(INTRUDERS_AMONG)
    metrics = {
        "directions": len(seen.S),
        "projection": spectra.projection(W, seen),
        "amplification": spectra.amplification(W, seen),
        "intruders": spectra.intruders(base.U, after.U),
        "intruders_among": len(after.S),
    }
    said.metrics |= {f"spectra/{site}/{k}": float(v) for k, v in metrics.items() if np.isfinite(v)}
    if len(seen.S) and len(base.S):
        phi = spectra.similarity(seen.first(TRIPLES).U, base.first(TRIPLES).U)
        said.arrays[f"{site}/phi_base"] = phi.cpu().float().numpy()


def steps(r: int) -> list[int]:
    """The ranks that a curve is measured at: 0 … 32, then by factors of √2, and r."""
    wider = {round(32 * 2 ** (i / 2)) for i in range(1, 32)}
    return sorted(k for k in {*range(33), *wider, r} if k <= r)


def _truncate(
    found: Mapping[str, SVD],
    losses: Losses,
    cfg: Spectra,
    console: Console,
    said: Findings,
) -> None:
    whole = {site: len(svd.S) for site, svd in found.items()}
    top = steps(max(whole.values()))
    asked: dict[str | None, list[dict[str, int]]] = {
        None: [{site: min(k, n) for site, n in whole.items()} for k in top]
    }
    if cfg.truncation == "sites":
        asked |= {site: [{**whole, site: k} for k in steps(n)] for site, n in whole.items()}
    distinct = list({tuple(cut.values()): cut for cuts in asked.values() for cut in cuts}.values())
    shown = track(
        losses(found, distinct),
        "truncation",
        len(distinct),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    known = dict(zip((tuple(ranks.values()) for ranks in distinct), shown, strict=True))

    def cut_loss(ranks: dict[str, int]) -> float:
        if (key := tuple(ranks.values())) not in known:
            (known[key],) = losses(found, [ranks])
        return known[key]

    curves = {
        site: Curve(
            top if site is None else [cut[site] for cut in cuts], [cut_loss(cut) for cut in cuts]
        )
        for site, cuts in asked.items()
    }
    if cfg.truncation == "sites":
        sites = {site: curve for site, curve in curves.items() if site is not None}
        said.advice = advise(curves[None], sites, cfg.keep, cut_loss)
    for site, curve in curves.items():
        prefix = "truncation" if site is None else f"{site}/truncation"
        said.arrays[f"{prefix}/ranks"] = np.array(curve.ranks)
        said.arrays[f"{prefix}/loss"] = np.array(curve.losses)
    if said.advice is not None:
        metrics = {"loss": said.advice.loss, "share": said.advice.share}
        said.metrics |= {f"advice/{name}": value for name, value in metrics.items()}


def write(directory: Path, arrays: Mapping[str, np.ndarray], advice: Advice | None) -> None:
    """spectra.npz and advice.yaml; without advice, none that is older."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomic(directory / "spectra.npz", content.getvalue())
    (directory / "advice.yaml").unlink(missing_ok=True)
    if advice is not None:
        write_atomic(directory / "advice.yaml", advice.text())


def advise(
    whole: Curve, sites: Mapping[str, Curve], keep: float, cut: Callable[[dict[str, int]], float]
) -> Advice | None:
    """The least ranks that together keep the share `keep` of the gain; None where nothing is won.

    Each site alone may lose a part of what all may, halved until all together (by `cut`) lose no
    more than they may. No site is advised to have less than rank 1.
    """
    without, uncut = whole.losses[0], whole.losses[-1]
    allowed = (1 - keep) * (without - uncut)
    if not without > uncut:
        return None
    for halved in range(12):
        bound = uncut + allowed / 2**halved
        ranks = {site: max(1, curve.least(bound)) for site, curve in sites.items()}
        if (loss := cut(ranks)) <= uncut + allowed:
            return Advice(ranks, loss, uncut, without, keep)
    ranks = {site: curve.ranks[-1] for site, curve in sites.items()}
    return Advice(ranks, uncut, uncut, without, keep)
