"""What a person sees on the terminal: the two consoles, the log, and no needless warnings."""

import logging
import sys
import warnings
from io import TextIOWrapper

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

# A terminal that is ASCII or latin-1 shows ? for what it lacks, and no run fails for it.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")

# No markup: a name such as `out [v1]` is printed as it is. In a pipe or a file paths are not broken
# to fit 80 columns.
console = Console(width=None if sys.stdout.isatty() else 200, markup=False)
error_console = Console(stderr=True, markup=False)


def print_error(kind: str, message: str, suffix: str = "", to: Console = error_console) -> None:
    """Prints `kind: message suffix`, the kind in red."""
    to.print(Text.assemble((f"{kind}:", "red"), f" {message}{suffix}"), soft_wrap=True)


def print_labelled(label: str, message: str, to: Console = console) -> None:
    """Prints `label: message`, the label in bold."""
    to.print(Text.assemble((f"{label}:", "bold"), f" {message}"), highlight=False)


def show_log(to: Console = console) -> None:
    """Prints what the package logs, besides the log.txt of the run."""
    # On a full disk a line that a log file lacks would each be a traceback here, W&B's own too.
    logging.raiseExceptions = False
    handler = RichHandler(console=to, show_path=False, show_level=False, show_time=False)
    logging.getLogger("lora_lab").handlers = [handler]
    logging.getLogger("lora_lab").setLevel(logging.INFO)


def silence_lightning() -> None:
    """Silences Lightning's messages, and warnings about what is meant to be as it is."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The data sets are in memory: worker processes would only copy them.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    # Epoch means are the same on all devices: they are over the rows of all.
    warnings.filterwarnings("ignore", ".*on epoch level in distributed setting.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", "There is a performance drop because.*batching rule.*")
    # Lightning 2.6 on torch 2.13.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
