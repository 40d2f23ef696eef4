"""Trainings that are killed at random moments, each in turn, until they are let go to their end.

One run, and multiruns by each launcher, of which all processes are killed or one; and runs that are
tracked online. Each must end with the numbers of the same command that nothing happened to, bit for
bit, and no run that was finished is trained again.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lora_lab.runs import find_runs
from tests.faults.commands import (
    SHIFT,
    Command,
    copy,
    fork,
    parent_of,
    processes_of,
    spawn,
)
from tests.faults.results import add_notes, compare_with_undisturbed, expect_notes
from tests.faults.trial import Trial
from tests.tracking.test_tracking import as_metrics_row
from tests.wandb_server import WandbServer

SINGLE = ("train", *SHIFT, "trainer.max_epochs=40", "checkpoint_every=0")
SWEEP = ("train", "-m", *SHIFT, "trainer.max_epochs=20", "checkpoint_every=0", "seed=0,1,2")
COMMANDS = {
    "basic": SINGLE,
    "basic, multirun": SWEEP,
    "joblib": (*SWEEP, "hydra/launcher=joblib"),
    "packed": (*SWEEP, "hydra/launcher=packed"),
    "online": (*SINGLE, "tracking=online", "tracking.finish_timeout=10"),
}
"""Name in the table → the command that is killed."""

TRIALS = {"basic": 8, "basic, multirun": 5, "joblib": 2, "packed": 2, "online": 4}
"""How many sequences of kills there are of each."""

KILLS = {"basic": 3, "basic, multirun": 2, "joblib": 2, "packed": 2, "online": 1}
"""How many kills there are in each."""

ENVIRONMENT = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.05"}


def prepare(folder: Path) -> None:
    """Runs what nothing happens to."""
    (folder / "empty").mkdir()
    # A pack has masks of dropout of its own.
    for name, begin in (("basic", fork), ("basic, multirun", fork), ("packed", spawn)):
        undisturbed(folder, name).mkdir()
        began = time.monotonic()
        result = begin(*COMMANDS[name], folder=undisturbed(folder, name)).wait()
        assert result.code == 0, result.output
        (undisturbed(folder, name) / "seconds").write_text(str(time.monotonic() - began))


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    for name, count in TRIALS.items():
        for _ in range(count):
            yield partial(killed_again_and_again, folder, name, draws.random())
    for name in ("joblib", "packed"):
        for victim in ("a job", "the fork server", "the multirun"):
            yield partial(one_process_killed, folder, name, victim, draws.random())


def undisturbed(folder: Path, name: str) -> Path:
    """The folder of the same command that nothing happened to."""
    if name == "packed":
        return folder / "packed"
    return folder / ("single" if name in ("basic", "online") else "sweep")


def start(name: str, tree: Path, environment: dict[str, str]) -> Command:
    """Starts a command: forked where it starts no processes by itself."""
    begin = fork if name in ("basic", "basic, multirun") else spawn
    return begin(*COMMANDS[name], folder=tree, environment=environment)


def killed_again_and_again(folder: Path, name: str, seed: float) -> Trial:
    """Kills all processes of a command at random moments, then lets it go on to its end."""
    draws, trial = random.Random(seed), Trial(f"kill: {name}", f"draws of {seed}", KILLS[name])
    seconds = float((undisturbed(folder, name) / "seconds").read_text())
    tree = copy(folder / "empty", "killed")
    with WandbServer() as server:
        environment = {**server.env, **ENVIRONMENT} if name == "online" else {}
        notes: dict[Path, bytes] = {}
        finished: dict[str, float] = {}
        for _ in range(KILLS[name]):
            command = start(name, tree, environment)
            if name not in ("basic", "basic, multirun"):
                wait_for_run(command, tree)
            time.sleep(seconds * draws.random())
            command.kill_all()
            trial.read(command.wait())
            notes |= add_notes(tree)
            finished |= _finished(tree)
        result = trial.read(start(name, tree, environment).wait())
        trial.expect(result.code == 0, "wrong end", f"exit code {result.code}")
        compare_with_undisturbed(trial, tree, undisturbed(folder, name))
        expect_notes(trial, notes)
        _expect_not_repeated(trial, tree, finished)
        if name == "online":
            _expect_rows_on_server(trial, tree, server)
    return trial


def one_process_killed(folder: Path, name: str, victim: str, seed: float) -> Trial:
    """Kills one process of a multirun, which ends by itself; then the same command goes on."""
    draws, trial = random.Random(seed), Trial(f"kill of {victim}: {name}", f"draws of {seed}")
    tree = copy(folder / "empty", "killed")
    command = start(name, tree, {})
    wait_for_run(command, tree)
    time.sleep(draws.random())
    servers = processes_of(command.mark, "forkserver")
    jobs = [pid for pid in servers if parent_of(pid) in servers]
    victims = {"a job": jobs, "the multirun": [command.pid]}
    victims["the fork server"] = [pid for pid in servers if pid not in jobs]
    if not victims[victim] or not jobs:
        trial.note("wrong end", f"no process of {victim} was seen")
    import os

    os.kill((victims[victim] or [command.pid])[0], signal.SIGKILL)
    result = trial.read(command.wait())
    if victim == "a job" and result.code == 0:
        trial.note("unsaid", "exit code 0, though a job was killed")
    _wait_for_end(command)
    finished = _finished(tree)
    result = trial.read(start(name, tree, {}).wait())
    trial.expect(result.code == 0, "wrong end", f"exit code {result.code}")
    compare_with_undisturbed(trial, tree, undisturbed(folder, name))
    _expect_not_repeated(trial, tree, finished)
    return trial


def wait_for_run(command: Command, tree: Path) -> None:
    """Waits until a run of the command has begun: the seconds before are spent on imports."""
    end = time.monotonic() + 60
    while time.monotonic() < end and not find_runs(tree / "runs"):
        time.sleep(0.01)


def _wait_for_end(command: Command) -> None:
    """Waits until the processes that a command left behind have ended."""
    end = time.monotonic() + 40
    while time.monotonic() < end and processes_of(command.mark):
        time.sleep(0.05)


def _finished(tree: Path) -> dict[str, float]:
    """When each finished run began."""
    return {
        run.path.name: run.status["started"] for run in find_runs(tree / "runs") if run.finished
    }


def _expect_not_repeated(trial: Trial, tree: Path, finished: dict[str, float]) -> None:
    now = _finished(tree)
    repeated = [name for name, started in finished.items() if now.get(name) != started]
    trial.expect(not repeated, "lost", f"finished, and trained again: {', '.join(repeated)}")


def _expect_rows_on_server(trial: Trial, tree: Path, server: WandbServer) -> None:
    """W&B's server must have each row once, or the run says that it lacks some."""
    (finished,) = find_runs(tree / "runs")
    rows = [
        as_metrics_row(row)
        for served in server.runs.values()
        for row in served.history
        if "trainer/global_step" in row
    ]
    is_right = rows == finished.rows() or "wandb_error" in finished.status
    trial.expect(is_right, "unsaid", f"W&B has {len(rows)} rows of {len(finished.rows())}")
