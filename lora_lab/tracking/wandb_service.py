"""W&B's own process (wandb-core), to which its client hands all rows: its start and its end."""

import sys
import traceback
from threading import Thread
from typing import Any

import wandb

START_TIMEOUT = 45
"""Seconds that it has to start. W&B gives it 30."""

_problem = ""
"""Why it did not start, once that was tried; "" where it did."""


def start() -> str:
    """Starts it, unless it runs; gives in one line why it could not be started, else "".

    It is tried once in a process. In a thread, because W&B 0.31 waits for ever where its process
    dies as it starts: to report that, it takes a lock that it holds already.
    """
    global _problem
    if _problem:
        return _problem
    _problem = f"its process did not start in {START_TIMEOUT} s"
    starting = Thread(target=_set_up, daemon=True)
    starting.start()
    starting.join(START_TIMEOUT)
    return _problem


def _set_up() -> None:
    global _problem
    try:
        wandb.setup(wandb.Settings(silent=True))
        _mute_end()
        _problem = ""
    except Exception as error:
        _problem = one_line(error)


def _mute_end() -> None:
    """Keeps W&B's last words off the terminal: as Python ends it tells its process to end.

    Where that is gone it raises, and Python would print the traceback. What W&B lacks is said.
    """
    print_problem = sys.unraisablehook
    if getattr(print_problem, "is_ours", False):
        return

    def print_unless_wandbs(problem: Any) -> None:
        frames = traceback.walk_tb(problem.exc_traceback)
        modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
        if not any(module.partition(".")[0] == "wandb" for module in modules):
            print_problem(problem)

    print_unless_wandbs.is_ours = True  # pyright: ignore
    sys.unraisablehook = print_unless_wandbs


def one_line(error: Exception) -> str:
    """An error's kind and the first line of its message; of an OSError not the paths."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {message}".partition("\n")[0]
