"""What each subcommand does. What is heavy is imported where it is needed."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.cli.help_text import train_help
from lora_lab.sweeps.launchers import fork_server

if TYPE_CHECKING:
    from rich.console import Console

    from lora_lab.runs import Run


def train(arguments: list[str]) -> None:
    """Runs what `lora-lab train` was given, which is Hydra's to read."""
    if {"-h", "--help"} & set(arguments):
        print(train_help())
        return
    fork_server.start(arguments)
    from lora_lab import train

    sys.argv[1:] = arguments
    train.main()


def report(path: Path) -> None:
    """Writes and prints the report of a run, or of every run in a folder."""
    from lora_lab import report
    from lora_lab.runs import find_run, find_runs

    if path.is_dir() and not (path / "status.json").exists() and (runs := find_runs(path)):
        report.show_sweep(report.write_sweep(runs, path), _console())
        return
    run = find_run(path)
    report.write_run(run)
    report.show_run(run, _console())


def sweep(file: Path, overrides: list[str], count: int | None, seed: int, dry_run: bool) -> None:
    """Runs a W&B sweep file here."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    fork_server.start(overrides)
    from lora_lab.cli import sweep

    sweep.run(file, overrides, count, seed, dry_run)


def analyze(paths: list[Path], keep: float | None, truncation: str | None, to: Path) -> None:
    """Analyzes a finished run again, or compares the ΔW of several."""
    from lora_lab import report
    from lora_lab.runs import find_run

    runs = [find_run(path) for path in paths]
    from lora_lab import train
    from lora_lab.cli import analyze

    train.silence_lightning()
    if len(runs) > 1:
        report.write_pairs(analyze.compare_updates(runs), to, _console())
        return
    asked = {"keep": keep, "truncation": truncation}
    asked = {key: value for key, value in asked.items() if value is not None}
    said = analyze.analyze_again(runs[0], _console(), **asked)
    report.write_run(runs[0])
    report.show_run(runs[0], _console())
    if said.advice is not None:
        print(f"advice   lora-lab train … {said.advice.overrides}")


def export(path: Path, directory: Path, format: str) -> None:
    """Writes a run's adapter, or its merged model."""
    from lora_lab.runs import find_run

    run = find_run(path)
    from lora_lab.cli.export import export
    from lora_lab.train import silence_lightning

    silence_lightning()

    print(export(run, format, directory))


def reproduce(path: Path, to: Path, tolerance: float, fresh: bool) -> None:
    """Runs a finished run again. Exits with 1 where its numbers are other ones."""
    from lora_lab.runs import RunFailedError, find_run

    run = find_run(path)
    from lora_lab import train
    from lora_lab.cli import reproduce

    train.silence_lightning()
    try:
        same = reproduce.show(
            reproduce.reproduce_run(run, to, _console(), fresh), tolerance, _console()
        )
    except RunFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        same = False
    sys.exit(0 if same else 1)


def dashboard(project: str, entity: str | None, dry_run: bool) -> None:
    """Makes a workspace and a report in W&B, or prints what it would make."""
    if "/" in project:
        owner, _, name = project.partition("/")
        raise ValueError(
            f"{project} is no project's name: {name} --entity {owner} says whose it is"
        )
    from lora_lab.tracking import dashboard

    if not dry_run and dashboard.has_login():
        try:
            print("\n".join(dashboard.save_report_and_workspace(project, entity)))
        except dashboard.DashboardError as error:
            print(f"failed: {error}", file=sys.stderr)
            sys.exit(1)
        return
    from rich import box
    from rich.table import Table

    head, *rows = dashboard.panel_table()
    table = Table(*head, box=box.SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    _console().print(table)
    why = "as --dry-run asks" if dry_run else "there is no login: `wandb login` makes one"
    print(f"nothing was made, {why}")


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _runs(root: Path) -> "list[Run]":
    from lora_lab.runs import find_runs

    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    return find_runs(root)


def ls(root: Path, state: str | None, sort: str) -> None:
    """Lists runs."""
    runs = _runs(root)
    from lora_lab import report

    _console().print(report.runs_table(runs, state, sort))


def best(root: Path, metric: str, goal: str | None, shown: int) -> None:
    """Prints the best cells of a folder, and its best run."""
    runs = _runs(root)
    from lora_lab import report
    from lora_lab.config import compose

    for one in report.best_by_experiment(runs, metric, goal):
        _console().print(
            report.terminal_table(f"{one.experiment}: {one.goal} {metric}", one.rows(shown))
        )
        value = one.best_result.metrics[metric]
        print(f"best run  {one.best_result.run.path} ({metric} {value:.5g})")
        again = (
            compose.train_command(one.best_result.config, one.varied_keys)
            or f"lora-lab reproduce {one.best_result.run.path}"
        )
        print(f"command   {again}\n")


def diff(paths: list[Path]) -> None:
    """Prints what differs between two runs."""
    from lora_lab.runs import find_run

    runs = [find_run(path) for path in paths]
    from lora_lab import report

    for i, run in enumerate(runs, start=1):
        print(f"{i}: {run.path} ({run.status['state']})")
    for title, rows in report.difference_tables(*runs).items():
        if len(rows) > 1:
            _console().print(report.terminal_table(title, rows))
        else:
            print(f"\n{title}: the same")
