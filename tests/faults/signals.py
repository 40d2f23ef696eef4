"""Signals {SIGTERM, SIGINT, SIGHUP, SIGKILL} to trainings and other commands at random moments.

A command ends with the exit code of exit_codes.py, without a traceback; then the same command ends
as one that nothing happened to.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.faults import kills
from tests.faults.commands import LIMIT, Command, copy, fork, processes_of
from tests.faults.kills import undisturbed
from tests.faults.results import compare_with_undisturbed
from tests.faults.trial import Trial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
CODES = {"SIGTERM": (143, -15), "SIGHUP": (143, -1, -15), "SIGINT": (130, -2), "SIGKILL": (-9,)}
"""The exit codes that a signal may leave: -N where it came before Python could see to it."""

TRIALS = {"basic": 3, "basic, multirun": 1, "joblib": 1, "packed": 1}
"""Training → how often each signal comes to it."""

READERS = ("report", "analyze", "export", "reproduce", "best")


def prepare(folder: Path) -> None:
    """Runs what nothing happens to."""
    kills.prepare(folder)


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    for signum in SIGNALS:
        for name, count in TRIALS.items():
            for _ in range(count):
                yield partial(training, folder, signum, name, draws.random())
        for reader in READERS:
            yield partial(reading, folder, signum, reader, draws.random())


def training(folder: Path, signum: signal.Signals, name: str, moment: float) -> Trial:
    """A training that gets a signal at a moment between its start, 0, and its end, 1."""
    trial = Trial(f"{signum.name}: train", f"{name}, moment {moment:.3f}")
    tree, wanted = copy(folder / "empty", "signal"), undisturbed(folder, name)
    command = kills.start(name, tree, {})
    if name in ("joblib", "packed"):
        kills.wait_for_run(command, tree)
    time.sleep(0.05 + moment * float((wanted / "seconds").read_text()))
    _send(trial, command, signum)
    end = time.monotonic() + LIMIT
    while processes_of(command.mark) and time.monotonic() < end:  # a launcher's jobs
        time.sleep(0.05)
    result = trial.read(kills.start(name, tree, {}).wait())
    trial.expect(result.code == 0, "wrong end", f"afterwards: exit code {result.code}")
    compare_with_undisturbed(trial, tree, wanted)
    return trial


def reading(folder: Path, signum: signal.Signals, name: str, moment: float) -> Trial:
    """A command on a finished run that gets a signal in the first second and a half."""
    trial = Trial(f"{signum.name}: {name}", f"moment {moment:.3f}")
    tree = copy(undisturbed(folder, "basic"), "signal")
    (path,) = (str(path) for path in (tree / "runs/shift").glob("r*"))
    options = {"export": (path, "out"), "reproduce": (path, "--to=out"), "best": ()}
    arguments = (name, *options.get(name, (path,)))
    command = fork(*arguments, folder=tree)
    time.sleep(1.5 * moment)
    _send(trial, command, signum)
    if (tree / "out" / "adapter_model.safetensors").exists():
        return trial  # it was written in time, and is not written over
    result = trial.read(fork(*arguments, folder=tree).wait())
    trial.expect(result.code == 0, "wrong end", f"afterwards: exit code {result.code}")
    if name != "analyze":  # which adds a row
        compare_with_undisturbed(trial, tree, undisturbed(folder, "basic"))
    return trial


def _send(trial: Trial, command: Command, signum: signal.Signals) -> None:
    """Sends a signal to a command, and compares its exit code with those that the signal leaves."""
    command.send(signum)
    result = trial.read(command.wait())
    right = (0, *CODES[signum.name])
    trial.expect(result.code in right, "wrong end", f"exit code {result.code}, not of {right}")
