"""A sweep's tables: its cells, every metric, theory, truncation, what is not finished."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_lab.report.cells import (
    Cell,
    Result,
    best,
    cells_of,
    goal,
    plain,
    said,
    setting,
    spread,
    swept,
    validation,
)
from lora_lab.report.series import by_rank, losses_cut, series_of
from lora_lab.report.tables import Rows, number
from lora_lab.report.theory import HEAD, line
from lora_lab.runs import PLANNED, planned


def main(cells: Sequence[Cell]) -> Rows:
    """What was swept, and the metrics most asked for at the end, mean ± standard deviation.

    The best mean of each validation metric is marked.
    """
    keys = swept(cells)
    metrics = [*validation(cells), "train/loss"]
    measures = [
        m for m in ("effective rank", "stable rank") if any(m in c.rank_measures for c in cells)
    ]
    head = [*(keys.values() or ["cell"]), "n", "trainable", *metrics, *measures]
    rows = [head]
    marks = {}
    for metric in metrics[:-1]:
        if (direction := goal(metric)) and len(ranked := best(cells, metric, direction)) > 1:
            top = ranked[0].metrics[metric].mean
            marks[metric] = {c.name for c in ranked if c.metrics[metric].mean == top}
    for cell in cells:
        done, every = len(cell.done), len(cell.results)
        trainable = cell.metrics.get("parameters/trainable")
        row = [said(setting(cell, key)) for key in keys] or [cell.name]
        row += [str(done) if done == every else f"{done} of {every}"]
        row += [number(trainable.mean) if trainable else "–"]
        for metric in metrics:
            text = str(cell.metrics[metric]) if metric in cell.metrics else "–"
            row.append(f"**{text}**" if cell.name in marks.get(metric, ()) else text)
        row += [str(cell.rank_measures.get(measure, "–")) for measure in measures]
        rows.append(row)
    return rows


def everything(cells: Sequence[Cell]) -> Rows:
    """Every metric of every cell, a row each, to all digits."""
    keys = swept(cells)
    rows = [["cell", *keys, "metric", "n", "mean", "std", "min", "max"]]
    for cell in cells:
        point = [
            cell.name,
            *("" if (value := setting(cell, key)) is None else plain(value) for key in keys),
        ]
        for metric, s in cell.metrics.items():
            values = [repr(float(v)) for v in (s.mean, s.std, s.low, s.high) if v is not None]
            values = values if s.std is not None else [values[0], "", *values[1:]]
            rows.append([*point, metric, str(s.n), *values])
    return rows


def theory(cells: Sequence[Cell]) -> Rows:
    """Every metric that theory speaks of, run by run."""
    keys = swept(cells)
    return [
        [*(keys.values() or ["cell"]), "seed", *HEAD],
        *(
            [*point, str(result.config["seed"]), *line(one)]
            for cell in cells
            for point in ([said(setting(cell, key)) for key in keys] or [cell.name],)
            for result in cell.done
            for one in result.held
        ),
    ]


def truncation(done: Sequence[Result]) -> Rows:
    """The loss at rank k: of runs trained there, and of the largest r's ΔW cut to it."""
    rows = [["series", "k", "trained at r = k", "cut from the largest r"]]
    for name, own in series_of(done).items():
        trained, (cut, _) = by_rank(own, "val/loss"), losses_cut(own)
        if len(trained) > 1 and cut:
            for k in sorted({*trained, *cut}):
                both = [str(spread(found[k])) if k in found else "–" for found in (trained, cut)]
                rows.append([name or "all", str(k), *both])
    return rows


def not_finished(results: Sequence[Result], directory: Path) -> Rows:
    """Every run that is not finished, and why; and those that a multirun has not come to."""
    rows = [["experiment", "run", "status", "cause"]]
    for result in results:
        if not result.done:
            rows.append([result.experiment, result.run.path.name, result.state, result.cause])
    listed: set[str] = set()
    for folder in sorted(file.parent for file in directory.rglob(PLANNED)):
        name = folder.resolve().name
        listed.add(name)
        for run, overrides in planned(folder).items():
            if not (folder / run / "status.json").exists():
                rows.append([name, run, "missing", f"not begun: {' '.join(overrides)}"])
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
