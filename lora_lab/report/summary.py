"""A sweep's tables: its cells, every metric, theory, truncation, what is not finished."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_lab.report.cells import (
    Cell,
    RunResult,
    Statistics,
    cells_of,
    full_text,
    goal_of,
    ranked_cells,
    short_text,
    statistics_of,
    swept_keys,
    validation_metrics,
)
from lora_lab.report.rank_series import lora_runs_by_series, truncation_losses, values_by_rank
from lora_lab.report.tables import Rows, format_number
from lora_lab.report.theory import CHECK_COLUMNS, TheoryCheck, check_row_over_runs
from lora_lab.runs import PLANNED_FILE, planned_runs


def cells_table(cells: Sequence[Cell]) -> Rows:
    """What was swept, and the metrics most asked for at the end, mean ± standard deviation.

    The best mean of each validation metric is marked.
    """
    keys = swept_keys(cells)
    metrics = [*validation_metrics(cells), "train/loss"]
    measures = [
        m for m in ("effective rank", "stable rank") if any(m in c.rank_measures for c in cells)
    ]
    head = [*(keys.values() or ["cell"]), "n", "trainable", *metrics, *measures]
    rows = [head]
    marks = {}
    for metric in metrics[:-1]:
        if (direction := goal_of(metric)) and len(
            ranked := ranked_cells(cells, metric, direction)
        ) > 1:
            top = ranked[0].metrics[metric].mean
            marks[metric] = {c.name for c in ranked if c.metrics[metric].mean == top}
    for cell in cells:
        done, every = len(cell.finished), len(cell.results)
        trainable = cell.metrics.get("parameters/trainable")
        row = [short_text(cell.value_of(key)) for key in keys] or [cell.name]
        row += [str(done) if done == every else f"{done} of {every}"]
        row += [format_number(trainable.mean) if trainable else "–"]
        for metric in metrics:
            text = str(cell.metrics[metric]) if metric in cell.metrics else "–"
            row.append(f"**{text}**" if cell.name in marks.get(metric, ()) else text)
        row += [str(cell.rank_measures.get(measure, "–")) for measure in measures]
        rows.append(row)
    return rows


def cells_table_in_full(cells: Sequence[Cell]) -> Rows:
    """The main table to all digits, a number or nothing in each cell: what a program reads."""
    keys = swept_keys(cells)
    metrics = [*validation_metrics(cells), "train/loss"]
    measures = dict.fromkeys(name for cell in cells for name in cell.rank_measures)
    head = ["cell", *keys.values(), "n", "runs", "trainable"]
    rows = [[*head, *(f"{m}{what}" for m in (*metrics, *measures) for what in ("", " std"))]]
    for cell in cells:
        trainable = cell.metrics.get("parameters/trainable")
        row = [cell.name, *_point(cell, keys), str(len(cell.finished)), str(len(cell.results))]
        row.append(repr(trainable.mean) if trainable else "")
        for metric in metrics:
            row += _digits(cell.metrics.get(metric))
        for measure in measures:
            row += _digits(cell.rank_measures.get(measure))
        rows.append(row)
    return rows


def _point(cell: Cell, keys: Iterable[str]) -> list[str]:
    return ["" if (value := cell.value_of(key)) is None else full_text(value) for key in keys]


def _digits(s: Statistics | None) -> list[str]:
    """Mean and deviation, "" for what is not there."""
    return [
        repr(float(v)) if v is not None else "" for v in ((s.mean, s.std) if s else (None,) * 2)
    ]


def identical_seeds_note(cells: Sequence[Cell]) -> str:
    """A word on cells whose seeds all came to the same; "" where there is none."""
    for cell in cells:
        stds = [s.std for m, s in cell.metrics.items() if m.startswith(("val/", "train/"))]
        if stds and not any(std is None or std for std in stds):
            return "Where all is ± 0, seed draws nothing; data.seed or base.seed does."
    return ""


def all_metrics_table(cells: Sequence[Cell]) -> Rows:
    """Every metric of every cell, a row each, to all digits."""
    keys = swept_keys(cells)
    rows = [["cell", *keys, "metric", "n", "mean", "std", "min", "max"]]
    for cell in cells:
        point = [cell.name, *_point(cell, keys)]
        for metric, s in cell.metrics.items():
            values = [
                repr(float(v)) for v in (s.mean, s.std, s.minimum, s.maximum) if v is not None
            ]
            values = values if s.std is not None else [values[0], "", *values[1:]]
            rows.append([*point, metric, str(s.n), *values])
    return rows


def theory_table(cells: Sequence[Cell]) -> Rows:
    """Every metric that theory speaks of, over the runs of each cell, and their worst gap."""
    keys = swept_keys(cells)
    several = any(len(cell.finished) > 1 for cell in cells)
    metric, measured, value, gap, holds = CHECK_COLUMNS
    gap = "worst gap" if several else gap
    rows = [[*(keys.values() or ["cell"]), metric, "n", measured, value, gap, holds]]
    for cell in cells:
        point = [short_text(cell.value_of(key)) for key in keys] or [cell.name]
        found: dict[str, list[TheoryCheck]] = {}
        for one in (one for result in cell.finished for one in result.theory_checks):
            found.setdefault(one.metric, []).append(one)
        rows += [
            [*point, name, str(len(own)), *check_row_over_runs(own)] for name, own in found.items()
        ]
    return rows


def theory_by_run_table(cells: Sequence[Cell]) -> Rows:
    """Every metric that theory speaks of, run by run, to all digits."""
    keys = swept_keys(cells)
    rows = [["cell", *keys.values(), "seed", *CHECK_COLUMNS[:3], "error", *CHECK_COLUMNS[3:]]]
    for cell in cells:
        for result in cell.finished:
            for one in result.theory_checks:
                values = [
                    repr(float(v)) for v in (one.measured, one.theory, one.standard_error, one.gap)
                ]
                point = [cell.name, *_point(cell, keys), str(result.config["seed"]), one.metric]
                rows.append([*point, *values, "yes" if one.holds else "NO"])
    return rows


def truncation_table(done: Sequence[RunResult], digits: bool = False) -> Rows:
    """The loss at rank k: of runs trained there, and of the largest r's ΔW cut to it.

    With `digits` as `numbers` has them.
    """
    ways = ("trained at r = k", "cut from the largest r")
    one = (lambda way: [way, f"{way} std", f"{way} n"]) if digits else (lambda way: [way, "n"])
    rows = [["series", "k", *(head for way in ways for head in one(way))]]
    for name, own in lora_runs_by_series(done).items():
        trained, (cut, _) = values_by_rank(own, "val/loss"), truncation_losses(own)
        if len(trained) > 1 and cut:
            for k in sorted({*trained, *cut}):
                row = [name or "all", str(k)]
                for s in (statistics_of(found.get(k, [])) for found in (trained, cut)):
                    row += _digits(s) if digits else [str(s) if s else "–"]
                    row.append(str(s.n if s else 0))
                rows.append(row)
    return rows


def unfinished_table(results: Sequence[RunResult], directory: Path) -> Rows:
    """Every run that is not finished, and why; and those that a multirun has not come to."""
    rows = [["experiment", "run", "status", "cause"]]
    for result in results:
        if not result.is_finished:
            rows.append([result.experiment, result.run.path.name, result.state, result.cause])
    listed: set[str] = set()
    for folder in sorted(file.parent for file in directory.rglob(PLANNED_FILE)):
        name = folder.resolve().name
        listed.add(name)
        every = planned_runs(folder)
        common = set.intersection(*map(set, every.values())) if len(every) > 1 else set()
        for run, overrides in every.items():
            if not (folder / run / "status.json").exists():
                rows.append(
                    [
                        name,
                        run,
                        "missing",
                        f"not begun: {' '.join(o for o in overrides if o not in common)}",
                    ]
                )
    for experiment in dict.fromkeys(r.experiment for r in results if r.config):
        if experiment not in listed:  # nothing says what was meant, but for the other cells
            cells = cells_of([r for r in results if r.experiment == experiment])
            seeds = {
                cell.name: {r.config["seed"] for r in cell.results}
                for cell in cells
                if cell.results[0].config["adapter"]["method"] != "none"  # which draws nothing
            }
            counts = Counter(seed for own in seeds.values() for seed in own)
            usual = {seed for seed, n in counts.items() if 2 * n > len(seeds)}
            for name, own in seeds.items():
                for seed in sorted(usual - own):
                    cause = f"seed {seed} has no run here, but in most cells"
                    rows.append([experiment, name, "missing", cause])
    return rows
