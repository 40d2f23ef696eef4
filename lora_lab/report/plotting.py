"""What all figures share: colours, panels, axes, labels, and how they are saved."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Fonts as text, so that a PDF's labels can be searched and edited.
matplotlib.rcParams.update({"pdf.fonttype": 42, "savefig.dpi": 150})

MAX_PANELS = 12
"""Sites drawn, at most: those whose ΔW is largest."""

# Okabe and Ito's colours, which the colour-blind tell apart, without yellow, which paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def series_style(i: int) -> tuple[str, str]:
    """The colour and marker of the i-th series: 49 that differ."""
    return COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]


def log_scale(axes: Axes, low: float, high: float, which: str = "y") -> None:
    """A log scale of values from `low` to `high`; with plain numbers where they are few decades."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = np.log10(high / low)
    if decades < 1e-3:
        return  # one value: as wide as matplotlib makes it
    subs = (1, 2, 5) if decades > 0.7 else range(1, 10)
    if decades < 3:
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, whose layout has room for all that belongs to it, as PNG and PDF."""
    figure.savefig(path.with_suffix(".png"))
    figure.set_layout_engine("none")  # it stays as laid out, and is not laid out again
    figure.savefig(path.with_suffix(".pdf"))


def rank_axis(axes: Axes, ranks: set[int]) -> None:
    """A log axis with a tick at every r, labelled where there is room."""
    axes.set_xscale("log")
    shown, last = [], 0.0
    span = max(ranks) / min(ranks)
    for r in sorted(ranks):
        if not last or np.log(r / last) > 0.045 * np.log(span):
            shown.append(r)
            last = r
    axes.set_xticks(shown, [str(r) for r in shown], minor=False)
    axes.minorticks_off()


def metric_label(name: str) -> str:
    """A metric as an axis has it."""
    name = re.sub(r"sigma_(\d+)", r"$\\sigma_{\1}$", name.removeprefix("spectra/"))
    name = name.replace("val/", "validation ").replace("/", " ")
    return re.sub(r"_(?!\{)", " ", name)


def legend_label(label: str) -> str:
    """A series' name as a legend has it."""
    return label if len(label) <= 48 else f"{label[:47]}…"


def panels(count: int, width: float) -> tuple[Figure, list]:
    """A figure of `count` panels, three a line."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])
