"""What figures share: series styles, panels, log and rank axes, labels, and saving."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

# Fonts as text, so that a PDF's labels can be searched and edited.
matplotlib.rcParams.update({"pdf.fonttype": 42, "savefig.dpi": 150})

MAX_PANELS = 12
"""Largest number of sites in a figure with a panel for each site: those whose ΔW is largest."""

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Its yellow is left out
# because it is hard to see on white paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def series_style(i: int) -> tuple[str, str]:
    """The colour and marker of the i-th series; they repeat after 49 series."""
    return COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]


def series_legend_lines(count: int) -> list[Line2D]:
    """Legend entries for the first `count` series, each with its colour and marker."""
    styles = [series_style(i) for i in range(count)]
    return [Line2D([], [], color=color, marker=marker, markersize=4) for color, marker in styles]


def graded_colors(count: int) -> list[tuple[float, float, float, float]]:
    """Colours from dark to light for `count` ordered values, such as ranks.

    They stop at 0.92 of the viridis map because its last yellow is hard to see on white paper.
    """
    return [matplotlib.colormaps["viridis"](0.92 * i / max(1, count - 1)) for i in range(count)]


def panels(
    count: int, width: float, height: float = 4, in_row: int = 3
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most `in_row` in a row, each of a size in inches."""
    columns = min(count, in_row)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])


def log_scale(axes: Axes, low: float, high: float, axis_name: str = "y") -> None:
    """Makes the x or y axis logarithmic, for values from `low` to `high`, both above 0.

    Below three decades the ticks are plain numbers (0.2, 0.5, 1), which matplotlib would leave out
    or write as powers of ten.
    """
    axes.set(**{f"{axis_name}scale": "log"})
    axis = axes.xaxis if axis_name == "x" else axes.yaxis
    decades = np.log10(high / low)
    # For equal values, as for three decades and more, matplotlib's default ticks will do.
    if 0 < decades < 3:
        tick_digits = (1, 2, 5) if decades > 0.7 else range(1, 10)
        by_digits = LogLocator(subs=tick_digits, numticks=12)
        # From 0.71 to 0.79 there is no 0.1, 0.2, …: the ticks are at equal distances then.
        axis.set_major_locator(by_digits if decades > 0.3 else AutoLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_locator(NullLocator())


def rank_axis(axes: Axes, ranks: set[int]) -> None:
    """Makes the x axis logarithmic in r, with a labelled tick at each r that was used.

    A rank whose label would overlap the one before it gets none: labels are at least 4.5% of the
    axis apart.
    """
    axes.set_xscale("log")
    labelled: list[int] = []
    span = max(ranks) / min(ranks)
    for r in sorted(ranks):
        if not labelled or np.log(r / labelled[-1]) > 0.045 * np.log(span):
            labelled.append(r)
    axes.set_xticks(labelled, [str(r) for r in labelled], minor=False)
    axes.minorticks_off()


def metric_label(name: str) -> str:
    """A metric's name for an axis or a caption: `val/loss` becomes `validation loss`."""
    name = re.sub(r"sigma_(\d+)", r"$\\sigma_{\1}$", name.removeprefix("spectra/"))
    name = name.replace("val/", "validation ").replace("/", " ")
    return re.sub(r"_(?!\{)", " ", name)


def legend_label(label: str) -> str:
    """The label, cut to 48 characters so that a legend stays narrow."""
    return label if len(label) <= 48 else f"{label[:47]}…"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure to `path` with the endings .png and .pdf, in the place of files or links."""
    for suffix in (".png", ".pdf"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    figure.savefig(path.with_suffix(".png"))
    # The layout was computed for the PNG. The PDF keeps it, and the work is done once.
    figure.set_layout_engine("none")
    figure.savefig(path.with_suffix(".pdf"))
