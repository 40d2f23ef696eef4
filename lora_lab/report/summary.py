"""The tables of a sweep's report: its cells, all metrics, theory, truncation, unfinished runs.

Tables that are read round their numbers and mark the best; those for programs, as `*_in_full`,
hold all digits and one number in each cell.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_lab.report.cell_statistics import Statistics, statistics_of
from lora_lab.report.cells import Cell, RunResult, cells_of, metrics_below, ranked_cells, swept_keys
from lora_lab.report.rank_series import (
    lora_runs_by_series,
    values_after_cut,
    values_after_healing,
    values_by_rank,
)
from lora_lab.report.tables import Rows, format_number
from lora_lab.report.theory import CHECK_COLUMNS, TheoryCheck, check_row
from lora_lab.run_files import PLANNED_FILE, DamagedRunError, planned_runs
from lora_lab.runs import is_run


def cells_table(cells: Sequence[Cell]) -> Rows:
    """The main table: each cell's swept settings and metrics, as mean ± deviation.

    The best mean of each validation metric is marked; none of a test's, which is not to choose by.
    Titles of values at a metric's best epoch begin with `best`. `n` is the number of finished runs.
    The last columns are the published metrics, where a cell has some.
    """
    keys = swept_keys(cells)
    metrics = _shown_metrics(cells)
    measures = dict.fromkeys(name for cell in cells for name in cell.rank_measures)
    results = [result for cell in cells for result in cell.finished]
    titles = [f"best {m}" if any(r.is_at_best(m) for r in results) else m for m in metrics]
    published = dict.fromkeys(metric for cell in cells for metric in cell.published)
    titles += [*measures, *(f"{metric} published" for metric in published)]
    rows = [[*(keys.values() or ["cell"]), "n", "trainable", *titles]]
    best = {metric: _best_cells(cells, metric) for metric in metrics_below("val/", cells)}
    for cell in cells:
        finished, total = len(cell.finished), len(cell.results)
        trainable = cell.metrics.get("parameters/trainable")
        n = str(finished) if finished == total else f"{finished} of {total}"
        row = [*cell.swept_texts(keys), n, format_number(trainable.mean if trainable else None)]
        for metric in metrics:
            text = str(cell.metrics.get(metric, "–"))
            row.append(f"**{text}**" if cell.name in best.get(metric, ()) else text)
        row += [str(cell.rank_measures.get(measure, "–")) for measure in measures]
        row += [format_number(cell.published.get(metric)) for metric in published]
        rows.append(row)
    return rows


def _shown_metrics(cells: Sequence[Cell]) -> list[str]:
    """The metrics of the main table: validation, test, texts, forgetting, and train/loss."""
    prefixes = ("val/", "test/", "generate/", "forget/increase")
    return [*(m for prefix in prefixes for m in metrics_below(prefix, cells)), "train/loss"]


def _best_cells(cells: Sequence[Cell], metric: str) -> set[str]:
    """The names of the cells with the best mean of a metric; none where one cell alone has it."""
    ranked = ranked_cells(cells, metric)
    if len(ranked) < 2:
        return set()
    return {c.name for c in ranked if c.metrics[metric].mean == ranked[0].metrics[metric].mean}


def cells_table_in_full(cells: Sequence[Cell]) -> Rows:
    """The main table for programs: all digits, mean and deviation in separate columns.

    `val/ at` says at which epoch the validation metrics are: last or best. All else is at the end.
    """
    keys = swept_keys(cells)
    metrics = _shown_metrics(cells)
    measures = dict.fromkeys(name for cell in cells for name in cell.rank_measures)
    head = ["cell", *keys.values(), "n", "runs", "trainable", "val/ at"]
    rows = [[*head, *(f"{m}{suffix}" for m in (*metrics, *measures) for suffix in ("", " std"))]]
    for cell in cells:
        trainable = cell.metrics.get("parameters/trainable")
        row = [*cell.full_texts(keys), str(len(cell.finished)), str(len(cell.results))]
        at = "best" if any(result.is_at_best("val/") for result in cell.finished) else "last"
        row += [repr(trainable.mean) if trainable else "", at]
        for metric in metrics:
            row += _mean_std_in_full(cell.metrics.get(metric))
        for measure in measures:
            row += _mean_std_in_full(cell.rank_measures.get(measure))
        rows.append(row)
    return rows


def _mean_std_in_full(s: Statistics | None) -> list[str]:
    """Mean and deviation to all digits; "" for each that is None."""
    return [_in_full(value) for value in ((s.mean, s.std) if s else (None, None))]


def _in_full(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def identical_seeds_note(cells: Sequence[Cell]) -> str:
    """A hint where a cell's runs gave the same numbers for all seeds; "" where none did."""
    for cell in cells:
        stds = [s.std for m, s in cell.metrics.items() if m.startswith(("val/", "train/"))]
        if stds and not any(std is None or std for std in stds):
            return "Where all is ± 0, seed draws nothing; data.seed or base.seed does."
    return ""


def all_metrics_table(cells: Sequence[Cell]) -> Rows:
    """Statistics of each metric of each cell, one row for each pair, to all digits.

    `at` is best for values at the metric's best epoch, else last.
    """
    keys = swept_keys(cells)
    rows = [["cell", *keys, "metric", "at", "n", "mean", "std", "median", "min", "max"]]
    for cell in cells:
        for metric, s in cell.metrics.items():
            numbers = (s.mean, s.std, s.median, s.minimum, s.maximum)
            values = [_in_full(value) for value in numbers]
            at = "best" if any(r.is_at_best(metric) for r in cell.finished) else "last"
            rows.append([*cell.full_texts(keys), metric, at, str(s.n), *values])
    return rows


def theory_table(cells: Sequence[Cell]) -> Rows:
    """Each metric that theory predicts, over the runs of each cell, with the worst gap of them."""
    keys = swept_keys(cells)
    several = any(len(cell.finished) > 1 for cell in cells)
    metric, measured, value, gap, holds = CHECK_COLUMNS
    gap = "worst gap" if several else gap
    rows = [[*(keys.values() or ["cell"]), metric, "n", measured, value, gap, holds]]
    for cell in cells:
        by_metric: dict[str, list[TheoryCheck]] = {}
        for check in (check for result in cell.finished for check in result.theory_checks):
            by_metric.setdefault(check.metric, []).append(check)
        for name, checks in by_metric.items():
            n = str(len(checks))
            rows.append([*cell.swept_texts(keys), name, n, *check_row(checks)])
    return rows


def theory_by_run_table(cells: Sequence[Cell]) -> Rows:
    """Each metric that theory predicts, one row for each run, to all digits."""
    keys = swept_keys(cells)
    rows = [["cell", *keys.values(), "seed", *CHECK_COLUMNS[:3], "error", *CHECK_COLUMNS[3:]]]
    for cell in cells:
        for result in cell.finished:
            start = [*cell.full_texts(keys), str(result.config["seed"])]
            for check in result.theory_checks:
                values = (check.measured, check.theory, check.standard_error, check.gap)
                verdict = "yes" if check.holds else "NO"
                rows.append([*start, check.metric, *map(_in_full, values), verdict])
    return rows


def truncation_table(finished: Sequence[RunResult], in_full: bool = False) -> Rows:
    """The validation loss at rank k: trained at r = k, cut to rank k after training, and healed.

    The cut ΔW is that of the runs with the largest r, and all losses are those at the end. Rows are
    of each series of runs that differ in r and seeds alone. `in_full` gives all digits, with the
    deviation in a separate column.
    """
    at_the_end = [replace(result, at="last") for result in finished]
    series = lora_runs_by_series(at_the_end)
    healed = {name: values_after_healing(runs, "val/loss") for name, runs in series.items()}
    steps = sorted({steps for by_steps in healed.values() for steps in by_steps})
    ways = ["trained at r = k", "cut from the largest r"]
    ways += [f"cut, and trained {n} steps more" for n in steps]
    head = [[way, f"{way} std", f"{way} n"] if in_full else [way, "n"] for way in ways]
    rows = [["series", "k", *(title for titles in head for title in titles)]]
    for name, results in series.items():
        trained, cut = values_by_rank(results, "val/loss"), values_after_cut(results, "val/loss")[0]
        losses = [trained, cut, *(healed[name].get(n, {}) for n in steps)]
        for k in sorted({*trained, *cut}) if cut and (len(trained) > 1 or healed[name]) else ():
            row = [name or "all", str(k)]
            for s in (statistics_of(by_rank.get(k, [])) for by_rank in losses):
                row += _mean_std_in_full(s) if in_full else [str(s) if s else "–"]
                row.append(str(s.n if s else 0))
            rows.append(row)
    return rows


def unfinished_table(results: Sequence[RunResult], directory: Path) -> Rows:
    """The runs that are not finished, with the cause, and those that are missing.

    Missing are the runs that a multirun planned and has not begun. Where an experiment has no such
    plan, a seed is missing that most of its cells have.
    """
    rows = [["experiment", "run", "status", "cause"]]
    for result in results:
        if not result.is_finished:
            rows.append([result.experiment, result.run.path.name, result.state, result.cause])
    folders = sorted(file.parent for file in directory.rglob(PLANNED_FILE))
    for folder in folders:
        rows += _runs_not_begun(folder)
    with_plan = {folder.resolve().name for folder in folders}
    for experiment in dict.fromkeys(r.experiment for r in results if r.config):
        if experiment not in with_plan:
            rows += _missing_seeds([r for r in results if r.experiment == experiment])
    return rows


def _runs_not_begun(folder: Path) -> Rows:
    """A row for each planned run without a directory, with the overrides that not all share."""
    try:
        planned = planned_runs(folder)
    except DamagedRunError as error:
        return [[folder.resolve().name, PLANNED_FILE, "damaged", str(error)]]
    common = set.intersection(*map(set, planned.values())) if len(planned) > 1 else set()
    rows = []
    for run, overrides in planned.items():
        if not is_run(folder / run):
            cause = f"not begun: {' '.join(o for o in overrides if o not in common)}"
            rows.append([folder.resolve().name, run, "missing", cause])
    return rows


def _missing_seeds(results: Sequence[RunResult]) -> Rows:
    """A row for each cell and seed without a run, of the seeds that most cells have."""
    # A frozen base (method none) draws nothing: one seed is enough.
    cells = [c for c in cells_of(results) if c.results[0].config["adapter"]["method"] != "none"]
    seeds_by_cell = {cell.name: {r.config["seed"] for r in cell.results} for cell in cells}
    counts = Counter(seed for seeds in seeds_by_cell.values() for seed in seeds)
    usual = {seed for seed, n in counts.items() if 2 * n > len(seeds_by_cell)}
    rows = []
    for name, seeds in seeds_by_cell.items():
        for seed in sorted(usual - seeds):
            cause = f"seed {seed} has no run here, but in most cells"
            rows.append([results[0].experiment, name, "missing", cause])
    return rows
