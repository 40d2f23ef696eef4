"""The exit codes of `lora-lab`, and of the processes of a multirun's jobs.

| code | what happened                                                             |
|------|---------------------------------------------------------------------------|
| 0    | finished, or finished before and not repeated                             |
| 1    | failed: a run (a multirun: any of its runs) began and did not end well    |
| 2    | config error: the run was not begun                                       |
| 130  | interrupted by Ctrl-C (128 + SIGINT); the same command goes on            |
| 143  | ended by SIGTERM (128 + SIGTERM) or SIGHUP; the same command goes on    |
"""

import signal

FINISHED, FAILED, CONFIG_ERROR, CTRL_C, SIGTERM = 0, 1, 2, 130, 143


def interruption_code(stop: BaseException) -> int:
    """The exit code for what interrupted a run.

    Lightning turns Ctrl-C into SystemExit(1), and SIGTERM into SIGTERMException.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    is_sigterm = isinstance(stop, SIGTERMException) or getattr(stop, "code", None) == SIGTERM
    return SIGTERM if is_sigterm else CTRL_C


def end_on_hangup() -> None:
    """A closed terminal (SIGHUP) ends a run as SIGTERM does, unless nohup has it ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
