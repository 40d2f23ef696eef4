"""Commands that run at once on the same runs.

Two identical trainings; a training while others read; two multiruns that share runs; two commands
that write beside the same run. Each run ends with the numbers of a training that had the folder to
itself, and no command shows a traceback.
"""

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lora_lab.runs import find_runs
from tests.faults.commands import SHIFT, copy, fork, spawn
from tests.faults.results import compare_with_undisturbed
from tests.faults.trial import Trial

ONE = ("train", *SHIFT, "trainer.max_epochs=20", "checkpoint_every=0")
TRAINS = {
    "single": (ONE, ONE),
    "basic": ((*ONE, "-m", "seed=0,1"), (*ONE, "-m", "seed=1,2")),
    "joblib and basic": (
        (*ONE, "-m", "seed=0,1", "hydra/launcher=joblib"),
        (*ONE, "-m", "seed=1,2"),
    ),
}
"""Pairs of trainings that share runs."""


def prepare(folder: Path) -> None:
    """Runs what nothing happens to."""
    for name in ("undisturbed", "empty"):
        (folder / name).mkdir()
    result = fork(*ONE, "-m", "seed=0,1,2", folder=folder / "undisturbed").wait()
    assert result.code == 0, result.output


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    for name, count in {"single": 6, "basic": 4, "joblib and basic": 1}.items():
        for _ in range(count):
            yield partial(trainings, folder, name, draws.random())
    for _ in range(4):
        yield partial(reading_while_training, folder, is_repeated=False)
        yield partial(reading_while_training, folder, is_repeated=True)
    for command in ("report", "analyze", "export", "reproduce"):
        yield partial(two_at_once, folder, command)


def trainings(folder: Path, name: str, delay: float) -> Trial:
    """Two trainings that share runs, the second up to a second later; then both once more."""
    trial, tree = Trial(f"at once: two trainings, {name}", f"{delay:.3f} s"), _empty(folder)
    commands = [_start(TRAINS[name][0], tree)]
    time.sleep(delay)
    commands.append(_start(TRAINS[name][1], tree))
    for result in [trial.read(command.wait()) for command in commands]:
        is_busy = "is being run by another process" in " ".join(result.output.split())
        trial.expect(not result.code or is_busy, "wrong end", f"exit code {result.code}")
    before = {run.path: run.status for run in find_runs(tree / "runs")}
    for arguments in TRAINS[name]:
        result = trial.read(_start(arguments, tree).wait())
        trial.expect(result.code == 0, "wrong end", f"afterwards: exit code {result.code}")
    undisturbed = [run.path.name for run in find_runs(folder / "undisturbed")]
    names = [each for each in undisturbed if name != "single" or "-seed0-" in each]
    compare_with_undisturbed(trial, tree, folder / "undisturbed", names)
    repeated = [path.name for path, status in before.items() if _is_repeated(path, status)]
    trial.expect(not repeated, "lost", f"finished, and trained again: {', '.join(repeated)}")
    return trial


def reading_while_training(folder: Path, is_repeated: bool) -> Trial:
    """All commands that read, again and again, while a run trains or a finished one is repeated."""
    name = "a repeated training and readers" if is_repeated else "a training and readers"
    trial = Trial(f"at once: {name}", "ls, report, best, analyze, export, reproduce")
    tree = copy(folder / "undisturbed", "at-once")
    extra = ("seed=1", "overwrite=true") if is_repeated else ("seed=3",)
    (path,) = (tree / "runs/shift").glob("*seed1*")
    train = fork(*ONE, *extra, folder=tree)
    for i in range(3):
        readers = [
            fork("ls", folder=tree),
            fork("report", "runs", folder=tree),
            fork("best", folder=tree),
            fork("analyze", str(path), f"--to=analysis{i}", folder=tree),
            fork("export", str(path), f"exported{i}", folder=tree),
            fork("reproduce", str(path), f"--to=reproduced{i}", folder=tree),
        ]
        for result in [trial.read(reader.wait()) for reader in readers]:
            says_why = "is running" in " ".join(result.output.split()) or "damaged" in result.output
            says_why |= "No such file" in result.output  # removed while it was read
            is_right = result.code == 0 or (is_repeated and result.code == 2 and says_why)
            trial.expect(is_right, "wrong end", f"{result.command}: exit code {result.code}")
    result = trial.read(train.wait())
    trial.expect(result.code == 0, "wrong end", f"the training's exit code {result.code}")
    compare_with_undisturbed(trial, tree, folder / "undisturbed")
    return trial


def two_at_once(folder: Path, name: str) -> Trial:
    """Two of the same command on one finished run."""
    trial = Trial("at once: two of a command", name)
    tree = copy(folder / "undisturbed", "at-once")
    (path,) = (str(path) for path in (tree / "runs/shift").glob("*seed1*"))
    options = {"export": (path, "out"), "reproduce": (path, "--to=out")}
    arguments = (name, *options.get(name, (path,)))
    commands = [fork(*arguments, folder=tree) for _ in range(2)]
    codes = [trial.read(command.wait()).code for command in commands]
    trial.expect(0 in codes and {*codes} <= {0, 1, 2}, "wrong end", f"exit codes {codes}")
    states = [run.check()["state"] for run in find_runs(tree / "runs")]
    trial.expect({*states} == {"finished"}, "lost", f"runs are {states}")
    if name != "analyze":  # which adds a row
        compare_with_undisturbed(trial, tree, folder / "undisturbed")
    return trial


def _start(arguments: tuple[str, ...], tree: Path):
    begin = spawn if "hydra/launcher=joblib" in arguments else fork
    return begin(*arguments, folder=tree)


def _empty(folder: Path) -> Path:
    return copy(folder / "empty", "at-once")


def _is_repeated(path: Path, status: dict) -> bool:
    (run,) = (run for run in find_runs(path.parent) if run.path == path)
    return status["state"] == "finished" and run.status["started"] != status["started"]
