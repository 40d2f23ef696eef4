"""The report on the spectra of an update that was read from files: tables, figures and a page."""

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from lora_lab.report.page import write_update_page
from lora_lab.report.plotting import MAX_PANELS, log_scale, panels, save, series_style
from lora_lab.report.tables import (
    Rows,
    csv_of,
    format_number,
    markdown,
    markdown_text,
    terminal_table,
)
from lora_lab.runs import write_atomic

COLUMNS = {
    "frobenius": "‖ΔW‖",
    "sigma_1": "σ₁",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "energy_90": "90%",
    "energy_99": "99%",
    "numerical_rank": "numerical rank",
    "relative": "‖ΔW‖/‖W‖",
    "amplification": "amplification",
    "intruders": "intruders of 10",
}
"""Measure → the title of its column; a column that no site has is left out."""

EXPLANATION = """\
‖ΔW‖: Frobenius norm. 90%, 99%: the least rank that holds that share of ‖ΔW‖². –: not known."""

CAPTIONS = {
    "spectrum": "Singular values of ΔW.",
    "sites": "‖ΔW‖ and the stable rank, site by site in the order of their names.",
}

MAX_SINGULAR_VALUES = 1024
"""Singular values that are drawn of a site."""


@dataclass(frozen=True)
class SiteSpectrum:
    """The spectrum of one site's ΔW, and what was measured of it."""

    site: str
    shape: tuple[int, int]
    r: int | None
    """The rank of its factors; None for the difference of two weights."""
    singular_values: np.ndarray
    """In descending order: all, or the first."""
    measures: dict[str, float] = field(default_factory=dict)
    """By the keys of COLUMNS; a measure that is not known is left out."""
    note: str = ""
    """How it was computed, where it is not all of ΔW or not exact."""


@contextmanager
def arrays_file(path: Path) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Context that gives a function which adds an array to an npz file, which is `path` at the end.

    Arrays are written as they come, so that they need not be in memory together.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:

            def add(name: str, array: np.ndarray) -> None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

            yield add
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def natural_order(name: str) -> list[str | int]:
    """The key by which names are sorted with their numbers as numbers: layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def spectra_rows(sites: Sequence[SiteSpectrum]) -> Rows:
    """The table of the sites, its head first."""
    keys = [key for key in COLUMNS if any(key in site.measures for site in sites)]
    notes = any(site.note for site in sites)
    rows: Rows = [["site", "shape", "r", *(COLUMNS[key] for key in keys), *["note"] * notes]]
    for site in sites:
        values = [format_number(site.measures.get(key)) for key in keys]
        head = [site.site, " × ".join(map(str, site.shape)), format_number(site.r)]
        rows.append([*head, *values, *[site.note] * notes])
    return rows


def write_update_report(
    title: str, sites: Sequence[SiteSpectrum], lines: Sequence[str], to: Path
) -> None:
    """Writes table.md, spectra.csv, the figures and index.html to a folder that exists.

    `lines` say what is not in the table.
    """
    rows, largest = spectra_rows(sites), _largest(sites, MAX_PANELS)
    figures = {}
    if sites:
        figures = {"spectrum": _spectrum(largest, len(sites)), "sites": _by_site(sites)}
    for name, figure in figures.items():
        save(figure, to / name)
    parts = [markdown_text(f"# {title}"), *map(markdown_text, lines)]
    parts += [markdown(rows, "l"), EXPLANATION, *(f"![{name}]({name}.png)" for name in figures)]
    write_atomic(to / "table.md", "\n\n".join(parts) + "\n")
    write_atomic(to / "spectra.csv", csv_of(rows))
    captions = {name: CAPTIONS[name] for name in figures}
    tables = {"spectra": rows} if sites else {}
    write_update_page(title, lines, tables, EXPLANATION, captions, to)


def show_update_report(
    title: str, sites: Sequence[SiteSpectrum], lines: Sequence[str], to: Path, console: Console
) -> None:
    """Prints the sites whose ΔW is largest, how many more there are, `lines`, and the folder."""
    shown = _largest(sites, MAX_PANELS)
    if shown:
        console.print(terminal_table(title, spectra_rows(shown)))
    else:
        console.print(f"{title}: no matrix changed", highlight=False)
    if len(sites) > len(shown):
        rest = f"… and {len(sites) - len(shown)} sites more, with a smaller ΔW, in spectra.csv"
        console.print(rest, highlight=False)
    for line in (*[EXPLANATION] * bool(sites), *lines):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written  {to} (index.html, spectra.npz, figures)", highlight=False)


def _largest(sites: Sequence[SiteSpectrum], count: int) -> list[SiteSpectrum]:
    """The sites with the largest ‖ΔW‖, in their order."""
    by_norm = sorted(sites, key=lambda site: -site.measures["frobenius"])
    names = {site.site for site in by_norm[:count]}
    return [site for site in sites if site.site in names]


def _spectrum(sites: Sequence[SiteSpectrum], total: int) -> Figure:
    """σᵢ against i, a panel for each site."""
    figure, axes = panels(len(sites), width=4.5, height=3.2)
    for panel, site in zip(axes, sites, strict=True):
        values = site.singular_values[:MAX_SINGULAR_VALUES]
        positive = values[values > values.max(initial=0) * 1e-12]
        panel.plot(range(1, len(positive) + 1), positive, ".-", color="C0")
        panel.set(xlabel="i", ylabel="σᵢ")
        panel.set_title(site.site[-48:], fontsize=9)
        panel.locator_params(axis="x", integer=True)
        if len(positive):
            log_scale(panel, positive.min(), positive.max())
        panel.grid(alpha=0.3)
    if total > len(sites):
        figure.suptitle(f"{len(sites)} of {total} sites, those whose ΔW is largest")
    return figure


def _by_site(sites: Sequence[SiteSpectrum]) -> Figure:
    """‖ΔW‖ and the stable rank of all sites, a series for each last word of their names."""
    kinds: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        name = site.site.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(name, []).append(i)
    is_named = len(kinds) <= MAX_PANELS
    figure, axes = panels(2, width=6)
    for panel, key in zip(axes, ("frobenius", "stable_rank"), strict=True):
        for j, (kind, where) in enumerate(kinds.items()):
            color, marker = series_style(j if is_named else 0)
            values = [sites[i].measures[key] for i in where]
            panel.plot(where, values, marker, color=color, markersize=4, label=kind)
        panel.set(xlabel="site", ylabel=COLUMNS[key], ylim=(0, 1.06 * panel.get_ylim()[1]))
        panel.locator_params(axis="x", integer=True)
        panel.grid(alpha=0.3)
    if is_named:
        axes[0].legend(fontsize=8)
    return figure
