"""One run's report, written as files and printed."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Column

from lora_lab.report import page
from lora_lab.report.epochs import At
from lora_lab.report.matrices import singular_values_by_matrix
from lora_lab.report.printed_tables import simple_table
from lora_lab.report.run_figures import write_figures
from lora_lab.report.run_tables import run_tables
from lora_lab.report.tables import Rows, csv_of, markdown, markdown_text
from lora_lab.report.theory import GAP_NOTE
from lora_lab.runs import Run, write_atomic


def write_run(run: Run, to: Path | None = None, draw: bool = True, at: At = "last") -> Path:
    """Writes a run's report and returns its folder: table.md, CSV files, index.html, figures.

    The folder is `to`, or the run's report/. Without `draw` no figures are made, which takes most
    of the time. `at` is the epoch that the loss among its facts is of. Raises ValueError where the
    run's report/ is a link to another folder.
    """
    directory = to or run.path / "report"
    if to is None and directory.is_symlink():
        raise ValueError(f"{directory} is a link, and a run writes into no other folder")
    directory.mkdir(parents=True, exist_ok=True)
    tables = run_tables(run, at)
    figures = write_figures(run, singular_values_by_matrix(run), directory) if draw else []
    theory = [markdown(tables["theory"], "r"), GAP_NOTE] if "theory" in tables else []
    heading = markdown_text(f"# {run.config['name']}: {run.path.name}")
    parts = [heading, markdown(tables["curves"], "r"), *theory]
    parts.append(markdown([["", ""], *_facts_and_cost(tables)], "l"))
    parts += [f"![{name}]({name}.png)" for name in figures]
    write_atomic(directory / "table.md", "\n\n".join(parts) + "\n")
    for title, rows in tables.items():
        write_atomic(directory / f"{title}.csv", csv_of(rows))
    page.write_run_page(run, tables, figures, directory)
    return directory


def _facts_and_cost(tables: dict[str, Rows]) -> Rows:
    """The rows of both tables, without their titles."""
    return [*tables["facts"][1:], *tables.get("cost", [])[1:]]


def show_run(run: Run, console: Console, directory: Path | None = None, at: At = "last") -> None:
    """Prints a run's tables, and where its figures and files are.

    `directory` is its report's, `at` as in `write_run`.
    """
    tables = run_tables(run, at)
    for rows in [tables[title] for title in ("curves", "theory") if title in tables]:
        columns = [Column(title, justify="right") for title in rows[0]]
        console.print(simple_table(columns, rows[1:]))
    console.print(simple_table([], _facts_and_cost(tables), show_header=False))
    if "theory" in tables:
        console.print(f"{GAP_NOTE}\n", highlight=False)
    seconds, wandb = run.status.get("seconds"), run.status.get("wandb")
    duration = f" ({seconds:.0f} s)" if seconds else ""
    lines = [figures_line(directory or run.path / "report"), f"run      {run.path}{duration}"]
    if wandb:
        lines.append(f"W&B      {os.path.relpath(run.path / wandb)}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def figures_line(directory: Path, none: str = "none drawn: lora-lab report draws them") -> str:
    """A line that names a report's folder and its figures; `none` is shown where it has none."""
    names = ", ".join(path.stem for path in sorted(directory.glob("*.png")))
    return f"figures  {directory} ({names or none})"
