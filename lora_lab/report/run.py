"""One run's report, written as files and printed; and the tables of a run's sites and of runs."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab.report import page
from lora_lab.report.run_figures import write_figures
from lora_lab.report.run_tables import run_tables, singular_values_by_site
from lora_lab.report.tables import csv_of, format_number, format_seconds, markdown
from lora_lab.report.theory import GAP_NOTE
from lora_lab.runs import Run, write_atomic

MAX_SITES = 24
"""Sites that are listed by name when a run starts; adapter/adapter.json has all."""


def write_run(run: Run, draw: bool = True) -> Path:
    """Writes a run's report/ and returns that folder: table.md, CSV files, index.html, figures.

    Without `draw` no figures are made, which takes most of the time.
    """
    directory = run.path / "report"
    directory.mkdir(exist_ok=True)
    tables = run_tables(run)
    figures = write_figures(run, singular_values_by_site(run), directory) if draw else []
    parts = [
        f"# {run.config['name']}: {run.path.name}",
        markdown(tables.curves, "r"),
        *([markdown(tables.theory, "r"), GAP_NOTE] if tables.theory else []),
        markdown([["", ""], *tables.facts], "l"),
        *(f"![{name}]({name}.png)" for name in figures),
    ]
    write_atomic(directory / "table.md", "\n\n".join(parts) + "\n")
    write_atomic(directory / "curves.csv", csv_of(tables.curves))
    if tables.theory:
        write_atomic(directory / "theory.csv", csv_of(tables.theory))
    facts = [["fact", "value"], *tables.facts]
    write_atomic(directory / "facts.csv", csv_of(facts))
    by_title = [("facts", facts), ("curves", tables.curves), ("theory", tables.theory)]
    page.write_run_page(run, by_title, figures)
    return directory


def show_run(run: Run, console: Console) -> None:
    """Prints a run's tables, and where its figures and files are."""
    tables = run_tables(run)
    with_titles = [tables.curves, tables.theory] if tables.theory else [tables.curves]
    for rows in with_titles:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    facts = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for row in tables.facts:
        facts.add_row(*row)
    console.print(facts)
    if tables.theory:
        console.print(f"{GAP_NOTE}\n", highlight=False)
    console.print(figures_line(run.path / "report"), soft_wrap=True, highlight=False)
    seconds = run.status.get("seconds")
    duration = f" ({seconds:.0f} s)" if seconds else ""
    console.print(f"run      {run.path}{duration}", soft_wrap=True, highlight=False)
    if wandb := run.status.get("wandb"):
        path = os.path.relpath(run.path / wandb)
        console.print(f"W&B      {path}", soft_wrap=True, highlight=False)


def figures_line(directory: Path, none: str = "none drawn: lora-lab report draws them") -> str:
    """A line that names a report's folder and its figures; `none` is shown where it has none."""
    names = ", ".join(path.stem for path in sorted(directory.glob("*.png")))
    return f"figures  {directory} ({names or none})"


def site_table(sites: Iterable[Any]) -> Table:
    """The sites that the targets matched: weight as a matrix, r, alpha, trainable parameters."""
    sites = list(sites)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("site", "weight", "r", "alpha", "init", "dropout", "trains"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for site in sites[:MAX_SITES]:
        weight = " × ".join(map(str, site.shape))
        recipe = site.recipe
        settings = (str(recipe.r), f"{recipe.alpha:g}", recipe.init, f"{recipe.dropout:g}")
        table.add_row(site.name, weight, *settings, f"{site.trainable_parameters:,}")
    if len(sites) > MAX_SITES:
        table.add_row(f"… and {len(sites) - MAX_SITES} more")
    table.add_section()
    total = sum(site.trainable_parameters for site in sites)
    table.add_row(f"{len(sites)} site{'s' * (len(sites) != 1)}", *[""] * 5, f"{total:,}")
    return table


def runs_table(runs: Iterable[Run], state: str | None = None, sort: str = "name") -> Table:
    """The table of `lora-lab ls`: the runs in a state, or all.

    `sort` is name, loss, time or started; runs that lack that value come last.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("status", "experiment", "cell"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "final loss", "time", "hash"):
        table.add_column(name, justify="right", no_wrap=True)
    listed = []
    for run in runs:
        status = run.status
        try:
            loss = run.last("val/loss") if status["state"] == "finished" else None
        except ValueError:
            status["state"], loss = "damaged", None
        if state in (None, status["state"]):
            # All have the same value where the sort is by name, so that they stay in that order.
            values = {"name": 0, "loss": loss, "time": status.get("seconds")}
            listed.append((values.get(sort, status.get(sort)), run, status, loss))
    # None and nan come last; a nan is the number that differs from itself.
    listed.sort(key=lambda item: (item[0] is None or item[0] != item[0], item[0] or 0))
    for _, run, status, loss in listed:
        experiment, run_hash = run.path.absolute().parent.name, run.path.name.rpartition("-")[2]
        cell, seed = status.get("cell", "–"), str(status.get("seed", "–"))
        numbers = (format_number(loss), format_seconds(status.get("seconds")))
        table.add_row(status["state"], experiment, cell, seed, *numbers, run_hash)
    return table
