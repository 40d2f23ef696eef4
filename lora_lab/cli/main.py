"""The `lora-lab` command. Imports nothing heavy: its help answers at once."""

import argparse
import sys
from pathlib import Path
from zipfile import BadZipFile

from lora_lab import __version__
from lora_lab.cli import commands as do
from lora_lab.cli.help_text import EPILOG, SWEEP, SWEEPS

STATES = ("finished", "running", "failed", "interrupted", "damaged")


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
    report.set_defaults(run=do.report)
    report.add_argument(
        "path", type=Path, help="a run directory, the start of its hash, or a folder"
    )
    sweep = commands.add_parser(
        "sweep",
        help="run a W&B sweep file with no account",
        usage="lora-lab sweep FILE [--count N] [--seed N] [--dry-run] [KEY=VALUE ...]",
        description=SWEEP,
        epilog=SWEEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.set_defaults(run=do.sweep)
    sweep.add_argument("file", type=Path, help="a sweep file, as those in sweeps/")
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    sweep.add_argument("--count", type=_count, default=None, help="how many runs, before run_cap")
    sweep.add_argument("--seed", type=int, default=0, help="draws random and bayes (0)")
    sweep.add_argument("--dry-run", action="store_true", help="print the command of every run")
    export = commands.add_parser("export", help="write a run's adapter or merged model for others")
    export.set_defaults(run=do.export)
    export.add_argument("path", type=Path, help="a run directory, or the start of its hash")
    export.add_argument("directory", type=Path, help="where to")
    export.add_argument(
        "--format",
        choices=("peft", "merged"),
        default="peft",
        help="peft: a folder for PeftModel.from_pretrained (the default); merged: the whole model",
    )
    analyze = commands.add_parser("analyze", help="a run's ΔW again; or the ΔW of several compared")
    analyze.set_defaults(run=do.analyze)
    analyze.add_argument("paths", type=Path, nargs="+", help="run directories, or starts of hashes")
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
    reproduce.set_defaults(run=do.reproduce)
    reproduce.add_argument("path", type=Path, help="a run directory, or the start of its hash")
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
    dashboard.set_defaults(run=do.dashboard)
    dashboard.add_argument("project", help="a project of W&B, as in tracking.project")
    dashboard.add_argument("--entity", help="whose it is (the login's default)")
    dashboard.add_argument("--dry-run", action="store_true", help="print what would be made")
    ls = commands.add_parser("ls", help="list runs")
    ls.set_defaults(run=do.ls)
    ls.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    ls.add_argument("--state", choices=STATES, help="those alone that are so")
    ls.add_argument("--sort", choices=("name", "loss", "time", "started"), default="name")
    best = commands.add_parser(
        "best",
        help="the best cells and the best run of a folder",
        description="The best cells of each experiment, mean ± standard deviation over their "
        "seeds, and the best run with the command that repeats it.",
    )
    best.set_defaults(run=do.best)
    best.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="where (runs)")
    best.add_argument("--metric", default="val/loss", help="its last value (val/loss)")
    best.add_argument("--goal", choices=("minimize", "maximize"), help="as the metric's name says")
    best.add_argument("--shown", type=int, default=10, help="cells that are shown (10)")
    diff = commands.add_parser("diff", help="what differs between two runs")
    diff.set_defaults(run=do.diff)
    diff.add_argument("paths", type=Path, nargs=2, help="run directories, or starts of hashes")
    # The rest of a train command is Hydra's to read.
    if sys.argv[1:2] == ["train"]:
        return do.train(sys.argv[2:])
    if sys.argv[1:2] == ["sweep"]:  # whose options may stand between its overrides
        asked = vars(sweep.parse_intermixed_args(sys.argv[2:]))
    else:
        asked = vars(parser.parse_args())
        del asked["command"]
    run = asked.pop("run")
    try:
        run(**asked)
    except (OSError, ValueError, BadZipFile) as error:
        parser.exit(2, f"lora-lab {run.__name__}: {error}\n")


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count


def _share(text: str) -> float:
    if not 0 < (share := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 and at most 1")
    return share


def _tolerance(text: str) -> float:
    if not 0 <= (tolerance := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and finite")
    return tolerance
