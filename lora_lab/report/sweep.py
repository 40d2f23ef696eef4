"""The report of a folder of runs, by experiment: written as files, and printed."""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from lora_lab.report import cut_report, learning_rate_report, page, rank_figures, summary
from lora_lab.report.cells import Cell, RunResult, cells_of, epoch_of, metrics_below, read_run
from lora_lab.report.cost import (
    cells_cost_table,
    cells_cost_table_in_full,
    cost_note,
    differing_costs,
)
from lora_lab.report.cut_against_trained import comparisons
from lora_lab.report.epochs import OPTIMISTIC, At, goal_of
from lora_lab.report.forgetting_figure import gain_by_forgetting
from lora_lab.report.learning_rate_figure import learning_rate_figure
from lora_lab.report.plotting import metric_label, save
from lora_lab.report.rank_series import differing_seeds
from lora_lab.report.rate_by_rank import RateSweep, rate_sweeps
from lora_lab.report.run import figures_line
from lora_lab.report.sections import ExperimentReport, SweepReport
from lora_lab.report.swept_key_figures import metrics_by_swept_keys
from lora_lab.report.tables import Rows, csv_of, latex, markdown, markdown_text, terminal_table
from lora_lab.report.theory import GAP_NOTE
from lora_lab.report.tradeoff_figure import metric_by_costs
from lora_lab.runs import Run, write_atomic

NO_FIGURES = "none yet: those against r need finished runs of two ranks"

HEALED_NOTE = " The steps after a cut come on top of the training's."
"""What is said below the truncation table where adapters were trained further after a cut."""

FORGETTING_NOTE = " forget/increase: how much higher the loss on what the base knew is at the end."
"""What is said below the main table where forgetting was measured."""

Figures = dict[str, tuple[str, Figure | None]]
"""File name → caption and figure; the figure is None where the runs have nothing to show in it."""


def write_sweep(
    runs: Sequence[Run], directory: Path, to: Path | None = None, at: At = "last"
) -> SweepReport:
    """Writes report.md, index.html, and for each experiment its tables (CSV and LaTeX) and figures
    (PNG and PDF).

    They go to the folder `to`, or to report/ in the runs' `directory`. Several experiments have a
    folder each in it. The runs may still be running. Validation metrics are at the epoch `at`.
    """
    results = [read_run(run, in_full=("spectra.npz",), at=at) for run in runs]
    to = to or directory / "report"
    earlier = _earlier_figures(to)
    names = list(dict.fromkeys(r.experiment for r in results if r.config))
    experiments = []
    for name in names:
        members = [result for result in results if result.experiment == name]
        # A name from a config.yaml that was not checked may be a path.
        folder = to / re.sub(r"[^\w.-]|^\.+", "_", name) if len(names) > 1 else to
        experiments.append(_write_experiment(name, members, folder, earlier))
    unfinished = summary.unfinished_table(results, directory)
    sweep = SweepReport(directory, to, results, experiments, unfinished)
    to.mkdir(parents=True, exist_ok=True)
    _write_table(unfinished, to, "not_finished")
    write_atomic(to / "report.md", _sweep_markdown(sweep))
    page.write_sweep_page(sweep)
    return sweep


def _sweep_markdown(sweep: SweepReport) -> str:
    """The text of report.md: the tables and figures of each experiment, and what is unfinished."""
    heading = markdown_text(f"# {sweep.directory.resolve().name}: {len(sweep.results)} runs")
    parts = [heading, sweep.counts_text]
    for experiment in sweep.experiments:
        parts += [markdown_text(f"# {experiment.name}")] if len(sweep.experiments) > 1 else []
        for title, rows in experiment.tables.items():
            note = "\n".join(map(markdown_text, experiment.notes[title].splitlines()))
            parts += [f"## {title}", markdown(rows, "l"), note]
        folder = experiment.directory.relative_to(sweep.report)
        for file, caption in experiment.captions.items():
            parts.append(f"![{markdown_text(caption)}]({(folder / file).as_posix()}.png)")
    if len(sweep.unfinished) > 1:
        parts += ["## not finished", markdown(sweep.unfinished, "l")]
    return "\n\n".join(parts) + "\n"


def _earlier_figures(to: Path) -> list[Path]:
    """The PNGs that the report.md of an earlier report in `to` shows."""
    with suppress(FileNotFoundError):
        links = re.findall(r"^!\[.*\]\((.+\.png)\)$", (to / "report.md").read_text(), re.MULTILINE)
        return [to / link for link in links]
    return []


def _write_experiment(
    name: str, results: Sequence[RunResult], to: Path, earlier: Collection[Path]
) -> ExperimentReport:
    """Writes one experiment's tables and figures to the folder `to`.

    Removes the `earlier` figures, of other runs, that are not drawn now.
    """
    to.mkdir(parents=True, exist_ok=True)
    cells = cells_of(results)
    finished = [result for cell in cells for result in cell.finished]
    compared, rates = comparisons(finished), _rate_sweeps(cells)
    all_rates = [sweep for sweeps in rates.values() for sweep in sweeps]
    tables = {
        "cells": summary.cells_table(cells),
        "cost": cells_cost_table(cells),
        "theory": summary.theory_table(cells),
        "truncation": summary.truncation_table(finished),
        "cut against trained": cut_report.comparison_table(compared),
        "best learning rate": learning_rate_report.rate_table(all_rates),
    }
    in_full = summary.cells_table_in_full(cells)
    _write_table(tables["cells"], to, "cells", in_full, f"val/ {epoch_of('val/', results)}")
    _write_table(tables["cost"], to, "cost", cells_cost_table_in_full(cells))
    _write_table(tables["theory"], to, "theory", summary.theory_by_run_table(cells))
    truncation = summary.truncation_table(finished, in_full=True)
    _write_table(tables["truncation"], to, "truncation", truncation)
    in_full = cut_report.comparison_table_in_full(compared)
    _write_table(tables["cut against trained"], to, "cut_against_trained", in_full)
    in_full = learning_rate_report.rate_table_in_full(all_rates)
    _write_table(tables["best learning rate"], to, "best_learning_rate", in_full)
    write_atomic(to / "metrics.csv", csv_of(summary.all_metrics_table(cells)))
    figures = _figures(cells, finished) | _rate_figures(rates)
    captions = _write_figures(figures, to)
    for old in earlier:
        if old.parent == to and old.stem not in captions:
            old.unlink(missing_ok=True)
            old.with_suffix(".pdf").unlink(missing_ok=True)
    tables = {title: rows for title, rows in tables.items() if len(rows) > 1}
    notes = _notes(cells, finished)
    notes["cut against trained"] = cut_report.comparison_note(finished, compared)
    notes["best learning rate"] = learning_rate_report.rate_note(all_rates)
    return ExperimentReport(name, to, cells, tables, notes, captions)


def _notes(cells: Sequence[Cell], finished: Sequence[RunResult]) -> dict[str, str]:
    """The note below each table, by the table's title."""
    kinds = differing_seeds(finished)
    results = [result for cell in cells for result in cell.results]
    is_chosen = any(r.is_at_best("val/") or r.select != "last" for r in results)
    more = [OPTIMISTIC] if is_chosen else []
    more += [note] if (note := summary.identical_seeds_note(cells)) else []
    cost = cost_note(cells)
    more += [] if differing_costs(cells) or not cost else [f"Cost: {cost}"]
    return {
        "cells": "Mean ± standard deviation (n − 1) over the n finished runs of a cell, each val/ "
        f"metric {epoch_of('val/', results)}, all else at the end; bold: the best mean of a "
        + " ".join(["validation.", *more])
        + (FORGETTING_NOTE if metrics_below("forget/increase", cells) else ""),
        "cost": cost,
        "theory": f"{GAP_NOTE}. All at the end. Run by run in theory.csv.",
        "truncation": "Validation loss at the end, with ΔW cut to rank k"
        + (f", mean ± standard deviation over {kinds}." if kinds else ".")
        + (HEALED_NOTE if any(r.config["adapter"].get("heal") for r in finished) else ""),
    }


def _write_table(
    rows: Rows, to: Path, file: str, in_full: Rows | None = None, comment: str = ""
) -> None:
    """Writes a table as LaTeX and as CSV, the CSV from `in_full` where that is given.

    `comment` stands in the LaTeX file's first line. A table without rows removes the files of an
    earlier report.
    """
    tex = f"% {comment}\n{latex(rows)}" if comment else latex(rows)
    for suffix, content in ((".csv", csv_of(in_full or rows)), (".tex", tex)):
        if len(rows) > 1:
            write_atomic(to / f"{file}{suffix}", content)
        else:
            (to / f"{file}{suffix}").unlink(missing_ok=True)


def _write_figures(figures: Figures, to: Path) -> dict[str, str]:
    """Writes the figures that were drawn, and returns {file name: caption} of them."""
    captions: dict[str, str] = {}
    for file, (caption, figure) in figures.items():
        if figure is not None:
            save(figure, to / file)
            captions[file] = caption
    return captions


def _figures(all_cells: Sequence[Cell], finished: Sequence[RunResult]) -> Figures:
    """Draws the figures of one experiment."""
    cells = [cell for cell in all_cells if cell.finished]
    metrics = [m for m in metrics_below("val/", cells) if goal_of(m)]
    kinds = differing_seeds(finished)
    of_each = f"each run, and the mean of each r{f' over {kinds}' if kinds else ''}."
    with_cuts = " Of what was cut: mean ± standard deviation."
    figures: Figures = {}
    for metric in metrics:
        where = epoch_of(metric, finished)
        caption = f"{metric_label(metric).capitalize()} {where}, against r: {of_each}{with_cuts}"
        figures[f"rank{_suffix(metric)}"] = caption, rank_figures.metric_by_rank(finished, metric)
    for metric in metrics:
        where = f"{metric_label(metric)} {epoch_of(metric, finished)}"
        caption = f"What a cell costs against {where}: mean ± standard deviation of each, and the "
        caption += "front. Measured costs are shown where cells differ in them by more than noise."
        figures[f"tradeoff{_suffix(metric)}"] = caption, metric_by_costs(cells, metric)
    caption = "What was gained of the validation loss against what was forgotten of what the base"
    caption += " knew, both at the end. Large points: mean ± standard deviation of each r."
    figures["forgetting"] = caption, gain_by_forgetting(finished)
    caption = "What theory says, and what was measured at the end."
    figures["theory"] = caption, rank_figures.theory_by_rank(finished)
    caption = f"Effective and stable rank of ΔW against r: {of_each}"
    figures["measures"] = caption, rank_figures.update_ranks_by_rank(finished)
    caption = "Singular values of ΔW by r: the mean of the runs of each r."
    figures["spectra"] = caption, rank_figures.spectra_by_rank(finished)
    caption = "What was swept, and what came of it: the mean of each cell"
    caption += f", each val/ metric {epoch_of('val/', finished)}."
    figures["swept"] = caption, metrics_by_swept_keys(all_cells, metrics)
    return figures


def _rate_sweeps(cells: Sequence[Cell]) -> dict[str, list[RateSweep]]:
    """The series over r and learning rates of each validation metric that has a best value."""
    results = [result for cell in cells for result in cell.results]
    metrics = [metric for metric in metrics_below("val/", cells) if goal_of(metric)]
    return {metric: rate_sweeps(results, metric) for metric in metrics}


def _rate_figures(rates: dict[str, list[RateSweep]]) -> Figures:
    """Draws each metric's figure of learning rates and ranks."""
    figures: Figures = {}
    for metric, sweeps in rates.items():
        caption = f"{metric_label(metric).capitalize()} over the learning rate for each r, and the "
        caption += "best rate by r. Hollow: no interval, or at the edge of the rates (triangle)."
        figures[f"learning_rate{_suffix(metric)}"] = caption, learning_rate_figure(sweeps)
    return figures


def _suffix(metric: str) -> str:
    """What a metric adds to a figure's file name: nothing for the loss, `_accuracy` and so on."""
    return "" if metric == "val/loss" else f"_{metric.removeprefix('val/').replace('/', '_')}"


def show_sweep(sweep: SweepReport, console: Console) -> None:
    """Prints the tables of a report, and where its figures and its page are."""
    for experiment in sweep.experiments:
        for table, rows in experiment.tables.items():
            title = table if len(sweep.experiments) == 1 else f"{experiment.name}: {table}"
            console.print(terminal_table(title, rows))
            console.print(f"{experiment.notes[table]}\n", highlight=False, markup=False)
    if len(sweep.unfinished) > 1:
        console.print(terminal_table("not finished", sweep.unfinished))
    console.print(f"runs     {sweep.counts_text}", highlight=False)
    for experiment in sweep.experiments:
        line = figures_line(experiment.directory, NO_FIGURES)
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    path = sweep.report / "index.html"
    console.print(f"page     {path}", soft_wrap=True, highlight=False, markup=False)
