"""`lora-lab spectra`: the spectra of ΔW of adapters and checkpoints, read without a model."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from torch import Tensor

from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.stored import read_updates
from lora_lab.analysis.spectra import TRIPLES
from lora_lab.analysis.stored_spectra import (
    Difference,
    Measured,
    measure_adapter,
    measure_difference,
    shortened,
    svd_of_update,
)
from lora_lab.analysis.subspaces import compare_spans
from lora_lab.report.subspace_pairs import write_pairs
from lora_lab.report.update_report import (
    SiteSpectrum,
    arrays_file,
    natural_order,
    show_update_report,
    write_update_report,
)

T = TypeVar("T")


def of_adapter(path: Path, base: Path | None, to: Path, console: Console) -> None:
    """Writes and prints the report on one adapter; with `base` beside the weights it is for."""
    updates = read_updates(path)
    weights = Checkpoint(base) if base else None
    sites = _write_arrays(measure_adapter(updates, weights), len(updates), to, console)
    lines = []
    if lacking := [s.site for s in sites if "no such weight" in s.note]:
        lines.append(f"sites of which {base} has no weight of their shape: {shortened(lacking)}")
    _report(f"ΔW of {path}", sites, lines, to, console)


def of_checkpoints(before: Path, after: Path, to: Path, console: Console) -> None:
    """Writes and prints the report on the difference of two checkpoints."""
    difference = Difference(Checkpoint(before), Checkpoint(after))
    keys = difference.shared
    if not keys:
        raise ValueError(f"{before} and {after} share no key")
    tracked = _tracked(keys, len(keys), console)
    sites = _write_arrays(measure_difference(difference, tracked), None, to, console)
    _report(f"{after} − {before}", sites, difference.lines(), to, console)


def of_pairs(paths: Mapping[str, Path], to: Path, console: Console) -> None:
    """Writes and prints φ between the ΔW of each two adapters, at each site that both have."""
    spans: dict[str, dict[tuple[str, str], Tensor]] = {}
    with_magnitude = []
    for name, path in paths.items():
        updates, spans[name] = read_updates(path), {}
        if any(update.magnitude is not None for update in updates.values()):
            with_magnitude.append(name)
        for site, update in updates.items():
            svd = svd_of_update(update, TRIPLES)[1].above_rounding()
            spans[name] |= {(site, "input"): svd.Vh.T, (site, "output"): svd.U}
    if not (pairs := compare_spans(spans)):
        raise ValueError("the adapters share no site with weights of one shape")
    lines = [f"{name}: φ is of s·B·A, without DoRA's magnitude" for name in with_magnitude]
    write_pairs(pairs, to, console, noun="adapter", most_rows=24, notes=lines)


def _write_arrays(
    measured: Iterable[Measured], total: int | None, to: Path, console: Console
) -> list[SiteSpectrum]:
    """Writes spectra.npz to `to` as the sites are measured, and returns their spectra."""
    sites = []
    to.mkdir(parents=True, exist_ok=True)
    with arrays_file(to / "spectra.npz") as add:
        for site, svd in _tracked(measured, total, console) if total else measured:
            sites.append(site)
            add(f"{site.site}/singular_values", site.singular_values)
            for name, tensor in vars(svd.first(TRIPLES)).items():  # U, S and Vh
                add(f"{site.site}/{name}", tensor.float().numpy())
    return sorted(sites, key=lambda site: natural_order(site.site))


def _tracked(items: Iterable[T], total: int, console: Console) -> Iterator[T]:
    """The items, with a progress bar on a terminal."""
    hidden = not console.is_terminal
    yield from track(items, "spectra", total, console=console, transient=True, disable=hidden)


def _report(
    title: str, sites: list[SiteSpectrum], lines: list[str], to: Path, console: Console
) -> None:
    write_update_report(title, sites, lines, to)
    show_update_report(title, sites, lines, to, console)
