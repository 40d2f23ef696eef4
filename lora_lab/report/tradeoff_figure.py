"""A sweep's trade-off."""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_lab.report.cells import Cell, cell_label, goal_of, swept_keys
from lora_lab.report.plotting import COLORS, log_scale, metric_label

MAX_LABELS = 16
"""Cells on the front that are named, at most; values of a key that its axis names."""


def pareto_front(points: Sequence[tuple[float, float]], goal: str) -> list[int]:
    """The points (cost, metric) that no other beats in one and equals in the other, by cost."""
    sign = 1 if goal == "minimize" else -1
    best, found = np.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        cost, value = points[i][0], sign * points[i][1]
        same = bool(found) and (cost, value) == (points[found[-1]][0], best)
        if value < best or same:
            found.append(i)
            best = value
    return found


def metric_by_parameters(cells: Sequence[Cell], metric: str) -> Figure | None:
    """Trained parameters against a metric, mean ± deviation of each cell, with the front marked.

    None of fewer than two costs.
    """
    cost = "parameters/trainable"
    cells = [cell for cell in cells if metric in cell.metrics and cost in cell.metrics]
    cells = [cell for cell in cells if np.isfinite(cell.metrics[metric].mean)]
    frozen = [c.metrics[metric].mean for c in cells if not c.metrics[cost].mean]
    cells = [cell for cell in cells if cell.metrics[cost].mean]
    points = [(cell.metrics[cost].mean, cell.metrics[metric].mean) for cell in cells]
    direction = goal_of(metric)
    if len({c for c, _ in points}) < 2 or direction is None:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    errors = [cell.metrics[metric].std or 0.0 for cell in cells]
    at = pareto_front(points, direction)
    bars: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "linestyle": "", "zorder": 3}
    for which, color, label in (
        ([i for i in range(len(points)) if i not in at], "darkgray", "a cell, ± one deviation"),
        (at, COLORS[0], "on the front: none is cheaper and better"),
    ):
        if which:
            x, y = zip(*(points[i] for i in which), strict=True)
            spread = [errors[i] for i in which]
            axes.errorbar(x, y, spread, fmt="o", color=color, markersize=5, label=label, **bars)
    axes.step(*zip(*(points[i] for i in at), strict=True), where="post", color=COLORS[0], lw=0.9)
    keys = swept_keys(cells)
    legend = {}
    below = direction == "minimize"  # the front is the lower edge then
    for letter, i in zip(ascii_lowercase, at[:MAX_LABELS], strict=False):
        text = cell_label(cells[i], keys)
        if list(keys) != ["adapter.r"]:
            legend[letter], text = text, letter
        offset, place = ((5, -5), "top") if below else ((5, 5), "bottom")
        axes.annotate(
            text, points[i], offset, textcoords="offset points", fontsize=8, va=place, zorder=4
        )
    axes.margins(x=0.12, y=0.14)  # room for the labels
    log_scale(axes, points[at[0]][0], max(c for c, _ in points), "x")
    if frozen:
        axes.axhline(frozen[0], color="gray", linewidth=1.1, linestyle=":", label="frozen base")
    axes.set(
        xlabel="trained parameters",
        ylabel=metric_label(metric),
        title=cells[0].results[0].experiment,
    )
    values = [*frozen, *(value for _, value in points)]
    lowest = min(*frozen, *(v - e for (_, v), e in zip(points, errors, strict=True)), max(values))
    if metric.endswith("loss") and min(values) > 1e-6 * max(values) and lowest > 0:
        log_scale(axes, lowest, max(values))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    if legend:
        labels = [f"{letter}: {text}" for letter, text in legend.items()]
        marks = [Line2D([], [], linestyle="")] * len(labels)
        where: dict[str, Any] = {"loc": "outside right upper", "fontsize": 7, "handlelength": 0}
        figure.legend(marks, labels, title="on the front", title_fontsize=8, **where)
        figure.set_figwidth(figure.get_figwidth() + 0.5 + 0.06 * max(map(len, labels)))
    return figure
