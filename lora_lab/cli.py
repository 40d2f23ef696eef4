"""The `lora-lab` command. Imports nothing heavy: its help answers at once."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from lora_lab import __version__
from lora_lab.options import options

if TYPE_CHECKING:
    from rich.console import Console

    from lora_lab.runs import Run

STATES = ("finished", "running", "failed", "interrupted", "damaged")

EPILOG = """\
examples:
  lora-lab train                              the `shift` experiment, to its table and figures
  lora-lab train adapter.r=4 seed=1           the same at rank 4, another seed
  lora-lab train -m adapter.r=1,2,4 seed=0,1  six runs, one after another
  lora-lab train --help                       everything that can be set
  lora-lab sweep sweeps/rank.yaml             a W&B sweep file, run here with no account
  lora-lab report RUN                         a run's table and figures again
  lora-lab report runs/shift                  all its runs: tables, figures and a page, even while
                                              they go on
  lora-lab best runs/digits --metric val/accuracy    its best cells, and the command that repeats
  lora-lab diff RUN RUN                       what differs of their configs and results
  lora-lab analyze RUN                        its ΔW again: truncation, advice, against the base
  lora-lab analyze RUN RUN                    how the directions of their ΔW compare
  lora-lab export RUN DIR                     its adapter, as PEFT loads it
  lora-lab export RUN DIR --format merged     its model, ΔW in the weights
  lora-lab reproduce RUN                      the run again, every number beside the stored one
  lora-lab dashboard PROJECT                  a workspace and a report of its runs in W&B
  lora-lab ls                                 every run: status, cell, seed, loss, time
  lora-lab ls --state failed                  those that failed
"""

SWEEP = """\
Runs a W&B sweep file here, with no account. `wandb sweep FILE` and `wandb agent ID` run the same
file with one. The same command again goes on: finished runs are not repeated.

  method: grid    every combination, in W&B's order; run_cap or --count takes the first N
  method: random  --count or run_cap independent draws
  method: bayes   Optuna's TPE: ten random draws, then each is chosen by the runs before it; the
                  metric is a run's last value, as in W&B's summary. Its trials are kept in
                  runs/.sweeps/NAME-HASH/study.db

OVERRIDES are those of `lora-lab train`, and come before what the file says: one value fixes a
parameter, several (adapter.r=1,2) are swept instead of the file's. The file's tracking=online is
for W&B's agents: here runs are tracked offline unless you say tracking=online. A launcher runs
several at once: hydra/launcher=joblib. Every point of a grid, and of a distribution both ends, is
checked before anything runs.
"""

SWEEPS = """\
examples:
  lora-lab sweep sweeps/rank.yaml
  lora-lab sweep sweeps/rank.yaml --dry-run
  lora-lab sweep sweeps/rank.yaml adapter.r=1,2 seed=0 hydra/launcher=joblib
  lora-lab sweep sweeps/lr_by_rank.yaml --count 20
"""

TRAIN = """\
usage: lora-lab train [-m] [KEY=VALUE ...]

Trains (or finds) a base, adapts it, measures ΔW, and writes a run directory with a table and
figures. The same command again shows the finished run; -m takes lists of values and runs them all.

choices (GROUP=OPTION):
{groups}
settings:
  seed=0                 draws the adapters and their dropout
  data.seed=0            draws the data and its order
  base.seed=0            draws the base's first weights
  adapter.r=8            the rank, at most that of the smallest targeted weight; full: adapter=full
  adapter.alpha=8        scale is alpha/r; adapter.scaling: alpha/r | alpha/sqrt(r) | alpha
  adapter.init=kaiming   kaiming | gaussian | orthogonal | pissa | olora | svd
  adapter.trains=both    both | zero | core: LoRA, LoRA-FA, LoRA-XS
  adapter.dora=false     true trains the norms of the weight's rows as well
  adapter.lr_ratio=1.0   the learning rate of B over that of A (LoRA+)
  adapter.dropout=0.0    on what goes into A
  adapter.rank_pattern='{{body.*:4}}'    by a glob on sites; alpha_pattern alike
  target='*.fc1'         a glob on names; several as target=[linear,'*.proj']
  target.linear.match='body.*'    a named target, narrowed to a glob or a list of globs
  target.linear.exclude='head'    and its own r, alpha, dropout, init; tied=true: a shared weight
  optimizer.lr=0.001     optimizer.schedule: constant | linear | cosine, optimizer.warmup: a share
  base.epochs=10         how long the base trains, where base=train
  base.path=FILE         its safetensors file, where base=checkpoint
  spectra.every_n_epochs=10   when ΔW is measured in training; spectra.every_n_steps=N
  spectra.truncation=sites    the loss with ΔW cut to lower ranks: sites | model | none
  spectra.keep=0.99      the share of the gain that the advised ranks keep
  trainer.max_epochs=10  and every other argument of Lightning's Trainer (a new one as +trainer.x=…)
  sweep.fail_fast=false  true ends a multirun with its first failure
  hydra.launcher.n_jobs=4    runs at once, with -m and hydra/launcher=joblib; hydra.launcher.KEY
                         sets what the launcher's YAML has. Without one (basic) they run one after
                         another in this process, and end with it if it is killed
  overwrite=false        true repeats a finished run
  checkpoint_every=60    seconds that an interrupted run may have to repeat; 0: less than an epoch
  figures=null           drawn after a single run; true: after each run of -m, which takes seconds;
                         false: never. `lora-lab report RUN` draws them at any time
  runs_dir=runs          where run directories go; bases_dir=bases: where bases are kept

examples:
  lora-lab train adapter.r=4 adapter.alpha=8 optimizer.lr=3e-4
  lora-lab train experiment=digits target='body.*' tracking=online
  lora-lab train -m experiment=digits adapter.r=1,2,4,8 seed=0,1,2
  lora-lab train -m adapter.r=1,2,4 seed=0,1 hydra/launcher=joblib
  lora-lab train -m adapter.r=1,2,4 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
  lora-lab train experiment=digits adapter=full
"""


def train_help() -> str:
    """What `lora-lab train` takes: groups with their options as conf/ has them, and settings."""
    lines, width = [], 1 + max(len(o) for choices in options().values() for o in choices)
    for group, choices in options().items():
        for i, (option, says) in enumerate(choices.items()):
            lines.append(f"  {group + '=' if i == 0 else '':<16}{option:<{width}}{says}")
    return TRAIN.format(groups="\n".join(lines) + "\n")


def main() -> None:
    """Runs one subcommand."""
    parser = argparse.ArgumentParser(
        "lora-lab",
        description="Experiments with low-rank adaptation: which rank, which alpha, which layers, "
        "and what the learned update looks like.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lora_lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="run one experiment, or with -m several", add_help=False)
    report = commands.add_parser(
        "report",
        help="write a run's tables, figures and page, or many runs'",
        description="Of a run: its tables and figures again. Of a folder: every metric as mean ± "
        "standard deviation by cell, the best marked, figures, and what is not finished; as "
        "Markdown, CSV, LaTeX, PNG, PDF and one page, report/index.html. Runs may go on meanwhile.",
    )
    report.add_argument(
        "run", type=Path, help="a run directory, the start of its hash, or a folder"
    )
    sweep = commands.add_parser(
        "sweep",
        help="run a W&B sweep file with no account",
        usage="lora-lab sweep FILE [--count N] [--seed N] [--dry-run] [KEY=VALUE ...]",
        description=SWEEP,
        epilog=SWEEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("file", type=Path, help="a sweep file, as those in sweeps/")
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    sweep.add_argument("--count", type=_count, default=None, help="how many runs, before run_cap")
    sweep.add_argument("--seed", type=int, default=0, help="draws random and bayes (0)")
    sweep.add_argument("--dry-run", action="store_true", help="print the command of every run")
    export = commands.add_parser("export", help="write a run's adapter or merged model for others")
    export.add_argument("run", type=Path, help="a run directory, or the start of its hash")
    export.add_argument("directory", type=Path, help="where to")
    export.add_argument(
        "--format",
        choices=("peft", "merged"),
        default="peft",
        help="peft: a folder for PeftModel.from_pretrained (the default); merged: the whole model",
    )
    analyze = commands.add_parser("analyze", help="a run's ΔW again; or the ΔW of several compared")
    analyze.add_argument("runs", type=Path, nargs="+", help="run directories, or starts of hashes")
    analyze.add_argument("--keep", type=_share, default=None, help="share of the gain to keep")
    analyze.add_argument("--truncation", choices=("sites", "model", "none"), default=None)
    analyze.add_argument(
        "--to", type=Path, default=Path("analysis"), help="where a comparison is written (analysis)"
    )
    reproduce = commands.add_parser(
        "reproduce",
        help="run a finished run again and compare",
        description="Runs a finished run again from its stored config, in a new directory, and "
        "prints the stored numbers beside the new, with what differs of the environment. The same "
        "environment gives the same bits; another machine, version or number of threads does not, "
        "and needs a --tolerance, as 1e-5. "
        "Exits with 0: within the tolerance, 1: beyond it or failed, 2: no run to be reproduced.",
    )
    reproduce.add_argument("run", type=Path, help="a run directory, or the start of its hash")
    reproduce.add_argument(
        "--to",
        type=Path,
        default=Path("reproduced"),
        help="where its directory is made (reproduced)",
    )
    reproduce.add_argument(
        "--tolerance", type=_tolerance, default=0.0, help="of each stored value, as 1e-6 (0)"
    )
    reproduce.add_argument(
        "--fresh", action="store_true", help="train the base again too, in the new directory"
    )
    dashboard = commands.add_parser(
        "dashboard",
        help="make a W&B workspace and report for a rank ablation",
        description="Makes a saved workspace view and a report in a W&B project that has runs: "
        "losses by cell with seeds averaged, against r and parameters, the truncation of ΔW, its "
        "effective ranks and singular values, which settings matter. Each call makes new ones. "
        "Without a login it prints what it would make, and exits with 0 as --dry-run does.",
    )
    dashboard.add_argument("project", help="a project of W&B, as in tracking.project")
    dashboard.add_argument("--entity", help="whose it is (the login's default)")
    dashboard.add_argument("--dry-run", action="store_true", help="print what would be made")
    ls = commands.add_parser("ls", help="list runs")
    ls.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    ls.add_argument("--state", choices=STATES, help="those alone that are so")
    ls.add_argument("--sort", choices=("name", "loss", "time", "started"), default="name")
    best = commands.add_parser(
        "best",
        help="the best cells and the best run of a folder",
        description="The best cells of each experiment, mean ± standard deviation over their "
        "seeds, and the best run with the command that repeats it.",
    )
    best.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    best.add_argument("--metric", default="val/loss", help="its last value (val/loss)")
    best.add_argument("--goal", choices=("minimize", "maximize"), help="as the metric's name says")
    best.add_argument("--shown", type=int, default=10, help="cells that are shown (10)")
    diff = commands.add_parser("diff", help="what differs between two runs")
    diff.add_argument("runs", type=Path, nargs=2, help="run directories, or starts of hashes")
    # The rest of a train command is Hydra's to read.
    if sys.argv[1:2] == ["train"]:
        return _train(sys.argv[2:])
    if sys.argv[1:2] == ["sweep"]:  # whose options may stand between its overrides
        arguments = sweep.parse_intermixed_args(sys.argv[2:])
        arguments.command = "sweep"
    else:
        arguments = parser.parse_args()
    try:
        if arguments.command == "sweep":
            asked = (arguments.count, arguments.seed, arguments.dry_run)
            _sweep(arguments.file, arguments.overrides, *asked)
        elif arguments.command == "report":
            _report(arguments.run)
        elif arguments.command == "analyze":
            asked = {"keep": arguments.keep, "truncation": arguments.truncation}
            asked = {key: value for key, value in asked.items() if value is not None}
            _analyze(arguments.runs, asked, arguments.to)
        elif arguments.command == "export":
            _export(arguments.run, arguments.format, arguments.directory)
        elif arguments.command == "reproduce":
            _reproduce(arguments.run, arguments.to, arguments.tolerance, arguments.fresh)
        elif arguments.command == "dashboard":
            _dashboard(arguments.project, arguments.entity, arguments.dry_run)
        elif arguments.command == "best":
            _best(arguments.root, arguments.metric, arguments.goal, arguments.shown)
        elif arguments.command == "diff":
            _diff(*arguments.runs)
        else:
            _ls(arguments.root, arguments.state, arguments.sort)
    except (OSError, ValueError, BadZipFile) as error:
        parser.exit(2, f"lora-lab {arguments.command}: {error}\n")


def _train(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(train_help())
        return
    from lora_lab import train

    sys.argv[1:] = arguments
    train.main()


def _report(path: Path) -> None:
    from lora_lab import report
    from lora_lab.runs import find_runs, named_run

    if path.is_dir() and not (path / "status.json").exists() and (runs := find_runs(path)):
        report.show_sweep(report.write_sweep(runs, path), _console())
        return
    run = named_run(path)
    report.write(run)
    report.show(run, _console())


def _sweep(file: Path, overrides: list[str], count: int | None, seed: int, dry: bool) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    from lora_lab import sweep

    sweep.run(file, overrides, count, seed, dry)


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count


def _share(text: str) -> float:
    if not 0 < (share := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 and at most 1")
    return share


def _analyze(paths: list[Path], asked: dict[str, Any], to: Path) -> None:
    from lora_lab import report
    from lora_lab.runs import named_run

    runs = [named_run(path) for path in paths]
    from lora_lab import analyze, train

    train.quiet()
    if len(runs) > 1:
        report.pairs(analyze.between(runs), to, _console())
        return
    said = analyze.again(runs[0], _console(), **asked)
    report.write(runs[0])
    report.show(runs[0], _console())
    if said.advice is not None:
        print(f"advice   lora-lab train … {said.advice.overrides}")


def _export(path: Path, format: str, directory: Path) -> None:
    from lora_lab.runs import named_run

    run = named_run(path)
    from lora_lab.export import export
    from lora_lab.train import quiet

    quiet()

    print(export(run, format, directory))


def _tolerance(text: str) -> float:
    if not 0 <= (tolerance := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and finite")
    return tolerance


def _reproduce(path: Path, to: Path, tolerance: float, fresh: bool) -> None:
    from lora_lab.runs import named_run

    run = named_run(path)
    from lora_lab import reproduce, train

    train.quiet()
    try:
        same = reproduce.show(reproduce.again(run, to, _console(), fresh), tolerance, _console())
    except train.RunFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        same = False
    sys.exit(0 if same else 1)


def _dashboard(project: str, entity: str | None, dry_run: bool) -> None:
    if "/" in project:
        owner, _, name = project.partition("/")
        raise ValueError(
            f"{project} is no project's name: {name} --entity {owner} says whose it is"
        )
    from lora_lab import dashboard

    if not dry_run and dashboard.logged_in():
        try:
            print("\n".join(dashboard.save(project, entity)))
        except dashboard.DashboardError as error:
            print(f"failed: {error}", file=sys.stderr)
            sys.exit(1)
        return
    from rich import box
    from rich.table import Table

    head, *rows = dashboard.described()
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


def _ls(root: Path, state: str | None, sort: str) -> None:
    runs = _runs(root)
    from lora_lab import report

    _console().print(report.listing(runs, state, sort))


def _best(root: Path, metric: str, goal: str | None, shown: int) -> None:
    runs = _runs(root)
    from lora_lab import compose, report

    for one in report.best(runs, metric, goal):
        _console().print(report.table(f"{one.experiment}: {one.goal} {metric}", one.rows(shown)))
        value = one.run.finals[metric]
        print(f"best run  {one.run.run.path} ({metric} {value:.5g})")
        again = compose.command(one.run.config) or f"lora-lab reproduce {one.run.run.path}"
        print(f"command   {again}\n")


def _diff(one: Path, other: Path) -> None:
    from lora_lab.runs import named_run

    runs = [named_run(path) for path in (one, other)]
    from lora_lab import report

    for i, run in enumerate(runs, start=1):
        print(f"{i}: {run.path} ({run.status['state']})")
    for title, rows in report.difference(*runs).items():
        if len(rows) > 1:
            _console().print(report.table(title, rows))
        else:
            print(f"\n{title}: the same")


if __name__ == "__main__":
    main()
