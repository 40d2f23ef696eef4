"""The `lora-lab` command. It imports nothing heavy, so that its help answers at once."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from lora_lab import __version__
from lora_lab.cli import commands as do
from lora_lab.cli.help_text import EPILOG, SWEEP, SWEEPS

STATES = ("finished", "running", "failed", "interrupted", "damaged")


def main() -> None:
    """Reads the command line and runs one subcommand.

    Errors that a person can mend (a missing file, a wrong setting) end it with one line and exit
    code 2.
    """
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
    # In the order in which --help lists them.
    for add in (_report, _sweep, _export, _analyze, _reproduce, _dashboard, _ls, _best, _diff):
        add(commands)
    # The arguments of train are in Hydra's grammar, which argparse cannot read.
    if sys.argv[1:2] == ["train"]:
        return do.train(sys.argv[2:])
    if sys.argv[1:2] == ["sweep"]:  # its options may stand between its overrides
        arguments = vars(commands.choices["sweep"].parse_intermixed_args(sys.argv[2:]))
    else:
        arguments = vars(parser.parse_args())
        del arguments["command"]
    run = arguments.pop("run")
    try:
        run(**arguments)
    except (OSError, ValueError, BadZipFile) as error:
        parser.exit(2, f"lora-lab {run.__name__}: {error}\n")


def _add(commands: Any, run: Callable[..., None], **texts: Any) -> argparse.ArgumentParser:
    """Adds the subcommand that `run` has the name of. Its arguments become those of `run`."""
    parser = commands.add_parser(run.__name__, **texts)
    parser.set_defaults(run=run)
    return parser


def _report(commands: Any) -> None:
    parser = _add(
        commands,
        do.report,
        help="write a run's tables, figures and page, or many runs'",
        description="Of a run: its tables and figures again. Of a folder: every metric as mean ± "
        "standard deviation by cell, the best marked, figures, and what is not finished; as "
        "Markdown, CSV, LaTeX, PNG, PDF and one page, report/index.html. Runs may go on meanwhile.",
    )
    parser.add_argument(
        "path", type=Path, help="a run directory, the start of its hash, or a folder"
    )


def _sweep(commands: Any) -> None:
    parser = _add(
        commands,
        do.sweep,
        help="run a W&B sweep file with no account",
        usage="lora-lab sweep FILE [--count N] [--seed N] [--dry-run] [KEY=VALUE ...]",
        description=SWEEP,
        epilog=SWEEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a sweep file, as those in sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--count", type=_count, default=None, help="how many runs, before run_cap")
    parser.add_argument("--seed", type=int, default=0, help="draws random and bayes (0)")
    parser.add_argument("--dry-run", action="store_true", help="print the command of every run")


def _export(commands: Any) -> None:
    parser = _add(commands, do.export, help="write a run's adapter or merged model for others")
    parser.add_argument("path", type=Path, help="a run directory, or the start of its hash")
    parser.add_argument("directory", type=Path, help="where to")
    parser.add_argument(
        "--format",
        choices=("peft", "merged"),
        default="peft",
        help="peft: a folder for PeftModel.from_pretrained (the default); merged: the whole model",
    )


def _analyze(commands: Any) -> None:
    parser = _add(commands, do.analyze, help="a run's ΔW again; or the ΔW of several compared")
    parser.add_argument("paths", type=Path, nargs="+", help="run directories, or starts of hashes")
    parser.add_argument("--keep", type=_share, default=None, help="share of the gain to keep")
    parser.add_argument("--truncation", choices=("sites", "model", "none"), default=None)
    parser.add_argument(
        "--to", type=Path, default=Path("analysis"), help="where a comparison is written (analysis)"
    )


def _reproduce(commands: Any) -> None:
    parser = _add(
        commands,
        do.reproduce,
        help="run a finished run again and compare",
        description="Runs a finished run again from its stored config, in a new directory, and "
        "prints the stored numbers beside the new, with what differs of the environment. The same "
        "environment gives the same bits; another machine, version or number of threads does not, "
        "and needs a --tolerance, as 1e-5. "
        "Exits with 0: within the tolerance, 1: beyond it or failed, 2: no run to be reproduced.",
    )
    parser.add_argument("path", type=Path, help="a run directory, or the start of its hash")
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("reproduced"),
        help="where its directory is made (reproduced)",
    )
    parser.add_argument(
        "--tolerance", type=_tolerance, default=0.0, help="of each stored value, as 1e-6 (0)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train the base again too, in the new directory"
    )


def _dashboard(commands: Any) -> None:
    parser = _add(
        commands,
        do.dashboard,
        help="make a W&B workspace and report for a rank ablation",
        description="Makes a saved workspace view and a report in a W&B project that has runs: "
        "losses by cell with seeds averaged, against r and parameters, the truncation of ΔW, its "
        "effective ranks and singular values, which settings matter. Each call makes new ones. "
        "Without a login it prints what it would make, and exits with 0 as --dry-run does.",
    )
    parser.add_argument("project", help="a project of W&B, as in tracking.project")
    parser.add_argument("--entity", help="whose it is (the login's default)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be made")


def _ls(commands: Any) -> None:
    parser = _add(commands, do.ls, help="list runs")
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    parser.add_argument("--state", choices=STATES, help="those alone that are so")
    parser.add_argument("--sort", choices=("name", "loss", "time", "started"), default="name")


def _best(commands: Any) -> None:
    parser = _add(
        commands,
        do.best,
        help="the best cells and the best run of a folder",
        description="The best cells of each experiment, mean ± standard deviation over their "
        "seeds, and the best run with the command that repeats it.",
    )
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    parser.add_argument("--metric", default="val/loss", help="its last value (val/loss)")
    parser.add_argument(
        "--goal", choices=("minimize", "maximize"), help="as the metric's name says"
    )
    parser.add_argument("--shown", type=int, default=10, help="cells that are shown (10)")


def _diff(commands: Any) -> None:
    parser = _add(commands, do.diff, help="what differs between two runs")
    parser.add_argument("paths", type=Path, nargs=2, help="run directories, or starts of hashes")


def _count(text: str) -> int:
    """The value of --count: an integer of at least 1."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count


def _share(text: str) -> float:
    """The value of --keep: a number above 0 and at most 1."""
    if not 0 < (share := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 and at most 1")
    return share


def _tolerance(text: str) -> float:
    """The value of --tolerance: a finite number of at least 0."""
    if not 0 <= (tolerance := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and finite")
    return tolerance
