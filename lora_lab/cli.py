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

EPILOG = """\
examples:
  lora-lab train                              the `shift` experiment, to its table and figures
  lora-lab train adapter.r=4 seed=1           the same at rank 4, another seed
  lora-lab train -m adapter.r=1,2,4 seed=0,1  six runs, one after another
  lora-lab train --help                       everything that can be set
  lora-lab report RUN                         a run's table and figures again
  lora-lab report runs/shift                  all its runs: by cell, against r, against theory
  lora-lab analyze RUN                        its ΔW again: truncation, advice, against the base
  lora-lab analyze RUN RUN                    how the directions of their ΔW compare
  lora-lab export RUN DIR                     its adapter, as PEFT loads it
  lora-lab export RUN DIR --format merged     its model, ΔW in the weights
  lora-lab ls                                 every run: status, cell, seed, loss, time
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
  adapter.r=8            the rank, at most that of the smallest targeted weight
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
  overwrite=false        true repeats a finished run
  checkpoint_every=60    seconds that an interrupted run may have to repeat; 0: less than an epoch
  figures=true           false draws none: `lora-lab report RUN` does at any time
  runs_dir=runs          where run directories go; bases_dir=bases: where bases are kept

examples:
  lora-lab train adapter.r=4 adapter.alpha=8 optimizer.lr=3e-4
  lora-lab train experiment=digits target='body.*' tracking=online
  lora-lab train -m experiment=digits adapter.r=1,2,4,8 seed=0,1,2
  lora-lab train experiment=digits adapter=full
"""


def train_help() -> str:
    """What `lora-lab train` takes: groups with their options as conf/ has them, and settings."""
    lines, width = [], 1 + max(len(o) for choices in options().values() for o in choices)
    for group, choices in options().items():
        for i, (option, says) in enumerate(choices.items()):
            lines.append(f"  {group + '=' if i == 0 else '':<12}{option:<{width}}{says}")
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
    report = commands.add_parser("report", help="write a run's table and figures, or many runs'")
    report.add_argument(
        "run", type=Path, help="a run directory, the start of its hash, or a folder"
    )
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
    ls = commands.add_parser("ls", help="list runs")
    ls.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    # The rest of a train command is Hydra's to read.
    if sys.argv[1:2] == ["train"]:
        return _train(sys.argv[2:])
    arguments = parser.parse_args()
    try:
        if arguments.command == "report":
            _report(arguments.run)
        elif arguments.command == "analyze":
            asked = {"keep": arguments.keep, "truncation": arguments.truncation}
            asked = {key: value for key, value in asked.items() if value is not None}
            _analyze(arguments.runs, asked, arguments.to)
        elif arguments.command == "export":
            _export(arguments.run, arguments.format, arguments.directory)
        else:
            _ls(arguments.root)
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
        report.show_sweep(report.write_sweep(runs, path), path, _console())
        return
    run = named_run(path)
    report.write(run)
    report.show(run, _console())


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


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _ls(root: Path) -> None:
    from lora_lab import report
    from lora_lab.runs import find_runs

    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    _console().print(report.listing(find_runs(root)))


if __name__ == "__main__":
    main()
