"""Many runs at once: by cell, beside theory, against r; and how the jobs of a multirun ended."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from zipfile import BadZipFile

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab.report.figures import save
from lora_lab.report.run import drawn
from lora_lab.report.series import (
    against_rank,
    against_theory,
    losses_by_rank,
    losses_cut,
    rank,
    series_of,
)
from lora_lab.report.tables import Rows, csv_of, latex, markdown, number, spread
from lora_lab.report.theory import GAP, HEAD, held, line
from lora_lab.runs import Run, write_atomic


def write(runs: Sequence[Run], directory: Path) -> dict[str, Rows]:
    """Writes report/ in `directory`: report.md, each table as CSV and LaTeX, and the figures.

    Returns the tables; `**` stands around the best mean of a metric. Raises ValueError where none
    of the runs is finished.
    """
    state = {run.path: _state(run) for run in runs}
    done = [run for run in runs if state[run.path] == "finished"]
    if not done:
        raise ValueError(f"none of the {len(runs)} runs below {directory} is finished")
    made = {"cells": _cells(done), "theory": _theory(done), "truncation": _truncation(done)}
    made["not finished"] = [["run", "status", "cause"]]
    for run in runs:
        if run not in done:
            cause = str(run.status.get("error", "")).partition("\n")[0]
            made["not finished"].append([run.path.name, state[run.path], cause])
    made = {name: rows for name, rows in made.items() if len(rows) > 1}
    to = directory / "report"
    to.mkdir(exist_ok=True)
    parts = [f"# {directory.name}: {len(done)} runs"]
    for name, rows in made.items():
        file = name.replace(" ", "_")
        write_atomic(to / f"{file}.csv", csv_of([[c.strip("*") for c in row] for row in rows]))
        write_atomic(to / f"{file}.tex", latex(rows))
        parts += [f"## {name}", markdown(rows, "l")]
    for name, figure in {"rank": against_rank(done), "theory": against_theory(done)}.items():
        if figure is not None:
            save(figure, to / name)
            parts.append(f"![{name}]({name}.png)")
    write_atomic(to / "report.md", "\n\n".join(parts) + "\n")
    return made


def show(made: dict[str, Rows], directory: Path, console: Console) -> None:
    """Prints the tables, and where they and the figures are."""
    for name, rows in made.items():
        table = Table(title=name, box=box.SIMPLE, pad_edge=False, title_justify="left")
        for i, heading in enumerate(rows[0]):
            table.add_column(heading, justify="left" if i == 0 else "right")
        for row in rows[1:]:
            table.add_row(*(f"[bold]{c.strip('*')}[/]" if c.startswith("**") else c for c in row))
        console.print(table)
    if "theory" in made:
        console.print(f"{GAP}\n", highlight=False)
    console.print(drawn(directory / "report"), soft_wrap=True, highlight=False)


def jobs(ended: Sequence[tuple[list[str], Path | None, str, str]]) -> Table:
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
        if run and state == "failed":
            cause += f" (traceback: {run.path / 'log.txt'})"
        table.add_row(
            state if state != "none" else "not begun",
            point,
            number(loss),
            f"{seconds:.0f} s" if seconds is not None else "–",
            cause if state in ("failed", "interrupted", "config error") else "",
        )
    return table


def _state(run: Run) -> str:
    """The run's state, `damaged` where its files cannot be read."""
    try:
        readable = run.rows() and run.config["adapter"]["method"]
        if (run.path / "spectra.npz").exists():
            np.load(run.path / "spectra.npz").close()
        return run.status["state"] if readable or not run.finished else "damaged"
    except FileNotFoundError:
        return run.status["state"]
    except (ValueError, KeyError, TypeError, BadZipFile):
        return "damaged"


def _by_cell(runs: Sequence[Run]) -> dict[str, list[Run]]:
    cells: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (rank(run) or 0, run.path.name)):
        cells.setdefault(run.status["cell"], []).append(run)
    return cells


def _cells(runs: Sequence[Run]) -> Rows:
    """The validation metrics at the end, mean ± standard deviation over the runs of a cell."""
    keys = dict.fromkeys(k for run in runs for row in run.rows() for k in row)
    metrics = [k for k in keys if k.startswith("val/")]
    rows = [["experiment", "cell", "runs", "trainable", *metrics]]
    cells = _by_cell(runs)
    for cell, own in cells.items():
        rows.append(
            [
                own[0].config["name"],
                cell,
                str(len(own)),
                number(own[0].last("parameters/trainable")),
            ]
        )
    for column, metric in enumerate(metrics, start=4):
        means: dict[int, float] = {}
        for i, own in enumerate(cells.values(), start=1):
            values = [value for run in own if (value := run.last(metric)) is not None]
            rows[i].append(spread(values) if values else "–")
            if values:
                means[i] = mean(values)
        best = (min if metric.endswith("loss") else max)(means, key=means.__getitem__)
        if len(means) > 1:
            rows[best][column] = f"**{rows[best][column]}**"
    return rows


def _theory(runs: Sequence[Run]) -> Rows:
    """Every metric that theory speaks of, run by run."""
    return [
        ["cell", "seed", *HEAD],
        *(
            [cell, str(run.config["seed"]), *line(one)]
            for cell, own in _by_cell(runs).items()
            for run in own
            for one in held(run)
        ),
    ]


def _truncation(runs: Sequence[Run]) -> Rows:
    """The loss at rank k: of runs trained there, and of the largest r's ΔW cut to it."""
    rows = [["series", "k", "trained at r = k", "cut from the largest r"]]
    for name, own in series_of(runs).items():
        trained, (cut, _) = losses_by_rank(own), losses_cut(own)
        if len(trained) > 1 and cut:
            for k in sorted({*trained, *cut}):
                both = [spread(found[k]) if k in found else "–" for found in (trained, cut)]
                rows.append([name or "all", str(k), *both])
    return rows
