"""A sweep's figures against r: metrics, theory, ranks of ΔW, and spectra by r."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_lab.report.cells import RunResult
from lora_lab.report.plotting import (
    MAX_PANELS,
    legend_label,
    log_scale,
    metric_label,
    panels,
    rank_axis,
    series_style,
)
from lora_lab.report.rank_series import (
    best_series,
    best_without_rank,
    lora_runs_by_series,
    mean_spectra,
    truncation_losses,
    values_by_rank,
)
from lora_lab.report.theory import TheoryCheck


def metric_by_rank(results: Sequence[RunResult], name: str) -> Figure | None:
    """A metric against r: runs as points, their mean as a line, ΔW cut, full fine-tuning, the base.

    A colour for each series; None where no series has two ranks.
    """
    series = {
        k: own
        for k, own in lora_runs_by_series(results).items()
        if len(values_by_rank(own, name)) > 1
    }
    if not series:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    every: list[float] = []
    ticks: set[int] = set()
    kinds: dict[str, Line2D] = {}
    for i, own in enumerate(series.values()):
        color, marker = series_style(i)
        trained = values_by_rank(own, name)
        cut, top = truncation_losses(own) if name == "val/loss" else ({}, 0)
        points = [(r, value) for r, values in trained.items() for value in values]
        every += [value for _, value in points]
        axes.plot(*zip(*points, strict=True), marker, color=color, alpha=0.45, markersize=4)
        means = [mean(values) for values in trained.values()]
        (kinds["trained at r, mean"],) = axes.plot(list(trained), means, color=color)
        if shown := {k: mean(losses) for k, losses in sorted(cut.items()) if k}:
            label = f"cut from r = {top}" if len(series) == 1 else "cut from the largest r"
            line = axes.plot(list(shown), list(shown.values()), "--", color=color, linewidth=1)
            kinds[label] = line[0]
            every += shown.values()
        if theory := sorted(
            {(r.rank, h.theory) for r in own for h in r.theory_checks if h.metric == name}
        ):
            (kinds["theory"],) = axes.plot(*zip(*theory, strict=True), "k+", markersize=9)
        ticks |= {*trained, *shown}
    for method, words, color in (
        ("full", "full fine-tuning", "black"),
        ("none", "frozen base", "gray"),
    ):
        if found := best_without_rank(results, method, name):
            where, level = found
            label = f"{words}, {legend_label(where)}" if where else words
            kinds[label] = axes.axhline(level, color=color, linewidth=1.1, linestyle=":")
            every.append(level)
    axes.set(xlabel="r", ylabel=metric_label(name), title=results[0].experiment)
    rank_axis(axes, ticks)
    # What rounding leaves of a zero would fill a log axis.
    if name.endswith("loss") and min(every) > 1e-6 * max(every):
        log_scale(axes, min(every), max(every))
    axes.grid(alpha=0.3)
    _legends(figure, axes, list(series), kinds)
    return figure


def _legends(figure: Figure, axes: Axes, names: Sequence[str], kinds: dict[str, Line2D]) -> None:
    """Colours say the series, beside the plot; line styles what is drawn, below it."""
    if len(names) > 1:
        for kind, line in kinds.items():
            if kind.startswith(("trained", "cut")):
                style_of = {"linestyle": line.get_linestyle(), "linewidth": line.get_linewidth()}
                kinds[kind] = Line2D([], [], color="dimgray", **style_of)
        marks = []
        for i in range(len(names)):
            color, marker = series_style(i)
            marks.append(Line2D([], [], color=color, marker=marker, markersize=4))
        columns = 1 + (len(names) - 1) // 18
        labels = [legend_label(name) for name in names]
        figure.legend(marks, labels, loc="outside right upper", fontsize=7, ncols=columns)
        figure.set_figwidth(figure.get_figwidth() + columns * (0.6 + 0.06 * max(map(len, labels))))
    dot = Line2D([], [], color="dimgray", marker="o", linestyle="", alpha=0.6, markersize=4)
    labels = ["a run", *kinds]
    figure.legend(
        [dot, *kinds.values()], labels, loc="outside lower center", fontsize=8, ncols=len(labels)
    )


def theory_by_rank(results: Sequence[RunResult]) -> Figure | None:
    """Every metric that theory speaks of against r: measured as points, theory as a line."""
    found: dict[str, dict[str, dict[int, list[TheoryCheck]]]] = {}
    for name, own in lora_runs_by_series(results).items():
        for result in own:
            for one in result.theory_checks:
                by_r = found.setdefault(one.metric, {}).setdefault(name, {})
                by_r.setdefault(result.rank or 0, []).append(one)
    found = {
        name: series
        for name, series in found.items()
        if any(len(by_r) > 1 for by_r in series.values())
    }
    if not found:
        return None
    figure, axes = panels(len(found), width=4.5)
    for panel, (name, series) in zip(axes, found.items(), strict=True):
        ticks: set[int] = set()
        for i, (label, by_r) in enumerate(series.items()):
            color, marker = series_style(i)
            ranks = sorted(by_r)
            values = np.array([mean(o.theory for o in by_r[r]) for r in ranks])
            errors = np.array([mean(o.standard_error for o in by_r[r]) for r in ranks])
            panel.plot(ranks, values, color=color, label=f"theory {legend_label(label)}".strip())
            if errors.any():
                band = (values - 3 * errors, values + 3 * errors)
                panel.fill_between(ranks, *band, color=color, alpha=0.15, label="± 3 s.e.")
            points = [(r, o.measured) for r in ranks for o in by_r[r]]
            marks: dict[str, Any] = {"fillstyle": "none", "color": color, "label": "measured"}
            panel.plot(*zip(*points, strict=True), marker, **marks)
            ticks |= set(ranks)
        panel.set(title=metric_label(name), xlabel="r")
        rank_axis(panel, ticks)
        low, high = panel.get_ylim()
        if (middle := abs(low + high) / 2) and high - low < 0.02 * middle:
            panel.set_ylim(low - 0.02 * middle, high + 0.02 * middle)  # rounding is no shape
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


def update_ranks_by_rank(results: Sequence[RunResult]) -> Figure | None:
    """Effective and stable rank of ΔW against r, and the bound r itself.

    Of one series a line for each site, of several the mean over a run's sites.
    """
    series = {
        k: own for k, own in lora_runs_by_series(results).items() if len({r.rank for r in own}) > 1
    }
    if not series:
        return None
    figure, axes = panels(2, width=4.5)
    drawn: list[str] = []
    for panel, measure in zip(axes, ("effective_rank", "stable_rank"), strict=True):
        lines: dict[str, dict[int, list[float]]] = {}
        for name, own in series.items():
            for result in own:
                for key, value in _sites(result, measure, mean_only=len(series) > 1).items():
                    lines.setdefault(key or name, {}).setdefault(result.rank or 0, []).append(value)
        if not lines:
            return None
        if len(series) == 1:
            top = sorted(lines, key=lambda site: -max(map(mean, lines[site].values())))[:MAX_PANELS]
            lines = {site: lines[site] for site in lines if site in top}
        ticks = sorted({r for by_r in lines.values() for r in by_r})
        panel.plot(ticks, ticks, ":", color="gray", linewidth=1)
        for i, by_r in enumerate(lines.values()):
            color, marker = series_style(i)
            by_r = dict(sorted(by_r.items()))
            points = [(r, value) for r, values in by_r.items() for value in values]
            panel.plot(*zip(*points, strict=True), marker, color=color, alpha=0.45, markersize=4)
            panel.plot(list(by_r), [mean(values) for values in by_r.values()], color=color)
        panel.set(xlabel="r", ylabel=f"{measure.replace('_', ' ')} of ΔW")
        rank_axis(panel, set(ticks))
        top = max(ticks)  # the most that it can be stays in sight
        panel.set_ylim(0.95, max(2, 1.15 * top))
        if top > 10:
            log_scale(panel, 1, top)
        panel.grid(alpha=0.3)
        drawn = list(lines)
    marks = [Line2D([], [], color="gray", linestyle=":", linewidth=1)]
    for i in range(len(drawn)):
        color, marker = series_style(i)
        marks.append(Line2D([], [], color=color, marker=marker, markersize=4))
    labels = ["r, the most it can be", *(legend_label(name) for name in drawn)]
    figure.legend(marks, labels, loc="outside right upper", fontsize=8)
    figure.set_figwidth(figure.get_figwidth() + 0.6 + 0.07 * max(map(len, labels)))
    return figure


def _sites(result: RunResult, measure: str, mean_only: bool) -> dict[str, float]:
    """A measure of ΔW by site; by "" its mean."""
    found = {
        key.removeprefix("spectra/").removesuffix(f"/{measure}"): value
        for key, value in result.metrics.items()
        if key.startswith("spectra/") and key.endswith(f"/{measure}")
    }
    return {"": mean(found.values())} if mean_only and found else found


def spectra_by_rank(results: Sequence[RunResult]) -> Figure | None:
    """σ_i against i for each r, the mean over its runs; a panel for each of the largest sites.

    Of several series the one that reaches the lowest loss.
    """
    name, own = best_series(results)
    every = mean_spectra(own)
    if not every:
        return None
    by_norm = sorted(every, key=lambda s: -max(np.linalg.norm(v) for v in every[s].values()))
    shown = {site: every[site] for site in every if site in by_norm[:MAX_PANELS]}
    ranks = sorted({r for by_r in shown.values() for r in by_r})
    colors = {
        r: matplotlib.colormaps["viridis"](0.92 * i / max(1, len(ranks) - 1))
        for i, r in enumerate(ranks)
    }
    figure, axes = panels(len(shown), width=4)
    for panel, (site, by_r) in zip(axes, shown.items(), strict=True):
        peak = max(values.max() for values in by_r.values())
        for r, values in by_r.items():
            # What rounding leaves of a zero has no place on a log axis.
            values = np.where(values > 1e-7 * peak, values, np.nan)
            panel.plot(np.arange(1, len(values) + 1), values, ".-", color=colors[r], linewidth=1)
        shown_values = [v for values in by_r.values() for v in values if v > 1e-7 * peak]
        panel.set(title=legend_label(site), xlabel="i", ylabel=r"$\sigma_i$ of ΔW")
        log_scale(panel, min(shown_values), peak)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3, which="both")
    marks = [Line2D([], [], color=color, marker=".") for color in colors.values()]
    columns = 1 + (len(ranks) - 1) // 20
    figure.legend(
        marks, [f"r = {r}" for r in ranks], loc="outside right upper", fontsize=8, ncols=columns
    )
    figure.set_figwidth(figure.get_figwidth() + 0.9 * columns)
    parts = [f"the series with the lowest loss: {name}"] if name else []
    parts += [f"{len(shown)} of {len(every)} sites"] if len(shown) < len(every) else []
    if parts:
        figure.suptitle("; ".join(parts), fontsize=9)
    return figure
