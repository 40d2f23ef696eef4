"""W&B's own process (wandb-core), to which its client hands all rows: its start and its end."""

import atexit
from contextlib import suppress
from threading import Thread

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
        _problem = ""
    except Exception as error:
        _problem = one_line(error)


def note(error: Exception) -> None:
    """Looks whether an error of the client says that the process is gone.

    Then it is ended here as Python ends: W&B does so too, after it, and would print a traceback.
    Not where it lives: here it could wait for ever for a server that does not answer.
    """
    if isinstance(error, ConnectionError) or type(error).__name__ == "MailboxClosedError":
        atexit.unregister(_end)
        atexit.register(_end)


def _end() -> None:
    with suppress(Exception):
        wandb.teardown()


def one_line(error: Exception) -> str:
    """An error's kind and the first line of its message; of an OSError not the paths."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {message}".partition("\n")[0]
