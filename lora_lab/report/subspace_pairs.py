"""Runs compared in pairs: a table, φ as heat maps, and every φ in one file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab.report.phi_heat_map import phi_heat_map
from lora_lab.report.plotting import MAX_PANELS, panels, save
from lora_lab.report.tables import csv_of
from lora_lab.runs import write_atomic


@dataclass(frozen=True)
class SubspacePair:
    """How the directions of one site's ΔW lie to each other in two runs.

    `side`: the right singular vectors of A, as in Figures 3 and 4 of Hu et al. 2021; or those of ΔW
    on the side of the input or of the output. `phi` (i × j) is their similarity.
    """

    one: str
    other: str
    site: str
    side: str
    phi: np.ndarray
    distance: float
    """Grassmann's, of the spans of as many directions as the smaller has."""
    features: int

    @property
    def random(self) -> float:
        """The mean of φ at its last i and j for two random subspaces: max(i, j) / d."""
        return max(self.phi.shape) / self.features


WORDS = """\
φ(i, j): the share of the first i directions that lies in the first j of the other run, from 0 to 1;
random: its mean at the last i, j for random directions; distance: Grassmann's, √Σθ² in radians.
"""


def write_pairs(found: Sequence[SubspacePair], directory: Path, console: Console) -> None:
    """Writes pairs.csv, phi.npz and the figures to `directory`, and prints the table."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {name: f"run {i + 1}" for i, name in enumerate(_names(found))}
    console.print(WORDS, highlight=False)
    rows = [["runs", "site", "side", "φ(1, 1)", "φ(i, j)", "i, j", "random", "distance"]]
    arrays: dict[str, np.ndarray] = {}
    for pair in found:
        i, j = pair.phi.shape
        which = f"{names[pair.one]}, {names[pair.other]}"
        numbers = (pair.phi[0, 0], pair.phi[-1, -1])
        last = [f"{i}, {j}", f"{pair.random:.4f}", f"{pair.distance:.4f}"]
        rows.append([which, pair.site, pair.side, *(f"{phi:.4f}" for phi in numbers), *last])
        arrays[f"{pair.one}|{pair.other}|{pair.site}|{pair.side}"] = pair.phi
    write_atomic(directory / "pairs.csv", csv_of(rows))
    np.savez_compressed(directory / "phi.npz", allow_pickle=False, **arrays)  # pyright: ignore
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows[1:]:
        table.add_row(*row)
    for name, short in names.items():
        console.print(f"{short}: {name}", highlight=False, soft_wrap=True)
    console.print(table)
    for side in dict.fromkeys(pair.side for pair in found):
        own = [pair for pair in found if pair.side == side]
        figure, axes = panels(min(len(own), MAX_PANELS), width=4.5)
        for panel, pair in zip(axes, own, strict=False):
            phi_heat_map(figure, panel, pair.phi)
            panel.set_title(f"{pair.site}: {names[pair.one]}, {names[pair.other]}", fontsize=10)
            panel.set(
                xlabel=f"first j of {names[pair.other]}", ylabel=f"first i of {names[pair.one]}"
            )
        save(figure, directory / f"phi_{side}")
    console.print(f"written  {directory} (pairs.csv, phi.npz, figures)", highlight=False)


def _names(found: Sequence[SubspacePair]) -> list[str]:
    return list(dict.fromkeys(name for pair in found for name in (pair.one, pair.other)))
