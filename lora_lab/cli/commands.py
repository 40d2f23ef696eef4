"""The subcommands of `lora-lab`, one function each, with the subcommand's name and arguments.

A function imports what is heavy when it is called, and after the checks that need nothing heavy: so
help and a wrong path answer at once. Exit codes: 0 done, 1 failed, 2 an error that `main` prints.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.cli.help_text import train_help
from lora_lab.config import project
from lora_lab.exit_codes import FAILED, FINISHED
from lora_lab.sweeps.launchers import fork_server

if TYPE_CHECKING:
    from rich.console import Console

    from lora_lab.report.epochs import At
    from lora_lab.runs import Run


def train(arguments: list[str]) -> None:
    """Trains the runs of a `lora-lab train` command line, or prints its help.

    Prints progress, then a table of the run or of the runs. Exits with 0 where all finished, 1
    where one failed, 2 for a wrong config, 130 or 143 where it was interrupted.
    """
    if {"-h", "--help"} & set(arguments):
        print(train_help(arguments))
        return
    fork_server.start(arguments)
    from lora_lab import train

    sys.argv[1:] = arguments
    train.main()


def report(path: Path, to: Path | None, at: "At") -> None:
    """Writes the report of a run, or of all runs in a folder, and prints its tables.

    It is written to report/ in that folder, or to the folder `to`. Validation metrics are at the
    epoch `at`: the last, or each at its best.
    """
    from lora_lab import report
    from lora_lab.runs import is_run

    if path.is_dir() and not is_run(path) and (runs := _runs(path)):
        sweep = report.write_sweep(runs, path, to or _report_folder(path), at)
        report.show_sweep(sweep, _console())
        return
    run = _find(path)
    run.check()
    directory = report.write_run(run, to or _report_folder(run.path), at=at)
    report.show_run(run, _console(), directory, at)


def _report_folder(folder: Path) -> Path:
    """The report/ in a folder. Raises ValueError where it is a link, or the folder is read-only."""
    if (folder / "report").is_symlink():
        raise ValueError(f"{folder / 'report'} is a link: --to DIR writes the report elsewhere")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to: --to DIR writes the report elsewhere")
    return folder / "report"


def sweep(file: Path, overrides: list[str], count: int | None, seed: int, dry_run: bool) -> None:
    """Runs a W&B sweep file here; prints and exits as `train` does. `dry_run`: prints commands."""
    if not file.is_file():
        file = _packaged_sweep(file)
    fork_server.start(overrides)
    from lora_lab.cli import sweep

    sweep.run(file, overrides, count, seed, dry_run)


def _packaged_sweep(file: Path) -> Path:
    """lora_lab's own sweeps/NAME.yaml, where the package is installed and there is none here."""
    folder = project.package_folder("lora_lab.sweep_files")
    packaged = folder / file.name if folder else file
    if file.parent != Path("sweeps") or not packaged.is_file():
        from lora_lab.config.errors import nearest_path

        raise FileNotFoundError(f"there is no file {file}{nearest_path(str(file))}")
    _print(f"{file}: lora_lab's own, as there is none in this folder ({packaged})")
    return packaged


def new(folder: Path) -> None:
    """Writes a project, and prints the commands that come next."""
    from lora_lab.cli.new import write_project

    name = write_project(folder)
    settings = "adapter.r=1,2,4,8 seed=0,1 hydra/launcher=packed"
    _print(f"a project in {folder}: its README.md says what each file is. Next:")
    _print(f"  cd {folder}\n  lora-lab train -m experiment={name} {settings}\n  lora-lab report")


def analyze(
    paths: list[Path],
    keep: float | None,
    truncation: str | None,
    to: Path | None,
    trust: bool,
    bases: Path | None,
) -> None:
    """Analyzes a finished run again and prints its report; or compares the ΔW of several runs.

    A comparison is written to the folder `to`, and its table printed. The analysis of one run is
    written in its directory; in a copy with `to`, or where the directory is read-only.
    """
    from lora_lab import report

    runs = [_find(path) for path in paths]
    from lora_lab.cli import analyze
    from lora_lab.console import silence_lightning

    silence_lightning()
    if len(runs) > 1:
        folder = to or Path(analyze.COMPARISONS)
        report.write_pairs(analyze.compare_updates(runs), folder, _console())
        return
    settings = {"keep": keep, "truncation": truncation}
    settings = {key: value for key, value in settings.items() if value is not None}
    run, results = analyze.analyze_again(runs[0], _console(), trust, bases, to, **settings)
    report.write_run(run, _report_folder(run.path))
    report.show_run(run, _console())
    if results.advice is not None:
        _print(f"advice   lora-lab train … {results.advice.overrides}")


def export(path: Path, directory: Path, format: str, trust: bool, bases: Path | None) -> None:
    """Writes a run's adapter or its merged model, and prints the path of the file.

    The path may be that of a smaller adapter in a run directory, as RUN/cut/8.
    """
    from lora_lab.run_files import CUTS, HEALED

    is_smaller = path.parent.name in (CUTS, HEALED)
    run = _find(path.parents[1] if is_smaller else path)
    adapter = path.relative_to(run.path).as_posix() if is_smaller else "adapter"
    from lora_lab.cli.export import export
    from lora_lab.console import silence_lightning

    silence_lightning()

    _print(str(export(run, format, directory, trust, bases, adapter)))


def reproduce(
    path: Path,
    to: Path,
    tolerance: float,
    fresh: bool,
    devices: int | None,
    trust: bool,
    bases: Path | None,
) -> None:
    """Runs a finished run again and prints its numbers beside the stored ones.

    Exits with 0 where they agree within `tolerance`, 1 where they do not or the run fails.
    """
    from lora_lab.runs import RunFailedError

    run = _find(path)
    from lora_lab.cli import reproduce
    from lora_lab.console import silence_lightning

    silence_lightning()
    try:
        reproduction = reproduce.reproduce_run(run, to, _console(), fresh, trust, bases, devices)
        is_same = reproduce.print_comparison(reproduction, tolerance, _console())
        sys.exit(FINISHED if is_same else FAILED)
    except RunFailedError as error:
        _print_failure(error)
        sys.exit(FAILED)


def dashboard(project: str, entity: str | None, dry_run: bool) -> None:
    """Makes a workspace and a report in W&B and prints their addresses.

    With `dry_run` prints the workspace as JSON; without a login a table of what it would make.
    Exits with 1 where W&B refuses.
    """
    if "/" in project:
        owner, _, name = project.partition("/")
        raise ValueError(f"{project} is no project's name: give {name} --entity {owner}")
    from lora_lab.tracking import dashboard

    if dry_run:
        return print(dashboard.workspace_json(project, entity))
    if dashboard.has_login():
        try:
            print("\n".join(dashboard.save_report_and_workspace(project, entity)))
        except dashboard.DashboardError as error:
            _print_failure(error)
            sys.exit(FAILED)
        return
    from lora_lab import report

    _console().print(report.terminal_table("", dashboard.panel_table()))
    print("nothing was made, without a login: `wandb login` makes one")


def _console() -> "Console":
    from lora_lab.console import console

    return console


def _print_failure(error: Exception) -> None:
    """Prints an error to stderr."""
    from lora_lab.console import error_console, print_error

    print_error("failed", str(error), to=error_console)


def _print(text: str) -> None:
    """Prints a line with a run's names or settings, of which nothing is taken for markup."""
    from lora_lab.console import visible

    print(visible(text))


def _runs(root: Path) -> "list[Run]":
    """All runs below a folder. Raises FileNotFoundError where it does not exist."""
    from lora_lab.runs import find_runs

    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    return [_checked(run) for run in find_runs(root)]


def _find(path: Path) -> "Run":
    """The run at a path, or whose hash begins with it. Raises FileNotFoundError."""
    from lora_lab.runs import find_run

    return _checked(find_run(path))


def _checked(run: "Run") -> "Run":
    """The run, whose config was compared with its directory's name if it has no checksum."""
    status = run.status
    if status["state"] != "finished" or "files" in status:
        return run
    from lora_lab.config.stored_config import checked_config  # a second of imports

    return checked_config(run)


def ls(root: Path, state: str | None, sort: str, metric: str) -> None:
    """Prints a table of the runs in a folder, with the last value of one metric."""
    runs = _runs(root)
    from lora_lab import report

    _console().print(report.runs_table(runs, state, sort, metric))
    if state in (None, "damaged"):
        _print_damaged(runs)


def _print_damaged(runs: "list[Run]") -> None:
    """Prints a line for each damaged run."""
    from lora_lab import report

    for line in report.damaged_lines(runs):
        _console().print(line, soft_wrap=True, highlight=False, markup=False)


def best(root: Path, metric: str, goal: str | None, shown: int, at: "At") -> None:
    """Prints, of each experiment in a folder, its best cells, its best run and its command.

    They are compared at the epoch `at`: the last, or the metric's best of each run.
    """
    if not (runs := _runs(root)):
        raise ValueError(f"there are no runs in {root}")
    from lora_lab import report
    from lora_lab.config import compose
    from lora_lab.report.epochs import OPTIMISTIC

    _print_damaged(runs)
    for best_cells in report.best_by_experiment(runs, metric, goal, at):
        _console().print(report.terminal_table(best_cells.title, best_cells.rows(shown)))
        result = best_cells.best_result
        _print(f"best run  {result.run.path} ({best_cells.best_value})")
        command = compose.train_command(result.config, best_cells.varied_keys)
        _print(f"command   {command or f'lora-lab reproduce {result.run.path}'}\n")
    if metric.startswith("val/"):
        _print(OPTIMISTIC)


def diff(paths: list[Path]) -> None:
    """Prints what differs between two runs, in config, environment and results."""
    runs = [_find(path) for path in paths]
    if runs[0].path.resolve() == runs[1].path.resolve():
        raise ValueError(f"{paths[0]} and {paths[1]} are one run: give two")
    statuses = [run.check(in_full=()) for run in runs]
    from lora_lab import report

    for i, (run, status) in enumerate(zip(runs, statuses, strict=True), start=1):
        _print(f"{i}: {run.path} ({status['state']})")
    for title, rows in report.difference_tables(*runs).items():
        if len(rows) > 1:
            _console().print(report.terminal_table(title, rows))
        else:
            print(f"\n{title}: the same")
