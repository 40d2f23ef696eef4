"""Compares the directions of ΔW between runs, two runs at a time: a table and heat maps of φ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from lora_lab.report.page import write_update_page
from lora_lab.report.phi_heat_map import phi_heat_map
from lora_lab.report.plotting import MAX_PANELS, panels, save
from lora_lab.report.printed_tables import simple_table
from lora_lab.report.tables import Rows, csv_of
from lora_lab.runs import write_atomic


@dataclass(frozen=True)
class SubspacePair:
    """How similar the directions of one site's ΔW are in two runs."""

    first_run: str
    second_run: str
    site: str
    side: str
    """Which directions: `A`, the right singular vectors of A, as in Figures 3 and 4 of Hu et al.
    2021; or the singular vectors of ΔW on the side of its `input` or its `output`.
    """
    phi: np.ndarray
    """φ (i × j), from 0 to 1: how far the first i directions of the first run lie in the first j of
    the second, or the other way round where j is smaller.
    """
    grassmann_distance: float
    """Between the spans of as many directions as the run with fewer of them has; in radians."""
    dimension: int
    """d, the number of entries of a direction: the site's inputs or outputs."""

    @property
    def random_phi(self) -> float:
        """The mean of φ at its last i and j for two random subspaces: max(i, j) / d."""
        return max(self.phi.shape) / self.dimension


EXPLANATION = """\
φ(i, j): the share of the first i directions that lies in the first j of the other run, from 0 to 1;
random: its mean at the last i, j for random directions; distance: Grassmann's, √Σθ² in radians.
"""


def write_pairs(
    pairs: Sequence[SubspacePair],
    directory: Path,
    console: Console,
    noun: str = "run",
    most_rows: int | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes pairs.csv, phi.npz, the figures and a page to `directory`, and prints the table.

    `noun` is what the updates are of; of the table `most_rows` rows are printed, None: all. `notes`
    are lines on what was compared.
    """
    directory.mkdir(parents=True, exist_ok=True)
    runs = dict.fromkeys(run for pair in pairs for run in (pair.first_run, pair.second_run))
    labels = {run: f"{noun} {i + 1}" for i, run in enumerate(runs)}
    rows, explanation = _rows(pairs, labels, noun), EXPLANATION.replace("run", noun)
    write_atomic(directory / "pairs.csv", csv_of(rows))
    arrays = {f"{p.first_run}|{p.second_run}|{p.site}|{p.side}": p.phi for p in pairs}
    np.savez_compressed(directory / "phi.npz", allow_pickle=False, **arrays)  # pyright: ignore
    console.print(explanation, highlight=False)
    lines = [*(f"{label}: {run}" for run, label in labels.items()), *notes]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(simple_table(rows[0], rows[1:][:most_rows]))
    if most_rows and len(pairs) > most_rows:
        console.print(f"… and {len(pairs) - most_rows} rows more, in pairs.csv", highlight=False)
    captions = _draw_heat_maps(pairs, labels, directory)
    title = f"φ of the ΔW of {len(runs)} {noun}s"
    write_update_page(title, lines, {"pairs": rows}, explanation, captions, directory)
    files = "index.html, pairs.csv, phi.npz, figures"
    console.print(f"written  {directory} ({files})", highlight=False)


def _rows(pairs: Sequence[SubspacePair], labels: dict[str, str], noun: str) -> Rows:
    """The table of the pairs, its head first; `labels` holds the short name of each run."""
    rows = [[f"{noun}s", "site", "side", "φ(1, 1)", "φ(i, j)", "i, j", "random", "distance"]]
    for pair in pairs:
        i, j = pair.phi.shape
        runs = f"{labels[pair.first_run]}, {labels[pair.second_run]}"
        similarities = [f"{phi:.4f}" for phi in (pair.phi[0, 0], pair.phi[-1, -1])]
        comparison = [f"{i}, {j}", f"{pair.random_phi:.4f}", f"{pair.grassmann_distance:.4f}"]
        rows.append([runs, pair.site, pair.side, *similarities, *comparison])
    return rows


def _draw_heat_maps(
    pairs: Sequence[SubspacePair], labels: dict[str, str], directory: Path
) -> dict[str, str]:
    """Writes a figure for each side, with a heat map of φ for each of its first 12 pairs.

    Returns their captions by file name.
    """
    captions = {}
    for side in dict.fromkeys(pair.side for pair in pairs):
        pairs_of_side = [pair for pair in pairs if pair.side == side][:MAX_PANELS]
        figure, axes = panels(len(pairs_of_side), width=4.5)
        for panel, pair in zip(axes, pairs_of_side, strict=True):
            first, second = labels[pair.first_run], labels[pair.second_run]
            phi_heat_map(figure, panel, pair.phi)
            panel.set_title(f"{pair.site}: {first}, {second}", fontsize=10)
            panel.set(xlabel=f"first j of {second}", ylabel=f"first i of {first}")
        save(figure, directory / f"phi_{side}")
        captions[f"phi_{side}"] = f"φ of the directions of: {side}."
    return captions
