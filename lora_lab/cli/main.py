"""The `lora-lab` command. It imports nothing heavy, so that its help answers at once."""

import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from lora_lab import __version__
from lora_lab.cli import adapter_commands
from lora_lab.cli import commands as do
from lora_lab.cli.help_text import (
    ABOUT,
    BEST,
    CUT,
    DASHBOARD,
    EPILOG,
    EVALUATE,
    EVALUATE_EXAMPLES,
    EXTRACT,
    NEW,
    PROJECT,
    REPORT,
    REPRODUCE,
    SPECTRA,
    SWEEP,
    SWEEPS,
)
from lora_lab.config import project
from lora_lab.exit_codes import CONFIG_ERROR, CTRL_C

STATES = ("finished", "running", "failed", "interrupted", "damaged")


def main() -> None:
    """Runs what the command line says; Ctrl-C ends it with one line."""
    try:
        _run_subcommand()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(CTRL_C)


def _run_subcommand() -> None:
    """Reads the command line and runs one subcommand.

    Errors that a person can mend (a missing file, a wrong setting) end it with one line and exit
    code 2.
    """
    raw = RawDescriptionHelpFormatter
    parser = ArgumentParser("lora-lab", description=ABOUT, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"lora_lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.add_argument("--project", dest="project_folder", metavar="DIR", help=PROJECT)
    commands.add_parser("train", help="run one experiment, or with -m several", add_help=False)
    # In the order in which --help lists them.
    run_commands = (_report, _sweep, _export, _analyze, _reproduce, _dashboard, _ls, _best, _diff)
    for define in (*run_commands, _evaluate, _spectra, _cut, _extract, _new):
        define(commands)
    try:
        sys.argv[1:] = project.enter(sys.argv[1:])
    except ValueError as error:
        parser.exit(CONFIG_ERROR, f"lora-lab: {error}\n")
    # The arguments of train are in Hydra's grammar, which argparse cannot read.
    if sys.argv[1:2] == ["train"]:
        return do.train(sys.argv[2:])
    if (name := "".join(sys.argv[1:2])) in ("sweep", "evaluate"):
        # Their options may stand between their overrides.
        arguments = vars(commands.choices[name].parse_intermixed_args(sys.argv[2:]))
    else:
        arguments = vars(parser.parse_args())
        del arguments["command"], arguments["project_folder"]
    run = arguments.pop("run")
    try:
        run(**arguments)
    except (OSError, ValueError, BadZipFile) as error:
        from lora_lab.console import visible

        parser.exit(CONFIG_ERROR, visible(f"lora-lab {run.__name__}: {error}\n"))


def _add(
    commands: Any, run: Callable[..., None], help: str, description: str | None = None, **texts: Any
) -> Callable[..., Action]:
    """Adds the subcommand that `run` has the name of. Its arguments become those of `run`.

    Returns the `add_argument` of the subcommand's parser.
    """
    parser = commands.add_parser(run.__name__, help=help, description=description, **texts)
    parser.set_defaults(run=run)
    return parser.add_argument


def _report(commands: Any) -> None:
    add = _add(commands, do.report, "write a run's tables, figures and page, or many runs'", REPORT)
    where = "a run directory, the start of its hash, or a folder (runs)"
    add("path", type=path, nargs="?", default=Path("runs"), help=where)
    add("--to", type=path, default=None, help="where it is written (report/ in that folder)")
    _add_at(add)


def _sweep(commands: Any) -> None:
    add = _add(
        commands,
        do.sweep,
        "run a W&B sweep file with no account",
        SWEEP,
        usage="lora-lab sweep FILE [--count N] [--seed N] [--dry-run] [KEY=VALUE ...]",
        epilog=SWEEPS,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add("file", type=path, help="a sweep file, as those in sweeps/")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    add("--count", type=count, default=None, help="how many runs, before run_cap")
    add("--seed", type=int, default=0, help="draws random and bayes (0)")
    add("--dry-run", action="store_true", help="print the command of every run")


def _export(commands: Any) -> None:
    add = _add(commands, do.export, "write a run's adapter or merged model for others")
    where = "a run directory, the start of its hash, or RUN/cut/8: its adapter cut to rank 8"
    add("path", type=path, help=where)
    add("directory", type=path, help="where to")
    formats = "peft: a folder for PeftModel.from_pretrained (the default); merged: the whole model"
    add("--format", choices=("peft", "merged"), default="peft", help=formats)
    _add_foreign(add)


def _analyze(commands: Any) -> None:
    add = _add(commands, do.analyze, "a run's ΔW again; or the ΔW of several compared")
    add("paths", type=path, nargs="+", help="run directories, or starts of hashes")
    add("--keep", type=share, default=None, help="share of the gain to keep")
    add("--truncation", choices=("sites", "model", "none"), default=None)
    where = "where a comparison is written (analysis), or a copy of one run with its analysis"
    add("--to", type=path, default=None, help=where)
    _add_foreign(add)


def _reproduce(commands: Any) -> None:
    add = _add(commands, do.reproduce, "run a finished run again and compare", REPRODUCE)
    add("path", type=path, help="a run directory, or the start of its hash")
    add("--to", type=path, default="reproduced", help="where its directory is made (reproduced)")
    add("--tolerance", type=tolerance, default=0.0, help="of each stored value, as 1e-6 (0)")
    add("--fresh", action="store_true", help="train the base again too, in the new directory")
    number = "how many it is trained on (as-stored: those that the run had)"
    add("--devices", type=devices, default="as-stored", metavar="N", help=number)
    _add_foreign(add)


def _dashboard(commands: Any) -> None:
    short_help = "make a W&B workspace and report for a rank ablation"
    add = _add(commands, do.dashboard, short_help, DASHBOARD)
    add("project", help="a project of W&B, as in tracking.project")
    add("--entity", help="whose it is (the login's default)")
    add("--dry-run", action="store_true", help="print the workspace as JSON, asking no server")


def _ls(commands: Any) -> None:
    add = _add(commands, do.ls, "list runs")
    add("root", type=path, nargs="?", default="runs", help="where (runs)")
    add("--state", choices=STATES, help="those alone that are so")
    add("--sort", choices=("name", "loss", "time", "started"), default="name")
    add("--metric", default="val/loss", help="shown at the end, in the loss's place (val/loss)")


def _best(commands: Any) -> None:
    add = _add(commands, do.best, "the best cells and the best run of a folder", BEST)
    add("root", type=path, nargs="?", default="runs", help="where (runs)")
    add("--metric", default="val/loss", help="what they are ranked by (val/loss)")
    add("--goal", choices=("minimize", "maximize"), help="as the metric's name says")
    add("--shown", type=count, default=10, help="cells that are shown (10)")
    _add_at(add)


def _diff(commands: Any) -> None:
    add = _add(commands, do.diff, "what differs between two runs")
    add("paths", type=path, nargs=2, help="run directories, or starts of hashes")


def _evaluate(commands: Any) -> None:
    options = "[--cut K] [--rows N] [--data PATH] [--harness TASKS] [--to DIR]"
    usage = f"lora-lab evaluate RUN {options} [KEY=VALUE …]"
    about = {"usage": usage, "epilog": EVALUATE_EXAMPLES}
    raw = RawDescriptionHelpFormatter
    short_help = "texts that a run's model generates, and their metrics, later"
    do_it = adapter_commands.evaluate
    add = _add(commands, do_it, short_help, EVALUATE, formatter_class=raw, **about)
    add("path", type=path, help="a run directory, or the start of its hash")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="settings of generate, as num_beams=4")
    add("--cut", type=count, default=None, metavar="K", help="ΔW cut to rank K")
    add("--rows", type=count, default=None, metavar="N", help="prompts, or rows of a task, at most")
    add("--data", default=None, metavar="PATH", help="other rows, of the same columns")
    tasks = "lm-eval-harness instead: its tasks, or YAML files of tasks, with commas between"
    add("--harness", default=None, metavar="TASKS", help=tasks)
    add("--to", type=path, default=None, help="where it is written (evaluations/ in the run)")
    _add_foreign(add)


def _spectra(commands: Any) -> None:
    add = _add(commands, adapter_commands.spectra, "ΔW of any adapter or fine-tune", SPECTRA)
    add("paths", type=path, nargs="*", metavar="PATH", help="an adapter; of several φ is shown")
    add("--before", type=path, default=None, help="safetensors of W, a folder or file")
    add("--after", type=path, default=None, help="those of W + ΔW")
    add("--base", type=path, default=None, help="safetensors of W: amplification, intruders")
    add("--to", type=path, default=Path("spectra"), help="where it is written (spectra)")


def _cut(commands: Any) -> None:
    add = _add(commands, adapter_commands.cut, "write an adapter at a lower rank", CUT)
    add("path", type=path, help="a run, a folder of PEFT or ours, a file of LyCORIS or kohya")
    add("--rank", type=count, default=None, help="the rank of every site, at most")
    add("--energy", type=share, default=None, help="share of each site's ‖ΔW‖² to keep")
    add("--advice", action="store_true", help="the ranks of the run's advice.yaml")
    add("--scale-intruders", type=factor, default=None, metavar="F", help="0 removes them")
    add("--base", type=path, default=None, help="safetensors of W: intruders, kernels of LoHa")
    add("--to", type=path, default=Path("cut"), help="where it is written (cut)")


def _extract(commands: Any) -> None:
    add = _add(commands, adapter_commands.extract, "an adapter of a full fine-tune", EXTRACT)
    add("--before", type=path, required=True, help="safetensors of W₀, a folder or file")
    add("--after", type=path, required=True, help="those of W")
    add("--rank", type=count, default=None, help="the rank of every site, at most")
    add("--energy", type=share, default=None, help="share of each site's ‖W − W₀‖² to keep")
    formats = (
        "peft: PEFT's folder (the default); lora_lab: ours, which belongs to exactly this base"
    )
    add("--format", choices=("peft", "lora_lab"), default="peft", help=formats)
    add("--to", type=path, default=Path("extracted"), help="where it is written (extracted)")


def _new(commands: Any) -> None:
    add = _add(commands, do.new, "write a project: your model, data, experiment", NEW)
    add("folder", type=path, help="a new or an empty folder; its name is the project's")


def _add_at(add: Callable[..., Action]) -> None:
    """Adds the epoch that the values of validation metrics are of."""
    add("--at", choices=("last", "best"), default="last", help="epoch of a val/ metric (last)")


def _add_foreign(add: Callable[..., Action]) -> None:
    """Adds what is told of a run that was trained elsewhere."""
    add("--bases", type=path, default=None, help="where its base is (its bases_dir)")
    add("--trust", action="store_true", help="run the code that its config names, whatever it is")


def path(text: str) -> Path:
    """A path; an empty one, which Path takes for this folder, is an error."""
    if not text:
        raise ArgumentTypeError("a path must not be empty")
    return Path(text)


def count(text: str) -> int:
    """The value of --count, --shown and --rank: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def devices(text: str) -> int | None:
    """The value of --devices: a number of at least 1; None for `as-stored`."""
    if text == "as-stored":
        return None
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text} must be as-stored, or a number of at least 1")
    return count(text)


def share(text: str) -> float:
    """The value of --keep and --energy: a number above 0 and at most 1."""
    return _number(text, float, lambda value: 0 < value <= 1, "more than 0 and at most 1")


def factor(text: str) -> float:
    """The value of --scale-intruders: at least 0 and below 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def tolerance(text: str) -> float:
    """The value of --tolerance: a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "at least 0 and finite")


def _number(text: str, kind: Any, fits: Callable[[Any], bool], rule: str) -> Any:
    """The number that a text is. Raises ArgumentTypeError with the rule where it does not fit."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise ArgumentTypeError(f"{text} must be {rule}")
    return value
