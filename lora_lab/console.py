"""What a person sees on the terminal: the two consoles, the log, and no needless warnings."""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor, change colours or turn text around; not tab and line feed."""


def visible(text: str) -> str:
    r"""The text with its control characters written out, as \x1b: a run's files may hold any."""
    return CONTROL.sub(lambda sign: ascii(sign[0])[1:-1], text)


class VisibleConsole(Console):
    """A console that writes out the control characters of what it is given; its own stay.

    No markup: a name such as `out [v1]` is printed as it is.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings, markup=False)

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """The segments of what is printed."""
        for segment in super().render(*args, **kwargs):
            is_plain = segment.control or not CONTROL.search(segment.text)
            yield segment if is_plain else Segment(visible(segment.text), segment.style)


# A terminal that is ASCII or latin-1 shows ? for what it lacks, and no run fails for it.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")

# In a pipe or a file, paths are not broken to fit 80 columns.
console = VisibleConsole(width=None if sys.stdout.isatty() else 200)
error_console = VisibleConsole(stderr=True)


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
