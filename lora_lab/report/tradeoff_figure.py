"""A sweep's figure of trained parameters against a metric, with its Pareto front."""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_lab.report.cells import Cell, cell_label, epoch_of, swept_keys
from lora_lab.report.epochs import goal_of
from lora_lab.report.plotting import COLORS, log_scale, metric_label, panels

COST = "parameters/trainable"
MAX_LABELS = 16
"""Largest number of cells on the front that are labelled, the cheapest first."""

Point = tuple[float, float]
"""A cell's cost (trained parameters) and its mean metric."""


def pareto_front(points: Sequence[Point], direction: str) -> list[int]:
    """The indices of the points on the Pareto front, by ascending cost.

    A point is on it if no other is at least as good in both cost and metric, and better in one.
    Equal points are on it together. The best cost is the lowest, the best metric as
    `direction` says: `minimize` or `maximize`.
    """
    sign = 1 if direction == "minimize" else -1
    points = [(cost, sign * value) for cost, value in points]  # of both, lower is better now
    front: list[int] = []
    # By ascending cost, a point is on the front if it beats all cheaper ones. Among points of one
    # cost the best comes first, so that only those equal to it can follow.
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        last = points[front[-1]] if front else (-np.inf, np.inf)
        if points[i][1] < last[1] or points[i] == last:
            front.append(i)
    return front


def metric_by_parameters(cells: Sequence[Cell], metric: str) -> Figure | None:
    """Trained parameters against a metric, mean ± deviation of each cell, with the front marked.

    Cells without trained parameters are the frozen base, a horizontal line. None where the others
    have fewer than two different costs, or where it is not known which values of the metric are
    better.
    """
    cells = [cell for cell in cells if metric in cell.metrics and COST in cell.metrics]
    cells = [cell for cell in cells if np.isfinite(cell.metrics[metric].mean)]
    frozen = [cell.metrics[metric].mean for cell in cells if not cell.metrics[COST].mean]
    cells = [cell for cell in cells if cell.metrics[COST].mean]
    points = [(cell.metrics[COST].mean, cell.metrics[metric].mean) for cell in cells]
    direction = goal_of(metric)
    if len({cost for cost, _ in points}) < 2 or direction is None:
        return None
    figure, (axes,) = panels(1, width=7, height=4.5)
    errors = [cell.metrics[metric].std or 0.0 for cell in cells]
    front = pareto_front(points, direction)
    _draw_cells(axes, points, errors, front)
    below = direction == "minimize"  # the front is then the lower edge of the points
    texts_by_letter = _label_front(axes, cells, points, front, below)
    axes.margins(x=0.12, y=0.14)  # room for the labels
    log_scale(axes, points[front[0]][0], max(cost for cost, _ in points), "x")
    if frozen:
        axes.axhline(frozen[0], color="gray", linewidth=1.1, linestyle=":", label="no adapter")
    title = cells[0].results[0].experiment
    results = [result for cell in cells for result in cell.results]
    label = f"{metric_label(metric)} {epoch_of(metric, results)}"
    axes.set(xlabel="trained parameters", ylabel=label, title=title)
    values = [*frozen, *(value for _, value in points)]
    lowest = min(*frozen, *(v - e for (_, v), e in zip(points, errors, strict=True)), max(values))
    # A log axis has no place for an error bar that reaches below 0, and would be stretched over
    # many decades by a loss of zero, which comes out as rounding error.
    if metric.endswith("loss") and min(values) > 1e-6 * max(values) and lowest > 0:
        log_scale(axes, lowest, max(values))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    if texts_by_letter:
        _add_front_legend(figure, texts_by_letter)
    return figure


def _draw_cells(axes: Axes, points: list[Point], errors: list[float], front: list[int]) -> None:
    """Draws each cell with an error bar, those of the front in blue and joined by a step line."""
    style: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "linestyle": "", "zorder": 3}
    others = [i for i in range(len(points)) if i not in front]
    behind = (others, "darkgray", "a cell, ± one deviation")
    on_front = (front, COLORS[0], "on the front: none is cheaper and better")
    for indices, color, label in (behind, on_front):
        if indices:
            x, y = zip(*(points[i] for i in indices), strict=True)
            bars = [errors[i] for i in indices]
            axes.errorbar(x, y, bars, fmt="o", color=color, markersize=5, label=label, **style)
    axes.step(*zip(*(points[i] for i in front), strict=True), where="post", color=COLORS[0], lw=0.9)


def _label_front(
    axes: Axes, cells: Sequence[Cell], points: Sequence[Point], front: Sequence[int], below: bool
) -> dict[str, str]:
    """Labels the cells of the front, below or above their points, with r if only r was swept.

    Otherwise the labels are letters, and letter → settings is returned for a legend.
    """
    keys = swept_keys(cells)
    texts_by_letter = {}
    offset, place = ((5, -5), "top") if below else ((5, 5), "bottom")
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "zorder": 4}
    for letter, i in zip(ascii_lowercase, front[:MAX_LABELS], strict=False):
        text = cell_label(cells[i], keys)
        if list(keys) != ["adapter.r"]:
            texts_by_letter[letter], text = text, letter
        axes.annotate(text, points[i], offset, va=place, **style)
    return texts_by_letter


def _add_front_legend(figure: Figure, texts_by_letter: dict[str, str]) -> None:
    """Adds the legend of the letters on the front, to the right of the plot."""
    labels = [f"{letter}: {text}" for letter, text in texts_by_letter.items()]
    marks = [Line2D([], [], linestyle="")] * len(labels)
    style: dict[str, Any] = {"loc": "outside right upper", "fontsize": 7, "handlelength": 0}
    figure.legend(marks, labels, title="on the front", title_fontsize=8, **style)
    figure.set_figwidth(figure.get_figwidth() + 0.5 + 0.06 * max(map(len, labels)))
