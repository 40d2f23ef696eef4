"""Trains two sweeps over the digits and draws the pictures of docs/measures.md from them.

    python -m docs.pages.pictures

It takes about five minutes on 2 cores. The runs go to a temporary folder; `--runs FOLDER` keeps
them there, and draws from those that are in it.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lora_lab.report.plotting import panels, series_style
from lora_lab.run_files import read_cost
from lora_lab.runs import Run, find_runs

PICTURES = Path(__file__).parents[1] / "pictures"
RANKS = "adapter.r=1,2,4,8"
SWEEP = ["train", "-m", "experiment=digits", RANKS, "seed=0,1,2", "hydra/launcher=packed"]
SWEEP += ["hydra.launcher.n_jobs=1", "tracking=off"]
RATES = [*SWEEP, "name=rates", "optimizer.lr=1e-3,3e-3,1e-2,3e-2,1e-1"]
SITE = "body.fc2"
"""The site whose measures of rank are shown."""

COPIED = {
    "spectrum": "runs/digits/{run}/report/spectrum.png",
    "truncation": "runs/digits/{run}/report/truncation.png",
    "measures": "runs/digits/report/measures.png",
    "rank": "runs/digits/report/rank.png",
    "forgetting": "runs/digits/report/forgetting.png",
    "phi": "analysis/phi_input.png",
    "learning_rate": "runs/rates/report/learning_rate.png",
}
"""Picture → the figure of a report that it is."""


def main() -> None:
    """Trains what is not there yet, and writes docs/pictures/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=None, help="a folder that keeps the runs")
    folder = parser.parse_args().runs
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        draw(Path(folder or temporary).absolute())


def draw(folder: Path) -> None:
    """Trains in a folder, has the reports written, and draws."""
    for arguments in (SWEEP, RATES):
        lora_lab(folder, *arguments)
    runs = sorted(find_runs(folder / "runs/digits"), key=lambda run: run.path.name)
    of_rank = {r: [run for run in runs if run.config["adapter"]["r"] == r] for r in (1, 2, 4, 8)}
    first, second, _ = (str(run.path) for run in of_rank[8])
    for path in (first, "runs/digits", "runs/rates"):
        lora_lab(folder, "report", path)
    lora_lab(folder, "analyze", first, second)
    for name, path in COPIED.items():
        save(name, Image.open(folder / path.format(run=Path(first).name)))
    ranks_of_one_site(Run(Path(first)))
    over_ranks("against_base", of_rank, (amplification, intruders))
    over_ranks("cost", of_rank, (flops, adapter_bytes))


def lora_lab(folder: Path, *arguments: str) -> None:
    """Runs `lora-lab ARGUMENTS` in a folder."""
    subprocess.run([sys.executable, "-m", "lora_lab.cli", *arguments], cwd=folder, check=True)


def save(name: str, image: Image.Image) -> None:
    """Writes a picture, at most 1300 pixels wide and of 64 colours, so that it is small."""
    if image.width > 1300:
        image = image.resize((1300, round(1300 * image.height / image.width)))
    image.convert("RGB").quantize(64).save(PICTURES / f"{name}.png", optimize=True)


def ranks_of_one_site(run: Run) -> None:
    """Draws the singular values of one site, and the measures of rank beside them."""
    with np.load(run.path / "spectra.npz") as arrays:
        sigma = arrays[f"{SITE}/singular_values"][-1]
    measures = "stable_rank participation_ratio energy_90 energy_99 effective_rank numerical_rank"
    figure, (axes,) = panels(1, 7, 3.2)
    axes.bar(range(1, len(sigma) + 1), sigma, color="lightgray")
    for i, name in enumerate(measures.split()):
        value = run.last(f"spectra/{SITE}/{name}")
        assert value is not None
        label = f"{name.replace('_', ' ')} {value:.3g}"
        axes.axvline(value, color=series_style(i)[0], label=label)
    axes.set(xlabel="i", ylabel="σᵢ", title=f"ΔW of {SITE}, r = {len(sigma)}")
    axes.legend(fontsize="small")
    write("ranks", figure)


OverRanks = Callable[[Axes, dict[int, list[Run]]], None]


def over_ranks(name: str, runs: dict[int, list[Run]], drawings: Sequence[OverRanks]) -> None:
    """Draws a picture of two panels over r."""
    figure, axes = panels(len(drawings), 4.2, 3.2)
    for panel, drawing in zip(axes, drawings, strict=True):
        drawing(panel, runs)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(runs), list(map(str, runs)))
        panel.set_xlabel("r")
    write(name, figure)


def amplification(axes: Axes, runs: dict[int, list[Run]]) -> None:
    """Draws ‖ΔW‖ over what W has in its directions, a line for each site."""
    _by_site(axes, runs, "amplification")
    axes.set(ylabel="amplification", ylim=(0, None))


def intruders(axes: Axes, runs: dict[int, list[Run]]) -> None:
    """Draws the number of intruder dimensions, a line for each site."""
    _by_site(axes, runs, "intruders")
    axes.set(ylabel="intruders among 10", ylim=(-0.3, 10.3))
    axes.legend(fontsize="small")


def _by_site(axes: Axes, runs: dict[int, list[Run]], name: str) -> None:
    for i, site in enumerate(("body.fc1", "body.fc2", "head")):
        values = [mean(run.last(f"spectra/{site}/{name}") or 0.0 for run in runs[r]) for r in runs]
        color, marker = series_style(i)
        axes.plot(list(runs), values, color=color, marker=marker, label=site)


def flops(axes: Axes, runs: dict[int, list[Run]]) -> None:
    """Draws the FLOPs of a step."""
    counted = [read_cost(runs[r][0].path)["cost/flops_per_step"] / 1e6 for r in runs]
    axes.plot(list(runs), counted, color=series_style(0)[0], marker="o")
    axes.set(ylabel="MFLOP a step", ylim=(0, None))


def adapter_bytes(axes: Axes, runs: dict[int, list[Run]]) -> None:
    """Draws the size of the adapter and of its optimizer's state, and full fine-tuning's."""
    names = {"bytes/adapter": "adapter", "bytes/optimizer": "optimizer"}
    names |= {"bytes/full_optimizer": "optimizer, all trained"}
    for i, (name, label) in enumerate(names.items()):
        color, marker = series_style(i)
        values = [(runs[r][0].last(name) or 0.0) / 1e3 for r in runs]
        axes.plot(list(runs), values, color=color, marker=marker, label=label)
    axes.set(ylabel="kB", ylim=(1, None), yscale="log")
    axes.legend(fontsize="small")


def write(name: str, figure: Figure) -> None:
    """Writes a figure as a picture."""
    path = PICTURES / f"{name}.png"
    figure.savefig(path)
    save(name, Image.open(path))


if __name__ == "__main__":
    main()
