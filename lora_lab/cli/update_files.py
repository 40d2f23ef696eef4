"""`lora-lab cut`: adapters at a lower rank."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from rich.console import Console

from lora_lab import report
from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.stored import StoredAdapter, StoredUpdate
from lora_lab.analysis import cut as cutting
from lora_lab.analysis.cut import CutSite, RankRule
from lora_lab.analysis.spectra import Spectrum
from lora_lab.analysis.stored_spectra import shortened
from lora_lab.report.tables import Rows, csv_of
from lora_lab.report.update_report import natural_order
from lora_lab.runs import write_atomic

SHOWN = 24
"""Sites that are printed; the file sites.csv has all."""


def advised_ranks(run: Path) -> dict[str, int]:
    """The ranks by a glob on sites in a run's advice.yaml. Raises ValueError where it has none."""
    path = run / "advice.yaml"
    if not path.is_file():
        raise ValueError(
            f"--advice: {run} has no advice.yaml; only a run has one, whose ΔW gains something, "
            "with spectra.truncation=sites"
        )
    try:
        return dict(yaml.safe_load(path.read_text())["adapter"]["rank_pattern"])
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from None


def rank_rule(
    stored: StoredAdapter,
    rank: int | None = None,
    energy: float | None = None,
    by_pattern: Mapping[str, int] | None = None,
) -> RankRule:
    """The rank of each site: `rank`, that which holds `energy` of ‖ΔW‖², or that of its pattern.

    `by_pattern` has ranks by globs on sites; sites that none fits keep their rank. Raises
    ValueError for a `rank` that no site is cut to.
    """
    if rank is not None:
        most = max(min(update.r, *update.shape) for update in stored.updates.values()) - 1
        if rank > most:
            rule = f"must be at least 1 and at most {most}" if most else "nothing can be cut"
            raise ValueError(f"--rank {rank}: {rule}, since the adapter's rank is {most + 1}")
        return lambda *_: rank
    if energy is not None:
        return lambda _, spectrum: spectrum.energy_rank(energy)
    assert by_pattern is not None

    def of_pattern(site: str, spectrum: Spectrum) -> int:
        fits = (k for pattern, k in by_pattern.items() if fnmatchcase(site, pattern))
        return next(fits, len(spectrum.singular_values))

    return of_pattern


def cut(
    stored: StoredAdapter, rule: RankRule, base: Path | None, to: Path, console: Console
) -> None:
    """Cuts each site to the rank that `rule` says. `base` tells the kernels of LoHa and LoKr."""
    stored, lines = _with_kernels(stored, base)
    sites = cutting.cut_adapter(stored, to, lambda site, u: cutting.cut_update(site, u, rule))
    _report_cut(stored, to, sites, lines, console)


def scale_intruders(
    stored: StoredAdapter, factor: float, base: Path, to: Path, console: Console
) -> None:
    """Scales the intruder dimensions of each site's W + ΔW."""
    weights = Checkpoint(base)

    def scaled(site: str, update: StoredUpdate) -> CutSite:
        if update.magnitude is not None:
            raise ValueError(f"--scale-intruders: '{site}' has DoRA's magnitude, which B A lacks")
        if (W := weights.matrix(site, update)) is None:
            raise ValueError(f"--base {base} has no weight of the shape of '{site}'")
        return cutting.scale_intruders(site, update, W, factor)

    stored, lines = _with_kernels(stored, base)
    sites = cutting.cut_adapter(stored, to, scaled)
    _report_cut(stored, to, sites, lines, console)


def _with_kernels(stored: StoredAdapter, base: Path | None) -> tuple[StoredAdapter, list[str]]:
    """The adapter with the kernels that its files lack and a base has, and a line on the others."""
    unknown = {site: update for site, update in stored.updates.items() if update.kernel is None}
    weights = Checkpoint(base) if base and unknown else None
    kernels = {site: weights and weights.kernel(site, update) for site, update in unknown.items()}
    updates = {site: replace(unknown[site], kernel=kernels[site] or ()) for site in unknown}
    linear = [site for site, kernel in kernels.items() if kernel is None]
    lines = [f"taken for linear, no file has their kernel: {shortened(linear)}"] * bool(linear)
    lines += ["--base tells those that are convolutions"] * (bool(linear) and base is None)
    return replace(stored, updates=stored.updates | updates), lines


def _report_cut(
    stored: StoredAdapter,
    to: Path,
    sites: Mapping[str, CutSite],
    lines: list[str],
    console: Console,
) -> None:
    has_intruders = any(site.intruders for site in sites.values())
    rows: Rows = [["site", "rank", "kept", *["intruders"] * has_intruders]]
    for name, site in sorted(sites.items(), key=lambda item: natural_order(item[0])):
        rank = str(site.r) if site.k == site.r else f"{site.r} → {site.k}"
        rows.append([name, rank, f"{site.kept:.3%}", *[str(site.intruders)] * has_intruders])
    before, after = (
        file.stat().st_size for file in (stored.tensors_file, to / stored.tensors_file.name)
    )
    lines = [f"bytes    {before:,} → {after:,} ({after / before:.1%})", *lines]
    for stays, reason in (
        ([n for n, s in sites.items() if s.stays and s.intruders], "their intruders too, "),
        ([n for n, s in sites.items() if s.stays and not s.intruders], ""),
    ):
        if stays:
            lines.append(
                f"as they were, {reason}since PEFT has a rank for each group of a convolution, "
                f"and would take as many numbers or more: {shortened(stays)}"
            )
    if any(update.magnitude is not None for update in stored.updates.values()):
        lines.append("kept is of s·B·A; DoRA's magnitudes stay as they are")
    show_sites("kept: the share of ‖ΔW‖²", rows, lines, to, console)


def show_sites(title: str, rows: Rows, lines: list[str], to: Path, console: Console) -> None:
    """Writes the table beside the adapter, and prints its first rows and `lines`."""
    write_atomic(to / "sites.csv", csv_of(rows))
    console.print(report.terminal_table(title, rows[: SHOWN + 1]))
    if len(rows) > SHOWN + 1:
        console.print(f"… and {len(rows) - SHOWN - 1} sites more, in sites.csv", highlight=False)
    for line in (*lines, f"written  {to}"):
        console.print(line, highlight=False, soft_wrap=True)
