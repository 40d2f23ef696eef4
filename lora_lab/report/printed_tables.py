"""Tables that are printed and not stored: a run's sites, a folder's runs, a multirun's jobs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from lora_lab.report.best import check_metric
from lora_lab.report.cells import stop_cause
from lora_lab.report.epochs import goal_of
from lora_lab.report.tables import format_number, format_seconds
from lora_lab.runs import Run

MAX_SITES = 24
"""Sites that are listed by name when a run starts; adapter/adapter.json has all."""


def simple_table(
    columns: Iterable[Column | str], rows: Iterable[Sequence[str]] = (), show_header: bool = True
) -> Table:
    """A table for the terminal without a frame, with a rule below the column titles."""
    table = Table(*columns, box=box.SIMPLE, pad_edge=False, show_header=show_header)
    for row in rows:
        table.add_row(*row)
    return table


def site_table(sites: Iterable[Any]) -> Table:
    """A row for each site that the targets matched, and the total of trainable parameters.

    Columns: name, shape of the weight as a matrix (of experts E × out × in), r, alpha, init,
    dropout, trainable parameters.
    """
    sites = list(sites)
    names = ("weight", "r", "alpha", "init", "dropout", "trains")
    table = simple_table(["site", *(Column(name, justify="right") for name in names)])
    for site in sites[:MAX_SITES]:
        sizes = [site.experts, *site.shape] if site.kind == "experts" else site.shape
        weight, recipe = " × ".join(map(str, sizes)), site.recipe
        settings = (str(recipe.r), f"{recipe.alpha:g}", recipe.init, f"{recipe.dropout:g}")
        table.add_row(site.name, weight, *settings, f"{site.trainable_parameters:,}")
    if len(sites) > MAX_SITES:
        table.add_row(f"… and {len(sites) - MAX_SITES} more")
    table.add_section()
    total = sum(site.trainable_parameters for site in sites)
    table.add_row(f"{len(sites)} site{'s' * (len(sites) != 1)}", *[""] * 5, f"{total:,}")
    return table


def runs_table(
    runs: Iterable[Run], state: str | None = None, sort: str = "name", metric: str = "val/loss"
) -> Table:
    """The table of `lora-lab ls`: the runs in a state, or all, with a metric's last value.

    `sort` is name, loss (the metric, the best first), time or started; runs that lack that value
    come last. Raises ValueError for a metric that no finished run has.
    """
    listed, values = [], {}
    sign = -1 if goal_of(metric) == "maximize" else 1
    for run in runs:
        status = run.status
        value = None
        if status["state"] == "finished":
            value = values[run] = run.last(metric)
        if state in (None, status["state"]):
            # All have the same value where the sort is by name, so that they stay in that order.
            order = None if value is None else sign * value
            orders = {"name": 0, "loss": order, "time": status.get("seconds")}
            listed.append((orders.get(sort, status.get(sort)), run, status, value))
    if values and all(value is None for value in values.values()):
        logged = [dict.fromkeys(key for row in run.rows() for key in row) for run in values]
        check_metric(metric, logged)
    # None and nan come last; a nan is the number that differs from itself.
    listed.sort(key=lambda item: (item[0] is None or item[0] != item[0], item[0] or 0))
    texts = [Column(name, overflow="fold") for name in ("status", "experiment", "cell")]
    names = ("seed", f"final {metric.removeprefix('val/')}", "time", "hash")
    table = simple_table([*texts, *(Column(n, justify="right", no_wrap=True) for n in names)])
    for _, run, status, value in listed:
        experiment, run_hash = run.path.absolute().parent.name, run.path.name.rpartition("-")[2]
        cell, seed = status.get("cell", "–"), str(status.get("seed", "–"))
        numbers = (format_number(value), format_seconds(status.get("seconds")))
        names = (experiment, str(cell), seed, *numbers, run_hash)
        table.add_row(status["state"], *names)
    return table


def damaged_lines(runs: Iterable[Run]) -> list[str]:
    """A line for each damaged run: its directory, the file and what is wrong with it."""
    statuses = [(run.path, run.status) for run in runs]
    lines = [f"{path}: {s['error']}" for path, s in statuses if s["state"] == "damaged"]
    return [f"damaged  {line} (its command trains it again)" for line in lines]


def job_table(jobs: Sequence[tuple[list[str], Path | None, str, str]]) -> Table:
    """How the jobs of a multirun ended, each given as (overrides, run directory, state, cause).

    The column `run` has the overrides that not all jobs share.
    """
    points = [set(overrides) for overrides, *_ in jobs]
    swept = set.union(*points) - set.intersection(*points)
    columns = [Column(n, overflow="fold") for n in ("status", "run", "val/loss", "time", "cause")]
    columns[2].justify = columns[3].justify = "right"
    table = simple_table(columns)
    for overrides, path, state, cause in jobs:
        run = Run(path) if path else None
        point = " ".join(o for o in overrides if o in swept) or " ".join(overrides)
        seconds = format_seconds(run.status.get("seconds") if run else None)
        loss = run.last("val/loss") if run and state == "finished" else None
        if run and state == "interrupted":
            cause = stop_cause(run.status)
        if run and state == "failed":
            cause += f" (traceback: {run.path / 'log.txt'})"
        shown_cause = "" if state in ("finished", "running") else cause
        shown_state = state if state != "none" else "not begun"
        cells = (point, format_number(loss), seconds, shown_cause)
        table.add_row(shown_state, *cells)
    return table
