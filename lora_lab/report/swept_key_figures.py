"""A sweep's metrics over the settings that were swept, whichever they are.

The figure depends on how the cells lie: two settings of a grid are a heat map; two settings of
which one was sampled for each cell, as random search does, are points; more settings are parallel
coordinates. A `key` is a setting's name in the config, as `adapter.alpha`, and a level one of the
values it has in the sweep.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_lab.report.cells import Cell, epoch_of, swept_keys
from lora_lab.report.epochs import goal_of
from lora_lab.report.plotting import graded_colors, log_scale, metric_label, panels
from lora_lab.report.rank_series import CUT_KEYS
from lora_lab.report.setting_values import short_text, sort_key

MAX_LABELS = 16
"""Largest number of levels that are all labelled on an axis or in a legend."""


def metrics_by_swept_keys(cells: Sequence[Cell], metrics: Sequence[str]) -> Figure | None:
    """The mean of each metric over two swept settings, or of the first metric over more of them.

    Only LoRA cells are drawn where there are any, because the others do not have LoRA's settings.
    A heat map over r and another setting also has a column for full fine-tuning. None where fewer
    than two settings were swept.
    """
    lora = [cell for cell in cells if cell.results[0].rank is not None]
    full = [cell for cell in cells if cell.results[0].config["adapter"]["method"] == "full"]
    cells = lora or list(cells)
    # What is cut after a training changes none of these metrics.
    keys = {k: name for k, name in swept_keys(cells).items() if k not in ("cell", *CUT_KEYS)}
    metrics = [m for m in metrics if any(m in cell.metrics for cell in cells)]
    if len(keys) < 2 or not metrics:
        return None
    points = [tuple(_level(cell, key) for key in keys) for cell in cells]
    if len(keys) == 2 and len(set(points)) == len(points):
        if sampled := [key for key in keys if _is_sampled(cells, key)]:
            return _scatter(cells, keys, sampled[-1], metrics)
        first, second = keys
        # A cell of full fine-tuning belongs in the grid if it differs from the other such cells
        # in the second setting only.
        if lora and first == "adapter.r" and {*swept_keys(full)} <= {second}:
            cells = [*cells, *(cell for cell in full if second in cell.settings)]
        return _heat_map(cells, keys, metrics)
    return _parallel_axes(cells, keys, metrics[0])


def _label(metric: str, cells: Sequence[Cell]) -> str:
    """A metric's name, and at which epoch its values are."""
    results = [result for cell in cells for result in cell.results]
    return f"{metric_label(metric)} {epoch_of(metric, results)}"


def _level(cell: Cell, key: str) -> str:
    """A cell's value of a setting, as text."""
    return short_text(cell.value_of(key))


def _levels(cells: Sequence[Cell], key: str) -> dict[str, Any]:
    """The different values of a setting, each by its text, in ascending order."""
    levels = {_level(cell, key): cell.value_of(key) for cell in cells}
    return dict(sorted(levels.items(), key=lambda level: sort_key(level[1])))


def _is_sampled(cells: Sequence[Cell], key: str) -> bool:
    """Whether each cell has a number of its own, as random and Bayesian search give, not a grid."""
    values = _levels(cells, key).values()
    return 2 < len(values) == len(cells) and all(isinstance(value, int | float) for value in values)


def _scatter(cells: list[Cell], keys: dict[str, str], x_key: str, metrics: list[str]) -> Figure:
    """Each metric's mean against the setting `x_key`, with the other of two settings as colour.

    A dotted line stands for a cell without a finished run.
    """
    (color_key,) = (key for key in keys if key != x_key)
    levels, x_values = _levels(cells, color_key), [cell.value_of(x_key) for cell in cells]
    colors = graded_colors(len(levels))
    figure, axes = panels(len(metrics), width=5)
    for panel, metric in zip(axes, metrics, strict=True):
        measured = [cell for cell in cells if metric in cell.metrics]
        for i, level in enumerate(levels):
            cells_at_level = [cell for cell in measured if _level(cell, color_key) == level]
            points = [(cell.value_of(x_key), cell.metrics[metric].mean) for cell in cells_at_level]
            is_labelled = len(levels) <= MAX_LABELS or i in (0, len(levels) - 1)
            label = f"{keys[color_key]}={level}" if is_labelled else None
            if points:
                panel.plot(*zip(*points, strict=True), "o", color=colors[i], label=label)
        values = [cell.metrics[metric].mean for cell in measured]
        for cell in cells:
            if not cell.finished:
                panel.axvline(cell.value_of(x_key), color="darkred", linewidth=0.8, linestyle=":")
        if min(x_values) > 0 and max(x_values) > 10 * min(x_values):
            log_scale(panel, min(x_values), max(x_values), "x")
        if metric.endswith("loss") and 0 < 10 * min(values) < max(values) < np.inf:
            log_scale(panel, min(values), max(values))
        panel.set(xlabel=keys[x_key], ylabel=_label(metric, cells))
        if unfinished := sum(not cell.finished for cell in cells):
            panel.set_title(f"dotted: {unfinished} not finished", fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def _column(cell: Cell, key: str) -> str:
    """The label of a cell's column in a heat map: its level, or `full` on the axis of r."""
    is_full = cell.results[0].config["adapter"]["method"] == "full"
    return "full" if is_full and key == "adapter.r" else _level(cell, key)


def _heat_map(cells: Sequence[Cell], keys: dict[str, str], metrics: Sequence[str]) -> Figure:
    """Each metric's mean in a grid, the first setting across and the second down."""
    (first, second), names = keys, list(keys.values())
    # Full fine-tuning, which has no r, is in the last column.
    in_order = sorted(cells, key=lambda cell: sort_key(cell.value_of(first)))
    columns = list(dict.fromkeys(_column(cell, first) for cell in in_order))
    rows = list(_levels(cells, second))
    figure, axes = panels(len(metrics), width=min(14.0, max(4.5, 1.5 + 0.75 * len(columns))))
    figure.set_figheight(max(3.0, 1.6 + 0.4 * len(rows)) * (figure.get_figheight() / 4))
    for panel, metric in zip(axes, metrics, strict=True):
        grid = np.full((len(rows), len(columns)), np.nan)
        states = np.full(grid.shape, "", object)
        for cell in cells:
            i, j = rows.index(_level(cell, second)), columns.index(_column(cell, first))
            if metric in cell.metrics:
                grid[i, j] = cell.metrics[metric].mean
            elif not cell.finished:
                states[i, j] = cell.results[0].state
        _draw_grid(panel, grid, states, metric)
        rotation = 45 if max(map(len, columns)) > 7 else 0
        panel.set_xticks(range(len(columns)), columns, rotation=rotation)
        panel.set_yticks(range(len(rows)), rows)
        panel.set(xlabel=names[0], ylabel=names[1], title=f"{_label(metric, cells)}, mean")
    return figure


def _draw_grid(panel: Axes, grid: np.ndarray, states: np.ndarray, metric: str) -> None:
    """Draws the means of a metric (rows × columns, NaN for none) as colours, and as numbers.

    `states` (rows × columns) has the state of a cell without a finished run, which is hatched and
    labelled with it, and "" elsewhere. A grid of more than `MAX_LABELS` rows or columns has no
    numbers.
    """
    colors, norm = _color_scale(grid[np.isfinite(grid)].tolist(), metric)
    panel.set_facecolor("whitesmoke")
    image = panel.imshow(grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    for i, j in np.argwhere(states != ""):
        box = Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="silver")
        panel.add_patch(box)
    if max(grid.shape) <= MAX_LABELS:
        for (i, j), value in np.ndenumerate(grid):
            background = colors(norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
            # Brightness as the eye sees it, weighted by red, green and blue (ITU-R BT.601).
            is_dark = np.dot(background[:3], (0.299, 0.587, 0.114)) < 0.5
            color = "white" if is_dark else "black"
            text = f"{value:.3g}" if np.isfinite(value) else str(states[i, j]) or "–"
            panel.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    panel.figure.colorbar(image, ax=panel)


def _color_scale(values: Sequence[float], metric: str) -> tuple[Colormap, Normalize]:
    """A colour map whose bright end is the better one, and the scale from values to it.

    The scale is logarithmic for positive values over more than a decade.
    """
    colors = matplotlib.colormaps["viridis_r" if goal_of(metric) == "minimize" else "viridis"]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return colors, (LogNorm if low > 0 and high > 10 * low else Normalize)(low, high)


def _parallel_axes(cells: Sequence[Cell], keys: dict[str, str], metric: str) -> Figure | None:
    """Parallel coordinates: a vertical axis for each setting and for the metric, a line a cell.

    None with fewer than two cells that have a finite mean.
    """
    cells = [c for c in cells if metric in c.metrics and np.isfinite(c.metrics[metric].mean)]
    if len(cells) < 2:
        return None
    means = [cell.metrics[metric].mean for cell in cells]
    colors, norm = _color_scale(means, metric)
    low, high = norm(min(means)), norm(max(means))
    heights: list[list[float]] = []  # axes × cells, each from 0 to 1
    figure, (axes,) = panels(1, width=max(7.0, 1.6 * (len(keys) + 1)), height=4.5)
    for x, key in enumerate(keys):
        levels = _levels(cells, key)
        level_heights = _level_heights(levels)
        heights.append([level_heights[_level(cell, key)] for cell in cells])
        labels = list(levels)
        if len(labels) > MAX_LABELS:
            labels = [labels[0], labels[len(labels) // 2], labels[-1]]
        for label in labels:
            _label_axis(axes, label, x, level_heights[label])
    heights.append([float(norm(m) - low) / float(high - low or 1) for m in means])
    # Better cells are drawn later, on top of worse ones. Lines through one level would hide each
    # other, so that each is moved up or down a little.
    sign = 1 if goal_of(metric) != "maximize" else -1
    for n in sorted(range(len(cells)), key=lambda n: -sign * means[n]):
        offset = 0.012 * (2 * n / max(1, len(cells) - 1) - 1)
        y = [height[n] + offset for height in heights[:-1]] + [heights[-1][n]]
        axes.plot(range(len(heights)), y, color=colors(norm(means[n])), alpha=0.75, linewidth=1.1)
    for x in range(len(heights)):
        axes.axvline(x, color="dimgray", linewidth=0.8)
    for height in (0.0, 0.5, 1.0) if high > low else (0.5,):
        value = norm.inverse(low + height * (high - low))
        _label_axis(axes, f"{value:.3g}", len(heights) - 1, height)
    axes.set_xticks(range(len(heights)), [*keys.values(), metric_label(metric)])
    axes.set(xlim=(-0.15, len(heights) - 0.75), ylim=(-0.06, 1.06), yticks=[])
    axes.set_title(f"{cells[0].results[0].experiment}: {len(cells)} cells")
    axes.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(norm, colors), ax=axes, label=f"{_label(metric, cells)}, mean")
    return figure


def _label_axis(axes: Axes, text: str, x: float, y: float) -> None:
    """Writes `text` beside a point of a vertical axis, on white so that lines do not hide it."""
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    offset: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
    axes.annotate(text, (x, y), fontsize=8, va="center", zorder=5, bbox=box, **offset)


def _level_heights(levels: dict[str, Any]) -> dict[str, float]:
    """The height of each level on its vertical axis, from 0 to 1.

    Words, and up to `MAX_LABELS` numbers, are evenly spaced. More numbers stand where their values
    put them, on a log scale where positive values differ by more than a factor of 30.
    """
    are_numbers = all(isinstance(value, int | float) for value in levels.values())
    if len(levels) > MAX_LABELS and are_numbers:
        values = np.array(list(levels.values()), float)
        values = np.log(values) if values.min() > 0 and values.max() > 30 * values.min() else values
        heights = (values - values.min()) / (values.max() - values.min())
    else:
        heights = np.linspace(0, 1, len(levels)) if len(levels) > 1 else np.array([0.5])
    return dict(zip(levels, heights.tolist(), strict=True))
