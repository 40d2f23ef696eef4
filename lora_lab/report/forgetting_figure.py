"""A sweep's figure of what was gained on the new data against what was forgotten of the old."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_lab.report import plotting, rank_series
from lora_lab.report.cells import RunResult

Point = tuple[float, float]
"""What a run has forgotten (forget/increase), and what it has gained of val/loss."""

OTHERS = {"full": ("full fine-tuning", "*", "black"), "none": ("no adapter", "X", "gray")}
"""Methods without r: their label, marker and colour."""


def gain_by_forgetting(results: Sequence[RunResult]) -> Figure | None:
    """By how much the validation loss fell against by how much that on what the base knew rose.

    Each run is a small point. A series is a line through the means of its ranks, with ± standard
    deviations, and a dashed one through the cuts of its largest rank; full fine-tuning and the
    frozen base are points. None where no run that trained has measured forgetting.
    """
    results = [
        r for r in results if {"forget/increase", "forget/loss", "val/loss"} <= r.last.keys()
    ]
    if not any(result.config["adapter"]["method"] != "none" for result in results):
        return None
    figure, (axes,) = plotting.panels(1, width=7, height=4.5)
    series = rank_series.lora_runs_by_series(results)
    lines: dict[str, Any] = {}
    for i, (name, runs) in enumerate(series.items()):
        _draw_cuts(axes, runs, i, lines)
        _draw_series(axes, runs, i, plotting.legend_label(name) or "trained at r, mean", lines)
    for method, (label, marker, color) in OTHERS.items():
        if runs := [r for r in results if r.config["adapter"]["method"] == method]:
            style = {"fmt": marker, "color": color, "markersize": 10, "zorder": 4}
            for cell in rank_series.runs_by_series(runs).values():
                lines[label] = _draw_mean(axes, [_point(run) for run in cell], style)
    axes.axvline(0, color="lightgray", linewidth=0.8, zorder=0)
    axes.axhline(0, color="lightgray", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="forgotten: rise of the loss on what the base knew",
        ylabel="gained: fall of the validation loss",
        title=results[0].experiment,
    )
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    dot = Line2D([], [], color="dimgray", marker="o", linestyle="", alpha=0.6, markersize=4)
    labels, marks = ["a run", *lines], [dot, *lines.values()]
    figure.legend(marks, labels, loc="outside lower center", fontsize=8, ncols=min(len(labels), 4))
    return figure


def _point(run: RunResult) -> Point:
    return run.last["forget/increase"], run.first["val/loss"] - run.last["val/loss"]


def _draw_series(
    axes: Axes, runs: Sequence[RunResult], i: int, label: str, lines: dict[str, Any]
) -> None:
    """Draws the i-th series: its runs, and their mean at each r, which is written beside it."""
    by_rank: dict[int, list[Point]] = {}
    for run in sorted(runs, key=lambda run: run.rank or 0):
        by_rank.setdefault(run.rank or 0, []).append(_point(run))
    color, marker = plotting.series_style(i)
    points = [point for at_rank in by_rank.values() for point in at_rank]
    axes.plot(*zip(*points, strict=True), marker, color=color, alpha=0.4, markersize=4)
    style = {"fmt": marker, "color": color, "markersize": 6, "zorder": 3}
    for r, at_rank in by_rank.items():
        bars = _draw_mean(axes, at_rank, style)
        axes.annotate(f"r={r}", _mean(at_rank), (5, 5), textcoords="offset points", fontsize=8)
        lines.setdefault(label, bars)
    means = [_mean(at_rank) for at_rank in by_rank.values()]
    axes.plot(*zip(*means, strict=True), color=color, linewidth=1)


def _draw_cuts(axes: Axes, runs: Sequence[RunResult], i: int, lines: dict[str, Any]) -> None:
    """Draws the means of the i-th series' largest rank with ΔW cut to each lower one."""
    losses, largest = rank_series.values_after_cut(runs, "val/loss")
    forgetting, _ = rank_series.values_after_cut(runs, "forget/loss")
    of_largest = [run for run in runs if run.rank == largest]
    before = {name: mean(run.first[name] for run in of_largest) for name in ("val/loss",)}
    before["forget/loss"] = mean(
        run.last["forget/loss"] - run.last["forget/increase"] for run in of_largest
    )
    points = _means_of_cuts(losses, forgetting, before)
    if len(points) < 2:
        return
    color, _ = plotting.series_style(i)
    (line,) = axes.plot(*zip(*points, strict=True), ".--", color=color, linewidth=0.9, alpha=0.7)
    lines.setdefault("cut from the largest r", line)


def _means_of_cuts(
    losses: Mapping[int, Sequence[float]],
    forgetting: Mapping[int, Sequence[float]],
    before: Mapping[str, float],
) -> list[Point]:
    """For each rank that both losses are known of, how far their means are from those before."""
    return [
        (mean(forgetting[k]) - before["forget/loss"], before["val/loss"] - mean(losses[k]))
        for k in losses
        if k in forgetting
    ]


def _draw_mean(axes: Axes, points: Sequence[Point], style: dict[str, Any]) -> Any:
    """Draws the mean of some points, with a bar of ± one standard deviation in both directions."""
    (x, y), deviations = _mean(points), [0.0, 0.0]
    if len(points) > 1:
        deviations = [stdev(values) for values in zip(*points, strict=True)]
    return axes.errorbar(x, y, deviations[1], deviations[0], elinewidth=0.8, capsize=2, **style)


def _mean(points: Sequence[Point]) -> Point:
    x, y = (mean(values) for values in zip(*points, strict=True))
    return x, y
