"""Many runs at once: a table by cell, theory beside what was measured, and the loss against r."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from zipfile import BadZipFile

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab.report.figures import panels, save
from lora_lab.report.run import GAP, csv_of, drawn, markdown, number
from lora_lab.report.theory import Held, held
from lora_lab.runs import Run, write_atomic

Rows = list[list[str]]

NO_MATTER = ("published", "runs_dir", "bases_dir", "overwrite", "figures", "sweep", "tracking")
NO_MATTER += ("spectra",)
"""What of a config does not tell one series of runs from another."""


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
    for name, figure in {"rank": _rank(done), "theory": _held(done)}.items():
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


def _series(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """LoRA runs that differ in r and seeds alone, by what tells one series from another."""
    members: dict[str, dict[str, list[Run]]] = {}
    said: dict[str, dict[str, Any]] = {}
    for run in runs:
        if _r(run) is not None:
            flat = _flat({k: v for k, v in run.config.items() if k not in NO_MATTER})
            for key in ("adapter.r", "seed", "data.seed", "base.seed"):
                flat.pop(key, None)
            key = json.dumps(flat, sort_keys=True)
            said[key] = flat
            members.setdefault(run.config["name"], {}).setdefault(key, []).append(run)
    series: dict[str, list[Run]] = {}
    for name, own in members.items():
        keys = dict.fromkeys(k for series_key in own for k in said[series_key])
        differ = [k for k in keys if len({json.dumps(said[s].get(k)) for s in own}) > 1]
        for series_key, its in own.items():
            words = [name] if len(members) > 1 else []
            words += [f"{k.split('.')[-1]}={said[series_key].get(k, '–')}" for k in differ]
            series[", ".join(words)] = its
    return series


def _short(label: str) -> str:
    return label if len(label) <= 48 else f"{label[:47]}…"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _truncation(runs: Sequence[Run]) -> Rows:
    """The loss at rank k: of runs trained there, and of the largest r's ΔW cut to it."""
    rows = [["series", "k", "trained at r = k", "cut from the largest r"]]
    for name, own in _series(runs).items():
        trained, (cut, _) = _trained(own), _cut(own)
        if len(trained) > 1 and cut:
            for k in sorted({*trained, *cut}):
                both = [_spread(found[k]) if k in found else "–" for found in (trained, cut)]
                rows.append([name or "all", str(k), *both])
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
                    ranks, losses = arrays["truncation/ranks"], arrays["truncation/loss"]
                    for k, loss in zip(ranks.tolist(), losses.tolist(), strict=True):
                        found.setdefault(k, []).append(loss)
    return found, top


def _rank(runs: Sequence[Run]) -> Figure | None:
    """Loss against r: runs as points, their mean as a line, ΔW cut, full fine-tuning, the base.

    A colour for each series; None of several experiments, or where none has two ranks.
    """
    series = {name: own for name, own in _series(runs).items() if len(_trained(own)) > 1}
    if not series or len({run.config["name"] for run in runs}) > 1:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    every: list[float] = []
    ticks: set[int] = set()
    for i, (name, own) in enumerate(series.items()):
        trained, (cut, top) = _trained(own), _cut(own)
        points = [(r, loss) for r, losses in trained.items() for loss in losses]
        every += [loss for _, loss in points]
        label = f" ({_short(name)})" if name else ""
        axes.plot(*zip(*points, strict=True), ".", color=f"C{i}", alpha=0.5)
        means = [mean(values) for values in trained.values()]
        axes.plot(list(trained), means, color=f"C{i}", label=f"trained at r{label}")
        if shown := {k: mean(losses) for k, losses in sorted(cut.items()) if k}:
            ks, losses = list(shown), list(shown.values())
            axes.plot(ks, losses, "--", color=f"C{i}", label=f"cut from r = {top}{label}")
        theory = {
            r: one.theory
            for run in own
            if (r := _r(run))
            for one in held(run)
            if one.metric == "val/loss"
        }
        if theory:
            label = None if i else "theory"
            axes.plot(*zip(*sorted(theory.items()), strict=True), "k+", markersize=9, label=label)
        ticks |= {*trained, *shown}
    for method, color in (("full", "black"), ("none", "gray")):
        losses = [run.last("val/loss") for run in runs if run.config["adapter"]["method"] == method]
        if losses := [loss for loss in losses if loss is not None]:
            label = f"adapter={method}"
            axes.axhline(mean(losses), color=color, linewidth=0.9, linestyle=":", label=label)
    axes.set(xlabel="r", ylabel="validation loss", xscale="log", title=runs[0].config["name"])
    axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)], minor=False)
    axes.minorticks_off()
    if min(every) > 1e-6 * max(every):  # what rounding leaves of a zero would fill a log axis
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _held(runs: Sequence[Run]) -> Figure | None:
    """Every metric that theory speaks of against r: measured as points, theory as a line."""
    found: dict[str, dict[str, dict[int, list[Held]]]] = {}
    for name, own in _series(runs).items():
        for run in own:
            for one in held(run):
                by_r = found.setdefault(one.metric, {}).setdefault(name, {})
                by_r.setdefault(int(run.config["adapter"]["r"]), []).append(one)
    enough = any(len(by_r) > 1 for series in found.values() for by_r in series.values())
    if not enough or len({run.config["name"] for run in runs}) > 1:
        return None
    figure, axes = panels(len(found), width=4.5)
    for panel, (metric, series) in zip(axes, found.items(), strict=True):
        ticks: set[int] = set()
        for i, (name, by_r) in enumerate(series.items()):
            ranks = sorted(by_r)
            values = np.array([mean(o.theory for o in by_r[r]) for r in ranks])
            errors = np.array([mean(o.error for o in by_r[r]) for r in ranks])
            panel.plot(ranks, values, color=f"C{i}", label=f"theory {_short(name)}".strip())
            if errors.any():
                band = (values - 3 * errors, values + 3 * errors)
                panel.fill_between(ranks, *band, color=f"C{i}", alpha=0.15, label="± 3 s.e.")
            points = [(r, o.measured) for r in ranks for o in by_r[r]]
            marks = {"fillstyle": "none", "color": f"C{i}", "label": "measured"}
            panel.plot(*zip(*points, strict=True), "o", **marks)
            ticks |= set(ranks)
        panel.set(title=metric, xlabel="r", xscale="log")
        panel.set_xticks(sorted(ticks), [str(r) for r in sorted(ticks)], minor=False)
        panel.minorticks_off()
        low, high = panel.get_ylim()
        if (middle := abs(low + high) / 2) and high - low < 0.02 * middle:
            panel.set_ylim(low - 0.02 * middle, high + 0.02 * middle)  # rounding is no shape
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure
