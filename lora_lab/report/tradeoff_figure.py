"""A sweep's figure of what cells cost against a metric, with Pareto fronts."""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lora_lab.report.cells import Cell, cell_label, epoch_of, swept_keys
from lora_lab.report.cost import FLOPS, MEMORY, SECONDS, Column, differing_costs
from lora_lab.report.epochs import goal_of
from lora_lab.report.plotting import COLORS, log_scale, metric_label, panels
from lora_lab.report.tables import unit_of

PARAMETERS = "parameters/trainable"
MAX_LABELS = 16
"""Largest number of cells on the fronts that are labelled, the cheapest first."""

Point = tuple[float, float]
"""A cell's cost and its mean metric."""

Labels = dict[str, tuple[str, str]]
"""By the name of a cell its label in the panels, and the text of a letter in the legend, or ""."""


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


def metric_by_costs(cells: Sequence[Cell], metric: str) -> Figure | None:
    """Costs against a metric, mean ± deviation of each cell, with the front marked: a panel each.

    One for trained parameters, and one for each measured cost in which cells differ. Cells without
    trained parameters are the frozen base, a horizontal line. None where cells have no two
    different costs, or where it is not known which values of the metric are better.
    """
    cells = [cell for cell in cells if metric in cell.metrics and PARAMETERS in cell.metrics]
    cells = [cell for cell in cells if np.isfinite(cell.metrics[metric].mean)]
    frozen = [cell.metrics[metric].mean for cell in cells if not cell.metrics[PARAMETERS].mean]
    cells = [cell for cell in cells if cell.metrics[PARAMETERS].mean]
    direction = goal_of(metric)
    costs = _costs(cells)
    if not costs or direction is None:
        return None
    in_panels = [[c for c in cells if cost.metric in c.metrics] for cost in costs]
    fronts = [
        pareto_front(_points(members, cost.metric, metric), direction)
        for members, cost in zip(in_panels, costs, strict=True)
    ]
    on_fronts = [
        members[i] for members, front in zip(in_panels, fronts, strict=True) for i in front
    ]
    labels = _labels(list({cell.name: cell for cell in on_fronts}.values()), swept_keys(cells))
    in_row = 3 if len(costs) == 3 else 2
    figure, all_axes = panels(len(costs), 5.5 if in_row == 3 else 7, 4.5, in_row)
    for axes, members, cost, front in zip(all_axes, in_panels, costs, fronts, strict=True):
        _draw_panel(axes, members, metric, cost, front, labels, frozen)
    _set_metric_axes(all_axes, cells, metric, frozen)
    figure.suptitle(cells[0].results[0].experiment)
    entries = [axes.get_legend_handles_labels() for axes in all_axes]
    by_label = {n: h for handles, names in entries for h, n in zip(handles, names, strict=True)}
    handles, names = list(by_label.values()), list(by_label)
    figure.legend(handles, names, loc="outside lower center", fontsize=8, ncols=3)
    if texts_by_letter := {label: text for label, text in labels.values() if text}:
        _add_front_legend(figure, texts_by_letter)
    return figure


def _costs(cells: Sequence[Cell]) -> list[Column]:
    """Trained parameters, where two cells differ in them, and measured costs that differ."""
    parameters = Column(PARAMETERS, "", "trained parameters", "", 0)
    has_two = len({cell.metrics[PARAMETERS].mean for cell in cells}) > 1
    measured = [c for c in differing_costs(cells) if c.metric in (FLOPS, SECONDS, MEMORY)]
    return [*([parameters] if has_two else []), *measured]


def _points(cells: Sequence[Cell], cost: str, metric: str) -> list[Point]:
    return [(cell.metrics[cost].mean, cell.metrics[metric].mean) for cell in cells]


def _draw_panel(
    axes: Axes,
    cells: Sequence[Cell],
    metric: str,
    cost: Column,
    front: list[int],
    labels: Labels,
    frozen: Sequence[float],
) -> None:
    """Draws the cells by one cost, and the frozen base, the metric's axis apart."""
    points = _points(cells, cost.metric, metric)
    errors = [[c.metrics[m].std or 0.0 for c in cells] for m in (metric, cost.metric)]
    _draw_cells(axes, points, errors, front)
    below = goal_of(metric) == "minimize"  # the front is then the lower edge of the points
    offset, place = ((5, -5), "top") if below else ((5, 5), "bottom")
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "zorder": 4}
    for i in front:
        if label := labels.get(cells[i].name):
            axes.annotate(label[0], points[i], offset, va=place, **style)
    axes.margins(x=0.12, y=0.14)  # room for the labels
    log_scale(axes, points[front[0]][0], max(x for x, _ in points), "x")
    label = cost.label
    if cost.unit:
        size, unit = unit_of(max(x for x, _ in points), cost.unit)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:,.4g}"))
        label += f" ({unit})"
    if frozen:
        axes.axhline(frozen[0], color="gray", linewidth=1.1, linestyle=":", label="no adapter")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def _set_metric_axes(
    all_axes: Sequence[Axes], cells: Sequence[Cell], metric: str, frozen: Sequence[float]
) -> None:
    """Labels the axes of the metric, those of a loss logarithmic."""
    results = [result for cell in cells for result in cell.results]
    statistics = [cell.metrics[metric] for cell in cells]
    values = [*frozen, *(s.mean for s in statistics)]
    lowest = min(*frozen, *(s.mean - (s.std or 0.0) for s in statistics), max(values))
    # A log axis has no place for an error bar that reaches below 0, and would be stretched over
    # many decades by a loss of zero, which comes out as rounding error.
    is_log = metric.endswith("loss") and min(values) > 1e-6 * max(values) and lowest > 0
    for axes in all_axes:
        axes.set_ylabel(f"{metric_label(metric)} {epoch_of(metric, results)}")
        if is_log:
            log_scale(axes, lowest, max(values))


def _draw_cells(
    axes: Axes, points: list[Point], errors: list[list[float]], front: list[int]
) -> None:
    """Draws each cell with error bars, those of the front in blue and joined by a step line.

    `errors` are the deviations of the metric, and of the cost.
    """
    style: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "linestyle": "", "zorder": 3}
    others = [i for i in range(len(points)) if i not in front]
    behind = (others, "darkgray", "a cell, ± one deviation")
    on_front = (front, COLORS[0], "on the front: none is cheaper and better")
    for indices, color, label in (behind, on_front):
        if indices:
            x, y = zip(*(points[i] for i in indices), strict=True)
            bars = [[deviations[i] for i in indices] for deviations in errors]
            axes.errorbar(x, y, *bars, fmt="o", color=color, markersize=5, label=label, **style)
    axes.step(*zip(*(points[i] for i in front), strict=True), where="post", color=COLORS[0], lw=0.9)


def _labels(cells: Sequence[Cell], keys: dict[str, str]) -> Labels:
    """What the cells on a front are labelled with: r if only r was swept, otherwise a letter."""
    texts = {cell.name: cell_label(cell, keys) for cell in cells[:MAX_LABELS]}
    if list(keys) == ["adapter.r"]:
        return {name: (text, "") for name, text in texts.items()}
    pairs = zip(texts.items(), ascii_lowercase, strict=False)
    return {name: (letter, text) for (name, text), letter in pairs}


def _add_front_legend(figure: Figure, texts_by_letter: dict[str, str]) -> None:
    """Adds the legend of the letters on the front, to the right of the plot."""
    labels = [f"{letter}: {text}" for letter, text in texts_by_letter.items()]
    marks = [Line2D([], [], linestyle="")] * len(labels)
    style: dict[str, Any] = {"loc": "outside right upper", "fontsize": 7, "handlelength": 0}
    figure.legend(marks, labels, title="on the front", title_fontsize=8, **style)
    figure.set_figwidth(figure.get_figwidth() + 0.5 + 0.06 * max(map(len, labels)))
