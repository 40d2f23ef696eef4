"""Many runs at once: their cells, theory, figures, and what is not finished, by experiment."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_lab.report import page, rank_figures, summary
from lora_lab.report.cells import (
    Cell,
    RunResult,
    cells_of,
    goal_of,
    read_run,
    stop_cause,
    validation_metrics,
)
from lora_lab.report.plotting import metric_label, save
from lora_lab.report.rank_series import differing_seeds
from lora_lab.report.run import figures_line
from lora_lab.report.sections import ExperimentReport, SweepReport
from lora_lab.report.swept_key_figures import metrics_by_swept_keys
from lora_lab.report.tables import (
    Rows,
    csv_of,
    format_number,
    is_marked,
    is_numeric,
    latex,
    markdown,
    unmarked,
)
from lora_lab.report.theory import GAP_NOTE
from lora_lab.report.tradeoff_figure import metric_by_parameters
from lora_lab.runs import Run, write_atomic

NO_FIGURES = "none yet: those against r need finished runs of two ranks"


def write_sweep(runs: Sequence[Run], directory: Path) -> SweepReport:
    """Writes report/ in `directory`: report.md, index.html, every table as CSV and LaTeX, figures.

    Of several experiments each has a folder of its own in there. Runs may go on meanwhile.
    """
    results = [read_run(run) for run in runs]
    to = directory / "report"
    names = list(dict.fromkeys(r.experiment for r in results if r.config))
    sections = []
    for name in names:
        own = [result for result in results if result.experiment == name]
        sections.append(_section(name, own, to / name if len(names) > 1 else to))
    sweep = SweepReport(directory, results, sections, summary.unfinished_table(results, directory))
    to.mkdir(exist_ok=True)
    parts = [f"# {directory.resolve().name}: {len(results)} runs", sweep.summary]
    for section in sections:
        parts += [f"# {section.name}"] if len(sections) > 1 else []
        for title, rows in section.tables.items():
            parts += [f"## {title}", markdown(rows, "l"), section.notes[title]]
        where = section.directory.relative_to(to)
        for figure, caption in section.figures.items():
            parts.append(f"![{caption}]({(where / figure).as_posix()}.png)")
    _keep(sweep.not_finished, to, "not_finished")
    if len(sweep.not_finished) > 1:
        parts += ["## not finished", markdown(sweep.not_finished, "l")]
    write_atomic(to / "report.md", "\n\n".join(parts) + "\n")
    page.write_sweep_page(sweep)
    return sweep


def _section(name: str, results: Sequence[RunResult], to: Path) -> ExperimentReport:
    to.mkdir(parents=True, exist_ok=True)
    cells = cells_of(results)
    done = [result for cell in cells for result in cell.finished]
    made = {"cells": summary.cells_table(cells), "theory": summary.theory_table(cells)}
    made["truncation"] = summary.truncation_table(done)
    digits = {
        "cells": summary.cells_table_in_full(cells),
        "theory": summary.theory_by_run_table(cells),
    }
    digits["truncation"] = summary.truncation_table(done, digits=True)
    for title, rows in made.items():
        _keep(rows, to, title, digits[title])
    write_atomic(to / "metrics.csv", csv_of(summary.all_metrics_table(cells)))
    captions: dict[str, str] = {}
    for file, (caption, figure) in _figures(cells, done).items():
        if figure is not None:
            save(figure, to / file)
            captions[file] = caption
    for old in to.glob("*.png"):
        if old.stem not in captions:  # of an earlier report, of other runs
            old.unlink()
            old.with_suffix(".pdf").unlink(missing_ok=True)
    shown = {title: rows for title, rows in made.items() if len(rows) > 1}
    kinds = differing_seeds(done)
    notes = {
        "cells": f"Mean ± standard deviation (n − 1) over the n finished runs of a cell, at the "
        f"end; bold: the best mean. {summary.identical_seeds_note(cells)}".strip(),
        "theory": f"{GAP_NOTE}. Run by run in theory.csv.",
        "truncation": "Validation loss with ΔW cut to rank k"
        + (f", mean ± standard deviation over {kinds}." if kinds else "."),
    }
    return ExperimentReport(name, to, cells, shown, notes, captions)


def _keep(rows: Rows, to: Path, file: str, digits: Rows | None = None) -> None:
    """A table as LaTeX, and as CSV, to all digits where it has them; none of no rows."""
    for suffix, content in ((".csv", csv_of(digits or rows)), (".tex", latex(rows))):
        if len(rows) > 1:
            write_atomic(to / f"{file}{suffix}", content)
        else:
            (to / f"{file}{suffix}").unlink(missing_ok=True)


def _figures(
    cells: Sequence[Cell], done: Sequence[RunResult]
) -> dict[str, tuple[str, Figure | None]]:
    """Every figure by its file's name, with its caption; None where it has nothing to show."""
    every, cells = cells, [cell for cell in cells if cell.finished]
    metrics = [m for m in validation_metrics(cells) if goal_of(m)]
    kinds = differing_seeds(done)
    of_each = f"each run, and the mean of each r{f' over {kinds}' if kinds else ''}."
    made: dict[str, tuple[str, Figure | None]] = {}
    for metric in metrics:
        words = metric_label(metric)
        made[f"rank{_suffix(metric)}"] = (
            f"{words.capitalize()} against r: {of_each}",
            rank_figures.metric_by_rank(done, metric),
        )
    for metric in metrics:
        made[f"tradeoff{_suffix(metric)}"] = (
            f"Trained parameters against {metric_label(metric)}: mean ± standard deviation of "
            "each cell, and the front.",
            metric_by_parameters(cells, metric),
        )
    made |= {
        "theory": ("What theory says, and what was measured.", rank_figures.theory_by_rank(done)),
        "measures": (
            f"Effective and stable rank of ΔW against r: {of_each}",
            rank_figures.update_ranks_by_rank(done),
        ),
        "spectra": (
            "Singular values of ΔW by r: the mean of the runs of each r.",
            rank_figures.spectra_by_rank(done),
        ),
        "swept": (
            "What was swept, and what came of it: the mean of each cell.",
            metrics_by_swept_keys(every, metrics),
        ),
    }
    return made


def _suffix(metric: str) -> str:
    return "" if metric == "val/loss" else f"_{metric.removeprefix('val/').replace('/', '_')}"


def show_sweep(sweep: SweepReport, console: Console) -> None:
    """Prints the tables, and where they and the figures are."""
    for section in sweep.sections:
        for title, rows in section.tables.items():
            words = title if len(sweep.sections) == 1 else f"{section.name}: {title}"
            console.print(terminal_table(words, rows))
            console.print(f"{section.notes[title]}\n", highlight=False)
    if len(sweep.not_finished) > 1:
        console.print(terminal_table("not finished", sweep.not_finished))
    console.print(f"runs     {sweep.summary}", highlight=False)
    for section in sweep.sections:
        console.print(figures_line(section.directory, NO_FIGURES), soft_wrap=True, highlight=False)
    page = sweep.directory / "report" / "index.html"
    console.print(f"page     {page}", soft_wrap=True, highlight=False)


def terminal_table(title: str, rows: Rows) -> Table:
    """Rows for the terminal, what is marked in bold."""
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, title_justify="left")
    for i, heading in enumerate(rows[0]):
        right = i > 0 and is_numeric(row[i] for row in rows[1:])
        shown.add_column(escape(heading), justify="right" if right else "left")
    for row in rows[1:]:
        shown.add_row(
            *(f"[bold]{escape(unmarked(c))}[/]" if is_marked(c) else escape(c) for c in row)
        )
    return shown


def job_table(ended: Sequence[tuple[list[str], Path | None, str, str]]) -> Table:
    """How each job of a multirun ended: overrides, directory, state and the cause of a failure."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    points = [set(overrides) for overrides, *_ in ended]
    swept = set.union(*points) - set.intersection(*points)
    for name in ("status", "run", "val/loss", "time", "cause"):
        right = name in ("val/loss", "time")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for overrides, path, state, cause in ended:
        run = Run(path) if path else None
        point = " ".join(o for o in overrides if o in swept) or " ".join(overrides)
        seconds = run.status.get("seconds") if run else None
        loss = run.last("val/loss") if run and state == "finished" else None
        if run and state == "interrupted":
            cause = stop_cause(run.status)
        if run and state == "failed":
            cause += f" (traceback: {run.path / 'log.txt'})"
        table.add_row(
            state if state != "none" else "not begun",
            point,
            format_number(loss),
            f"{seconds:.0f} s" if seconds is not None else "–",
            cause if state in ("failed", "interrupted", "config error") else "",
        )
    return table
