"""A sweep's figures against r: metrics, theory, the effective and stable rank of ΔW, and spectra.

Runs that differ only in r and seeds form a series (rank_series.py), which has one colour. Each
function returns None where there is nothing to draw.
"""

from collections.abc import Sequence
from itertools import cycle
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_lab.report import plotting, rank_series
from lora_lab.report.cell_statistics import statistics_of
from lora_lab.report.cells import RunResult, epoch_of
from lora_lab.report.theory import TheoryCheck


def metric_by_rank(results: Sequence[RunResult], metric: str) -> Figure | None:
    """A metric against r: each run as a point, the mean over the runs of a series and r as a line.

    Full fine-tuning and the frozen base are horizontal lines. The largest r of each series is also
    shown cut to lower ranks, and cut and healed: mean ± standard deviation over its runs. None
    where no series has two ranks.
    """
    series = rank_series.series_over_ranks(results, metric)
    if not series:
        return None
    figure, (axes,) = plotting.panels(1, width=7, height=4.5)
    lines: dict[str, Line2D] = {}
    points: list[tuple[int, float]] = []
    for i, runs in enumerate(series.values()):
        series_lines, drawn = _draw_series(axes, runs, metric, i, is_only=len(series) == 1)
        lines |= series_lines
        points += drawn
    values = [value for _, value in points]
    references = (("full", "full fine-tuning", "black"), ("none", "no adapter", "gray"))
    for method, label, color in references:
        if reference := rank_series.best_reference(results, method, metric):
            name, level = reference
            label = f"{label}, {plotting.legend_label(name)}" if name else label
            lines[label] = axes.axhline(level, color=color, linewidth=1.1, linestyle=":")
            values.append(level)
    label = f"{plotting.metric_label(metric)} {epoch_of(metric, results)}"
    axes.set(xlabel="r", ylabel=label, title=results[0].experiment)
    plotting.rank_axis(axes, {r for r, _ in points})
    # A loss of zero comes out as rounding error, which would stretch a log axis over many decades.
    if metric.endswith("loss") and min(values) > 1e-6 * max(values):
        plotting.log_scale(axes, min(values), max(values))
    axes.grid(alpha=0.3)
    _add_legends(figure, list(series), lines)
    return figure


def _draw_series(
    axes: Axes, runs: Sequence[RunResult], metric: str, i: int, is_only: bool
) -> tuple[dict[str, Line2D], list[tuple[int, float]]]:
    """Draws the i-th series: its runs, their means, the truncation curve, and theory.

    Returns the lines by their label in the legend, and the points drawn, theory left out.
    """
    by_rank = rank_series.values_by_rank(runs, metric)
    lines = {"trained at r, mean": _draw_runs_and_means(axes, by_rank, i)}
    points = [(r, value) for r, values in by_rank.items() for value in values]
    # ΔW, which is cut, and what theory says are of the training's end.
    suffix = ", at the end" if runs[0].at == "best" else ""
    cut, largest = rank_series.values_after_cut(runs, metric)
    source = f"r = {largest}" if is_only else "the largest r"
    after_cut = {f"cut from {source}": ("--", cut)}
    all_healed = rank_series.values_after_healing(runs, metric).items()
    for (steps, healed), style in zip(all_healed, cycle(("-.", ":")), strict=False):
        after_cut[f"cut, and trained {steps} steps more"] = style, healed
    for label, (style, values) in after_cut.items():
        # k = 0, with nothing left of ΔW, has no place on a log axis.
        if values := {k: at_rank for k, at_rank in values.items() if k}:
            lines[label + suffix], drawn = _draw_means_and_deviations(axes, values, i, style)
            points += drawn
    theory = {(run.rank, c.theory) for run in runs for c in run.theory_checks if c.metric == metric}
    if theory:
        (lines[f"theory{suffix}"],) = axes.plot(
            *zip(*sorted(theory), strict=True), "k+", markersize=9
        )
    return lines, points


def _draw_runs_and_means(axes: Axes, by_rank: dict[int, list[float]], i: int) -> Line2D:
    """Draws each value as a point and the mean of each r as a line, which is returned.

    They have the colour and marker of the i-th series.
    """
    color, marker = plotting.series_style(i)
    points = [(r, value) for r, values in by_rank.items() for value in values]
    axes.plot(*zip(*points, strict=True), marker, color=color, alpha=0.45, markersize=4)
    (line,) = axes.plot(list(by_rank), list(map(mean, by_rank.values())), color=color)
    return line


def _draw_means_and_deviations(
    axes: Axes, by_rank: dict[int, list[float]], i: int, style: str
) -> tuple[Line2D, list[tuple[int, float]]]:
    """Draws the mean of each rank as a line in the colour of the i-th series, with ± deviations.

    Returns the line and its points.
    """
    color, _ = plotting.series_style(i)
    statistics = {k: s for k, values in by_rank.items() if (s := statistics_of(values))}
    means = {k: s.mean for k, s in statistics.items()}
    deviations = [s.std or 0.0 for s in statistics.values()]
    bars = axes.errorbar(
        *(list(means), list(means.values()), deviations),
        **{"color": color, "linestyle": style, "linewidth": 1, "elinewidth": 0.8, "capsize": 2},
    )
    return bars.lines[0], list(means.items())


def _add_legends(figure: Figure, series_names: Sequence[str], lines: dict[str, Line2D]) -> None:
    """Adds a legend of line styles below the plot, and of several series' colours to its right.

    `lines` holds a line of each style, by its label.
    """
    if len(series_names) > 1:
        # Lines of these styles have each series' colour, so that the legend's are grey.
        for label, line in lines.items():
            if label.startswith(("trained", "cut")):
                style = {"linestyle": line.get_linestyle(), "linewidth": line.get_linewidth()}
                lines[label] = Line2D([], [], color="dimgray", **style)
        columns = 1 + (len(series_names) - 1) // 18
        marks = plotting.series_legend_lines(len(series_names))
        labels = [plotting.legend_label(name) for name in series_names]
        figure.legend(marks, labels, loc="outside right upper", fontsize=7, ncols=columns)
        figure.set_figwidth(figure.get_figwidth() + columns * (0.6 + 0.06 * max(map(len, labels))))
    dot = Line2D([], [], color="dimgray", marker="o", linestyle="", alpha=0.6, markersize=4)
    labels = ["a run", *lines]
    marks = [dot, *lines.values()]
    figure.legend(marks, labels, loc="outside lower center", fontsize=8, ncols=min(len(labels), 4))


def theory_by_rank(results: Sequence[RunResult]) -> Figure | None:
    """Theory as lines and measurements as points against r; a panel for each metric with a theory.

    None where no metric with a theory was measured at two ranks of one series.
    """
    by_metric: dict[str, dict[str, dict[int, list[TheoryCheck]]]] = {}  # metric → series → r
    for name, runs in rank_series.lora_runs_by_series(results).items():
        for result in runs:
            for check in result.theory_checks:
                by_rank = by_metric.setdefault(check.metric, {}).setdefault(name, {})
                by_rank.setdefault(result.rank or 0, []).append(check)
    by_metric = {m: series for m, series in by_metric.items() if max(map(len, series.values())) > 1}
    if not by_metric:
        return None
    figure, axes = plotting.panels(len(by_metric), width=4.5)
    for panel, (metric, series) in zip(axes, by_metric.items(), strict=True):
        for i, (name, by_rank) in enumerate(series.items()):
            _draw_theory(panel, name, by_rank, i)
        panel.set(title=plotting.metric_label(metric), xlabel="r")
        plotting.rank_axis(panel, {r for by_rank in series.values() for r in by_rank})
        low, high = panel.get_ylim()
        # Values that differ by rounding only are drawn as a flat line.
        if (middle := abs(low + high) / 2) and high - low < 0.02 * middle:
            panel.set_ylim(low - 0.02 * middle, high + 0.02 * middle)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


def _draw_theory(panel: Axes, series: str, by_rank: dict[int, list[TheoryCheck]], i: int) -> None:
    """Draws what theory says of the i-th series as a line, and each run's measurement as a point.

    A theory with standard errors has a band of three of them around its line.
    """
    color, marker = plotting.series_style(i)
    ranks = sorted(by_rank)
    theory = np.array([mean(check.theory for check in by_rank[r]) for r in ranks])
    errors = np.array([mean(check.standard_error for check in by_rank[r]) for r in ranks])
    panel.plot(ranks, theory, color=color, label=f"theory {plotting.legend_label(series)}".strip())
    if errors.any():
        band = (theory - 3 * errors, theory + 3 * errors)
        panel.fill_between(ranks, *band, color=color, alpha=0.15, label="± 3 s.e.")
    points = [(r, check.measured) for r in ranks for check in by_rank[r]]
    panel.plot(*zip(*points, strict=True), marker, fillstyle="none", color=color, label="measured")


def update_ranks_by_rank(results: Sequence[RunResult]) -> Figure | None:
    """Effective and stable rank of ΔW against r, in two panels, with r itself as their bound.

    One series has a line for each site, of the 12 with the largest values. Each of several series
    has one line, the mean over sites. None where no series has two ranks.
    """
    series = rank_series.lora_runs_by_series(results)
    series = {name: runs for name, runs in series.items() if len({run.rank for run in runs}) > 1}
    measures = {m: _measure_by_rank(series, m) for m in ("effective_rank", "stable_rank")}
    if not all(measures.values()):
        return None
    figure, axes = plotting.panels(2, width=4.5)
    for panel, (measure, by_rank) in zip(axes, measures.items(), strict=True):
        ranks = sorted({r for values in by_rank.values() for r in values})
        panel.plot(ranks, ranks, ":", color="gray", linewidth=1)
        for i, values in enumerate(by_rank.values()):
            _draw_runs_and_means(panel, dict(sorted(values.items())), i)
        panel.set(xlabel="r", ylabel=f"{measure.replace('_', ' ')} of ΔW")
        plotting.rank_axis(panel, set(ranks))
        panel.set_ylim(0.95, max(2, 1.15 * ranks[-1]))  # so that the bound is in view at all ranks
        if ranks[-1] > 10:
            plotting.log_scale(panel, 1, ranks[-1])
        panel.grid(alpha=0.3)
    bound = Line2D([], [], color="gray", linestyle=":", linewidth=1)
    labels = ["r, the most it can be", *map(plotting.legend_label, measures["stable_rank"])]
    marks = [bound, *plotting.series_legend_lines(len(labels) - 1)]
    figure.legend(marks, labels, loc="outside right upper", fontsize=8)
    figure.set_figwidth(figure.get_figwidth() + 0.6 + 0.07 * max(map(len, labels)))
    return figure


def _measure_by_rank(
    series: dict[str, list[RunResult]], measure: str
) -> dict[str, dict[int, list[float]]]:
    """Label of a line → r → `measure` in each run: the effective_rank or stable_rank of ΔW.

    With one series the labels are its sites. With several they are the names of the series, and the
    values are means over sites.
    """
    lines: dict[str, dict[int, list[float]]] = {}
    for name, runs in series.items():
        for result in runs:
            values = {
                key.removeprefix("spectra/").removesuffix(f"/{measure}"): value
                for key, value in result.metrics.items()
                if key.startswith("spectra/") and key.endswith(f"/{measure}")
            }
            if len(series) > 1 and values:
                values = {name: mean(values.values())}
            for line, value in values.items():
                lines.setdefault(line, {}).setdefault(result.rank or 0, []).append(value)
    if len(series) > 1:
        return lines
    by_size = sorted(lines, key=lambda site: -max(map(mean, lines[site].values())))
    return {site: lines[site] for site in lines if site in by_size[: plotting.MAX_PANELS]}


def spectra_by_rank(results: Sequence[RunResult]) -> Figure | None:
    """The final singular values σ_i of ΔW against i, a line for each r and a panel for each site.

    Values are means over the runs of an r. Only the sites with the largest ΔW have a panel, and of
    several series only the one that reaches the lowest loss is drawn.
    """
    name, runs = rank_series.best_series(results)
    spectra = rank_series.mean_spectra(runs)
    if not spectra:
        return None
    by_norm = sorted(spectra, key=lambda s: -max(np.linalg.norm(v) for v in spectra[s].values()))
    shown = {site: spectra[site] for site in spectra if site in by_norm[: plotting.MAX_PANELS]}
    ranks = sorted({r for by_rank in shown.values() for r in by_rank})
    colors = dict(zip(ranks, plotting.graded_colors(len(ranks)), strict=True))
    figure, axes = plotting.panels(len(shown), width=4)
    for panel, (site, by_rank) in zip(axes, shown.items(), strict=True):
        largest = max(values.max() for values in by_rank.values())
        # A singular value of zero comes out as rounding error, and is left out of the log axis.
        threshold = 1e-7 * largest
        for r, values in by_rank.items():
            values = np.where(values > threshold, values, np.nan)
            panel.plot(np.arange(1, len(values) + 1), values, ".-", color=colors[r], linewidth=1)
        smallest = min(v for values in by_rank.values() for v in values if v > threshold)
        panel.set(title=plotting.legend_label(site), xlabel="i", ylabel=r"$\sigma_i$ of ΔW")
        plotting.log_scale(panel, smallest, largest)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3, which="both")
    marks = [Line2D([], [], color=color, marker=".") for color in colors.values()]
    columns = 1 + (len(ranks) - 1) // 20
    labels = [f"r = {r}" for r in ranks]
    figure.legend(marks, labels, loc="outside right upper", fontsize=8, ncols=columns)
    figure.set_figwidth(figure.get_figwidth() + 0.9 * columns)
    notes = [f"the series with the lowest loss: {name}"] if name else []
    notes += [f"{len(shown)} of {len(spectra)} sites"] if len(shown) < len(spectra) else []
    if notes:
        figure.suptitle("; ".join(notes), fontsize=9)
    return figure
