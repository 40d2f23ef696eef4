"""Many runs at once: a table by cell, theory beside what was measured, and the loss against r."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab.report.run import csv_of, markdown, number
from lora_lab.report.theory import held
from lora_lab.runs import Run, write_atomic

Rows = list[list[str]]


def write(runs: Sequence[Run], directory: Path) -> dict[str, Rows]:
    """Writes report/ in `directory`: report.md, each table as CSV and LaTeX, and the figures.

    Returns the tables; `**` stands around the best mean of a metric. Raises ValueError where none
    of the runs is finished.
    """
    done = [run for run in runs if run.finished]
    if not done:
        raise ValueError(f"none of the {len(runs)} runs below {directory} is finished")
    made = {"cells": _cells(done), "theory": _theory(done), "truncation": _truncation(done)}
    made["not finished"] = [["run", "status", "cause"]]
    for run in runs:
        if not run.finished:
            cause = str(run.status.get("error", "")).partition("\n")[0]
            made["not finished"].append([run.path.name, run.status["state"], cause])
    made = {name: rows for name, rows in made.items() if len(rows) > 1}
    to = directory / "report"
    to.mkdir(exist_ok=True)
    parts = [f"# {directory.name}: {len(done)} runs"]
    for name, rows in made.items():
        file = name.replace(" ", "_")
        write_atomic(to / f"{file}.csv", csv_of([[c.strip("*") for c in row] for row in rows]))
        write_atomic(to / f"{file}.tex", latex(rows))
        parts += [f"## {name}", markdown(rows, "l")]
    for name, figure in {"rank": _rank(done), "theory": _held(done)}.items():
        if figure is not None:
            for kind in ("png", "pdf"):
                figure.savefig(to / f"{name}.{kind}")
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
    figures = ", ".join(path.stem for path in sorted((directory / "report").glob("*.png")))
    console.print(f"figures  {directory / 'report'} ({figures})", soft_wrap=True, highlight=False)


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


def latex(rows: Rows) -> str:
    """Rows as a tabular of booktabs, the first its head; `**` becomes bold."""

    def cell(text: str) -> str:
        for sign in "&%_#":
            text = text.replace(sign, f"\\{sign}")
        text = text.replace("±", r"$\pm$").replace("–", "--").replace("σ", r"$\sigma$")
        text = text.replace("φ", r"$\varphi$").replace("Δ", r"$\Delta$")
        return rf"\textbf{{{text.strip('*')}}}" if text.startswith("**") else text

    head, *body = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _r(run: Run) -> int | None:
    return run.config["adapter"].get("r")


def _by_cell(runs: Sequence[Run]) -> dict[str, list[Run]]:
    cells: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (_r(run) or 0, run.path.name)):
        cells.setdefault(run.status["cell"], []).append(run)
    return cells


def _spread(values: Sequence[float]) -> str:
    return number(mean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def _cells(runs: Sequence[Run]) -> Rows:
    """The validation metrics at the end, mean ± standard deviation over the runs of a cell."""
    keys = dict.fromkeys(k for run in runs for row in run.rows() for k in row)
    metrics = [k for k in keys if k.startswith("val/")]
    rows = [["cell", "runs", "trainable", *metrics]]
    cells = _by_cell(runs)
    for cell, own in cells.items():
        rows.append([cell, str(len(own)), number(own[0].last("parameters/trainable"))])
    for column, metric in enumerate(metrics, start=3):
        means: dict[int, float] = {}
        for i, own in enumerate(cells.values(), start=1):
            values = [value for run in own if (value := run.last(metric)) is not None]
            rows[i].append(_spread(values) if values else "–")
            if values:
                means[i] = mean(values)
        best = (min if metric.endswith("loss") else max)(means, key=means.__getitem__)
        if len(means) > 1:
            rows[best][column] = f"**{rows[best][column]}**"
    return rows


def _theory(runs: Sequence[Run]) -> Rows:
    """Every metric that theory speaks of, run by run."""
    rows = [["cell", "seed", "metric", "measured", "theory", "gap", "holds"]]
    for cell, own in _by_cell(runs).items():
        for run in own:
            for one in held(run):
                error = f" ± {number(one.error)}" if one.error else ""
                rows.append(
                    [
                        cell,
                        str(run.config["seed"]),
                        one.metric,
                        number(one.measured),
                        number(one.theory) + error,
                        f"{one.gap:.1e}",
                        "yes" if one.passes else "NO",
                    ]
                )
    return rows


def _truncation(runs: Sequence[Run]) -> Rows:
    """The loss at rank k: of runs trained there, and of the largest r's ΔW cut to it."""
    trained, cut, top = _trained(runs), *_cut(runs)
    if len(trained) < 2 or not cut:
        return [[]]
    rows = [["k", "trained at r = k", f"cut from r = {top}"]]
    for k in sorted({*trained, *cut}):
        both = [_spread(found[k]) if k in found else "–" for found in (trained, cut)]
        rows.append([str(k), *both])
    return rows


def _trained(runs: Sequence[Run]) -> dict[int, list[float]]:
    """Final losses by r."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if (r := _r(run)) is not None and (loss := run.last("val/loss")) is not None:
            found.setdefault(r, []).append(loss)
    return dict(sorted(found.items()))


def _cut(runs: Sequence[Run]) -> tuple[dict[int, list[float]], int]:
    """Losses by k of the runs with the largest r, their ΔW cut to rank k; and that r."""
    top = max((r for run in runs if (r := _r(run)) is not None), default=0)
    found: dict[int, list[float]] = {}
    for run in runs:
        if _r(run) == top and (run.path / "spectra.npz").exists():
            with np.load(run.path / "spectra.npz") as arrays:
                if "truncation/ranks" in arrays:
                    pairs: Any = zip(
                        arrays["truncation/ranks"], arrays["truncation/loss"], strict=True
                    )
                    for k, loss in pairs:
                        found.setdefault(int(k), []).append(float(loss))
    return found, top


def _rank(runs: Sequence[Run]) -> Figure | None:
    """Loss against r: runs as points, their mean as a line, ΔW cut, full fine-tuning, the base."""
    trained, cut, top = _trained(runs), *_cut(runs)
    if len(trained) < 2:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = [(r, loss) for r, losses in trained.items() for loss in losses]
    axes.plot(*zip(*points, strict=True), ".", color="C0", alpha=0.5)
    axes.plot(list(trained), [mean(v) for v in trained.values()], color="C0", label="trained at r")
    if cut := {k: mean(losses) for k, losses in sorted(cut.items()) if k}:
        axes.plot(list(cut), list(cut.values()), "--", color="C1", label=f"cut from r = {top}")
    for method, color in (("full", "C2"), ("none", "C7")):
        losses = [run.last("val/loss") for run in runs if run.config["adapter"]["method"] == method]
        if losses := [loss for loss in losses if loss is not None]:
            axes.axhline(mean(losses), color=color, linewidth=0.9, label=f"adapter={method}")
    theory = {
        r: one.theory
        for run in runs
        if (r := _r(run))
        for one in held(run)
        if one.metric == "val/loss"
    }
    if theory:
        axes.plot(*zip(*sorted(theory.items()), strict=True), "k+", markersize=9, label="theory")
    axes.set(xlabel="r", ylabel="validation loss", xscale="log", title=runs[0].config["name"])
    axes.set_xticks(list(trained), list(map(str, trained)), minor=False)
    axes.minorticks_off()
    losses = [loss for _, loss in points]
    if min(losses) > 1e-6 * max(losses):  # what rounding leaves of a zero would fill a log axis
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _held(runs: Sequence[Run]) -> Figure | None:
    """Every metric that theory speaks of against r: measured as points, theory as a line."""
    found: dict[str, dict[int, list[tuple[float, float, float]]]] = {}
    for run in runs:
        if (r := _r(run)) is not None:
            for one in held(run):
                triple = (one.measured, one.theory, one.error)
                found.setdefault(one.metric, {}).setdefault(r, []).append(triple)
    found = {metric: dict(sorted(by_r.items())) for metric, by_r in found.items()}
    if not any(len(by_r) > 1 for by_r in found.values()):
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, (metric, by_r) in zip(panels, found.items(), strict=False):
        line = {r: [mean(t[i] for t in own) for i in (1, 2)] for r, own in by_r.items()}
        values, errors = np.array(list(line.values())).T
        panel.plot(list(line), values, color="black", label="theory")
        if errors.any():
            low, high = values - 3 * errors, values + 3 * errors
            panel.fill_between(list(line), low, high, color="black", alpha=0.15, label="± 3 s.e.")
        points = [(r, t[0]) for r, own in by_r.items() for t in own]
        panel.plot(*zip(*points, strict=True), "o", fillstyle="none", color="C0", label="measured")
        panel.set(title=metric, xlabel="r", xscale="log")
        panel.set_xticks(list(line), list(map(str, line)), minor=False)
        panel.minorticks_off()
        low, high = panel.get_ylim()
        if (middle := abs(low + high) / 2) and high - low < 0.02 * middle:
            panel.set_ylim(low - 0.02 * middle, high + 0.02 * middle)  # rounding is no shape
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for unused in panels[len(found) :]:
        unused.remove()
    return figure
