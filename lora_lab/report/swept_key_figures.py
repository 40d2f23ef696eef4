"""A sweep's figures over its cells: parameters against metric, and metrics over the swept keys."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_lab.report.cells import Cell, goal_of, short_text, sort_key, swept_keys
from lora_lab.report.plotting import log_scale, metric_label, panels

MAX_LABELS = 16
"""Cells on the front that are named, at most; values of a key that its axis names."""


def metrics_by_swept_keys(cells: Sequence[Cell], metrics: Sequence[str]) -> Figure | None:
    """Two swept keys: a heat map of each metric's mean; more: parallel coordinates of the first.

    Of the LoRA cells, where there are any: the others have none of the keys. Full fine-tuning has
    a column beside r, though. A key that was drawn, each cell's its own, is an axis of points.
    """
    lora = [cell for cell in cells if cell.results[0].rank is not None]
    full = [cell for cell in cells if cell.results[0].config["adapter"]["method"] == "full"]
    cells = lora or list(cells)
    keys = {key: name for key, name in swept_keys(cells).items() if key != "cell"}
    metrics = [m for m in metrics if any(m in cell.metrics for cell in cells)]
    if len(keys) < 2 or not metrics:
        return None
    points = [tuple(short_text(cell.value_of(key)) for key in keys) for cell in cells]
    if len(keys) == 2 and len(set(points)) == len(points):
        if drawn := [key for key in keys if _drawn(cells, key)]:
            return _scatter(cells, keys, drawn[-1], metrics)
        first, second = keys
        if lora and first == "adapter.r" and {*swept_keys(full)} <= {second}:
            cells = [*cells, *(cell for cell in full if second in cell.settings)]
        return _heat(cells, keys, metrics)
    return _parallel(cells, keys, metrics[0])


def _levels(cells: Sequence[Cell], key: str) -> list[Any]:
    """A key's values, in order."""
    found = {short_text(cell.value_of(key)): cell.value_of(key) for cell in cells}
    return sorted(found.values(), key=sort_key)


def _drawn(cells: Sequence[Cell], key: str) -> bool:
    """Whether a number was drawn for each cell, as random and bayes do, not taken from a grid."""
    levels = _levels(cells, key)
    return 2 < len(levels) == len(cells) and all(isinstance(one, int | float) for one in levels)


def _scatter(cells: Sequence[Cell], keys: dict[str, str], x: str, metrics: Sequence[str]) -> Figure:
    """The mean of each metric against the key `x`, the other key as colour."""
    (other,) = (key for key in keys if key != x)
    levels, at = _levels(cells, other), [cell.value_of(x) for cell in cells]
    figure, axes = panels(len(metrics), width=5)
    for panel, metric in zip(axes, metrics, strict=True):
        for i, level in enumerate(levels):
            color = matplotlib.colormaps["viridis"](0.92 * i / max(1, len(levels) - 1))
            own = [
                (cell.value_of(x), cell.metrics[metric].mean)
                for cell in cells
                if short_text(cell.value_of(other)) == short_text(level) and metric in cell.metrics
            ]
            label = f"{keys[other]}={short_text(level)}"
            label = label if len(levels) <= MAX_LABELS or i in (0, len(levels) - 1) else None
            if own:
                panel.plot(*zip(*own, strict=True), "o", color=color, label=label)
        values = [cell.metrics[metric].mean for cell in cells if metric in cell.metrics]
        for cell in cells:
            if not cell.finished:
                panel.axvline(cell.value_of(x), color="darkred", linewidth=0.8, linestyle=":")
        if min(at) > 0 and max(at) > 10 * min(at):
            log_scale(panel, min(at), max(at), "x")
        if metric.endswith("loss") and 0 < 10 * min(values) < max(values) < np.inf:
            log_scale(panel, min(values), max(values))
        panel.set(xlabel=keys[x], ylabel=metric_label(metric))
        if failed := sum(not cell.finished for cell in cells):
            panel.set_title(f"dotted: {failed} not finished", fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def _column(cell: Cell, key: str) -> str:
    """A cell's place along r: full fine-tuning has its own."""
    full = cell.results[0].config["adapter"]["method"] == "full"
    return "full" if full and key == "adapter.r" else short_text(cell.value_of(key))


def _heat(cells: Sequence[Cell], keys: dict[str, str], metrics: Sequence[str]) -> Figure:
    (first, second), names = keys, list(keys.values())
    across = [short_text(v) for v in _levels(cells, first) if v is not None or first != "adapter.r"]
    across += ["full"] if any(_column(cell, first) == "full" for cell in cells) else []
    down = [short_text(v) for v in _levels(cells, second)]
    width = min(14.0, max(4.5, 1.5 + 0.75 * len(across)))
    figure, axes = panels(len(metrics), width=width)
    figure.set_figheight(max(3.0, 1.6 + 0.4 * len(down)) * (figure.get_figheight() / 4))
    for panel, metric in zip(axes, metrics, strict=True):
        grid = np.full((len(down), len(across)), np.nan)
        lost: dict[tuple[int, int], str] = {}
        for cell in cells:
            i, j = down.index(short_text(cell.value_of(second))), across.index(_column(cell, first))
            if metric in cell.metrics:
                grid[i, j] = cell.metrics[metric].mean
            elif not cell.finished:
                lost[i, j] = cell.results[0].state
        colors, norm = _scale(grid[np.isfinite(grid)].tolist(), metric)
        panel.set_facecolor("whitesmoke")
        image = panel.imshow(grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
        for i, j in lost:
            box = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="silver")
            panel.add_patch(box)
        panel.set_xticks(
            range(len(across)), across, rotation=45 if max(map(len, across)) > 7 else 0
        )
        panel.set_yticks(range(len(down)), down)
        panel.set(xlabel=names[0], ylabel=names[1], title=f"{metric_label(metric)}, mean")
        if len(across) <= MAX_LABELS and len(down) <= MAX_LABELS:
            for (i, j), value in np.ndenumerate(grid):
                shade = colors(norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
                ink = "white" if np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
                text = f"{value:.3g}" if np.isfinite(value) else lost.get((i, j), "–")
                panel.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(image, ax=panel)
    return figure


def _scale(values: Sequence[float], metric: str) -> tuple[Colormap, Normalize]:
    """Bright is good. A loss over more than a decade is on a log scale."""
    colors = matplotlib.colormaps["viridis_r" if goal_of(metric) == "minimize" else "viridis"]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return colors, (LogNorm if low > 0 and high > 10 * low else Normalize)(low, high)


def _parallel(cells: Sequence[Cell], keys: dict[str, str], metric: str) -> Figure | None:
    cells = [cell for cell in cells if metric in cell.metrics]
    cells = [cell for cell in cells if np.isfinite(cell.metrics[metric].mean)]
    if len(cells) < 2:
        return None
    means = [cell.metrics[metric].mean for cell in cells]
    colors, norm = _scale(means, metric)
    low, high = norm(min(means)), norm(max(means))
    heights: list[list[float]] = []
    figure = Figure(figsize=(max(7.0, 1.6 * (len(keys) + 1)), 4.5), layout="constrained")
    axes = figure.subplots()
    for x, key in enumerate(keys):
        levels = _levels(cells, key)
        place = _places(levels)
        heights.append([place[short_text(cell.value_of(key))] for cell in cells])
        named = (
            levels
            if len(levels) <= MAX_LABELS
            else [levels[0], levels[len(levels) // 2], levels[-1]]
        )
        for level in named:
            _label(axes, short_text(level), x, place[short_text(level)])
    heights.append([float(norm(m) - low) / float(high - low or 1) for m in means])
    # The worst first, so that the best lie on top; the lines of one value fan out a little.
    sign = 1 if goal_of(metric) != "maximize" else -1
    for n in sorted(range(len(cells)), key=lambda n: -sign * means[n]):
        fan = 0.012 * (2 * n / max(1, len(cells) - 1) - 1)
        y = [height[n] + fan for height in heights[:-1]] + [heights[-1][n]]
        axes.plot(range(len(heights)), y, color=colors(norm(means[n])), alpha=0.75, linewidth=1.1)
    for x in range(len(heights)):
        axes.axvline(x, color="dimgray", linewidth=0.8)
    for height in (0.0, 0.5, 1.0) if high > low else (0.5,):
        value = norm.inverse(low + height * (high - low))
        _label(axes, f"{value:.3g}", len(heights) - 1, height)
    axes.set_xticks(range(len(heights)), [*keys.values(), metric_label(metric)])
    axes.set_yticks([])
    axes.set(xlim=(-0.15, len(heights) - 0.75), ylim=(-0.06, 1.06))
    axes.set_title(f"{cells[0].results[0].experiment}: {len(cells)} cells")
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    figure.colorbar(ScalarMappable(norm, colors), ax=axes, label=f"{metric_label(metric)}, mean")
    return figure


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    """Beside a point of a vertical axis, legible over lines."""
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    offset: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
    axes.annotate(text, (x, y), fontsize=8, va="center", zorder=5, bbox=box, **offset)


def _places(levels: Sequence[Any]) -> dict[str, float]:
    """Where each level is on its axis, 0 to 1: evenly if few or words, else as its number says."""
    numbers = all(isinstance(level, int | float) for level in levels)
    if len(levels) > MAX_LABELS and numbers:
        at = np.array(levels, float)
        at = np.log(at) if at.min() > 0 and at.max() > 30 * at.min() else at
        spread = (at - at.min()) / (at.max() - at.min())
    else:
        spread = np.linspace(0, 1, len(levels)) if len(levels) > 1 else np.array([0.5])
    return {short_text(level): float(place) for level, place in zip(levels, spread, strict=True)}
