"""A sweep's figure of learning rate and rank: a metric over lr for each r, and the best lr by r."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_lab.report import plotting
from lora_lab.report.best_learning_rate import BestRate, Parabola, RateCurve
from lora_lab.report.cell_statistics import statistics_of
from lora_lab.report.cells import epoch_of
from lora_lab.report.cut_report import interval_text
from lora_lab.report.rate_by_rank import FULL, RateSweep, Trend, trend_of

Color = Any
"""A colour as matplotlib takes it."""


def learning_rate_figure(sweeps: Sequence[RateSweep]) -> Figure | None:
    """The first of the series of one metric, which has the best value of all; None without one."""
    if not sweeps:
        return None
    sweep = sweeps[0]
    ranks = [r for r in sweep.curves if r != FULL]
    colors: dict[int, Color] = dict(zip(ranks, plotting.graded_colors(len(ranks)), strict=True))
    colors = {FULL: "black"} | colors if FULL in sweep.curves else colors
    figure, axes = plotting.panels(1 + (len(ranks) > 1), width=5.5, height=4.8)
    marks = _draw_curves(axes[0], sweep, colors)
    if len(ranks) > 1:
        marks |= _draw_best_rates(axes[1], sweep, colors)
    # Below the panels, where no curve is.
    columns = 7 if len(ranks) > 1 else 4
    figure.legend(
        [*marks.values()], [*marks], loc="outside lower center", fontsize=8, ncols=columns
    )
    title = sweep.results[0].experiment
    figure.suptitle(f"{title}, the best series: {sweep.series}" if len(sweeps) > 1 else title)
    return figure


def _draw_curves(axes: Axes, sweep: RateSweep, colors: dict[int, Color]) -> dict[str, Line2D]:
    """Draws each curve: mean ± deviation over seeds, its parabola and best point, and crosses.

    Returns the legend's lines by their labels.
    """
    marks: dict[str, Line2D] = {}
    for i, (r, curve) in enumerate(sweep.curves.items()):
        label = "full" if r == FULL else f"r = {r}"
        marks[label] = _draw_means(axes, curve, colors[r])
        best = sweep.best.get(r)
        if best and best.lr and best.parabola:
            _draw_parabola(axes, best.parabola, best.lr, colors[r])
        # Crosses of several ranks at one rate stand above each other, at the top of the panel.
        height = 0.98 - 0.03 * i
        for lr in curve.diverged:
            axes.plot(lr, height, "x", color=colors[r], transform=axes.get_xaxis_transform())
    lines = {"seeds' parabola": Line2D([], [], color="dimgray", linestyle="--", linewidth=1)}
    lines["its best"] = Line2D([], [], color="dimgray", marker="*", linestyle="", markersize=9)
    lines["diverged"] = Line2D([], [], color="dimgray", marker="x", linestyle="")
    has_best = any(best.lr for best in sweep.best.values())
    has_diverged = any(curve.diverged for curve in sweep.curves.values())
    shown = {"diverged": has_diverged, "its best": has_best, "seeds' parabola": has_best}
    marks |= {label: line for label, line in lines.items() if shown[label]}
    label = f"{plotting.metric_label(sweep.metric)} {epoch_of(sweep.metric, sweep.results)}"
    axes.set(xlabel="learning rate", ylabel=f"{label}, mean ± std")
    _set_scales(axes, sweep)
    axes.grid(alpha=0.3)
    return marks


def _draw_means(axes: Axes, curve: RateCurve, color: Color) -> Line2D:
    """Draws the mean and deviation at each rate at which no run diverged; returns the line."""
    statistics = [statistics_of([*curve.values[lr].values()]) for lr in curve.means]
    deviations = [s.std or 0.0 if s else 0.0 for s in statistics]
    style: dict[str, Any] = {"fmt": "o-", "markersize": 4, "linewidth": 1.2}
    bars = {"elinewidth": 0.8, "capsize": 2, "color": color}
    rates = [*curve.means]
    return axes.errorbar(rates, [*curve.means.values()], deviations, **style, **bars).lines[0]


def _draw_parabola(axes: Axes, parabola: Parabola, lr: float, color: Color) -> None:
    """Draws a parabola over the rates that it was fitted to, and a star at its best point."""
    rates = np.geomspace(parabola.low, parabola.high, 60)
    axes.plot(rates, parabola.at(rates), "--", color=color, linewidth=1)
    at_best = float(parabola.at(np.array([lr]))[0])
    axes.plot(lr, at_best, "*", color=color, markersize=9, markeredgecolor="white", zorder=4)


def _set_scales(axes: Axes, sweep: RateSweep) -> None:
    """Makes lr logarithmic, and a positive loss too, with room above for the crosses."""
    rates = sorted({lr for curve in sweep.curves.values() for lr in curve.rates})
    plotting.log_scale(axes, rates[0], rates[-1], "x")
    axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    values = [value for curve in sweep.curves.values() for value in curve.means.values()]
    if sweep.metric.endswith("loss") and min(values) > 1e-6 * max(values):
        plotting.log_scale(axes, min(values), max(values))
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(values) / 3))


def _draw_best_rates(axes: Axes, sweep: RateSweep, colors: dict[int, Color]) -> dict[str, Line2D]:
    """Draws the best rate of each r with its interval, its trend, and one rate for all r.

    Returns the legend's lines by their labels.
    """
    marks: dict[str, Line2D] = {}
    lora = {r: best for r, best in sweep.best.items() if r != FULL}
    rates = [lr for r in lora for lr in sweep.curves[r].rates]
    for r, best in lora.items():
        _draw_best_rate(axes, r, best, colors[r])
    known = [best.point for best in lora.values() if best.point]
    if known:
        level = math.exp(sum(map(math.log, known)) / len(known))
        line = axes.axhline(level, color="dimgray", linestyle=":", linewidth=1.2)
        marks["one lr for all r"] = line
    if trend := trend_of(sweep):
        label = f"slope {interval_text(trend.slope, trend.interval)}"
        marks[label] = _draw_trend(axes, trend)
    full = sweep.best.get(FULL)
    if full and full.lr:
        rates.append(full.lr)
        marks["best lr, full"] = axes.axhline(full.lr, color="black", linewidth=1)
        if full.interval:
            axes.axhspan(*full.interval, color="black", alpha=0.08)
    axes.set(xlabel="r", ylabel="best learning rate, 95% interval")
    plotting.rank_axis(axes, set(lora))
    plotting.log_scale(axes, min(rates), max(rates))
    axes.set_ylim(min(rates) / 1.3, max(rates) * 1.3)
    axes.grid(alpha=0.3)
    return marks


def _draw_best_rate(axes: Axes, r: int, best: BestRate, color: Color) -> None:
    """Draws the best rate with its interval.

    A hollow point has no interval. Where no parabola tells the rate, the best that was tried is a
    square, with a line over the rates between which the best one lies; at an edge it is a triangle
    that points outward.
    """
    low, high = best.interval or best.bounds or (None, None)
    marker = "o"
    if best.lr is None:
        marker = "s" if best.point else ("v" if low == 0 else "^")
    rate = best.lr or best.tried
    fill: Any = "full" if best.interval else "none"
    axes.plot(r, rate, marker, color=color, fillstyle=fill)
    if low and high and high < math.inf:
        bars = [[rate - low], [high - rate]]
        axes.errorbar([r], [rate], bars, fmt="none", ecolor=color, elinewidth=1, capsize=3)


def _draw_trend(axes: Axes, trend: Trend) -> Line2D:
    """Draws the line through the best rates, and returns it."""
    ranks = np.array([trend.ranks[0], trend.ranks[-1]])
    rates = np.exp(trend.intercept) * ranks**trend.slope
    (line,) = axes.plot(ranks, rates, "--", color=plotting.COLORS[1])
    return line
