"""A person's files in all folders of lora_lab, and folders that are links, under each command.

They stay as they are, whatever is trained again, repeated, analyzed, reported or fails; nothing is
written behind a link.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lora_lab.runs import Run, find_runs
from tests.faults.commands import copy, run
from tests.faults.damaged_files import SETTINGS
from tests.faults.results import add_notes, expect_notes
from tests.faults.trial import Trial

TRAIN = ("train", *SETTINGS)
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": TRAIN,
    "train, overwrite": (*TRAIN, "overwrite=true"),
    "train, other seed": (*TRAIN, "seed=2"),
    "multirun": (*TRAIN, "-m", "seed=0,1,2"),
    "report": ("report", "RUN"),
    "report of all": ("report", "runs"),
    "analyze": ("analyze", "RUN"),
    "export": ("export", "RUN", "runs"),
    "reproduce": ("reproduce", "RUN", "--to=out", "--fresh"),
}
OF_FINISHED = ("report", "analyze", "export", "reproduce")
"""Commands that refuse a run that is not finished."""

STATES = ("finished", "interrupted", "failed", "damaged")
LINKED = ("report", "adapter", "checkpoints", "previous", "bases", "runs", "runs/planted_linear")
"""Folders that are links to a person's folder: the first four in a run directory."""


def prepare(folder: Path) -> None:
    """Makes a finished experiment of two runs with reports."""
    whole = folder / "whole"
    whole.mkdir()
    assert run("train", "-m", *SETTINGS, "seed=0,1", folder=whole).code == 0


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    for name in COMMANDS:
        for state in STATES:
            yield partial(notes_beside_runs, folder, name, state)
        for linked in LINKED:
            yield partial(linked_folder, folder, name, linked)


def notes_beside_runs(folder: Path, name: str, state: str) -> Trial:
    """A command on runs that a person's notes, and a link to another folder, lie beside."""
    trial = Trial(f"notes beside a {state} run", name)
    tree = copy(folder / "whole", "foreign")
    first = _first_run(tree)
    if state == "damaged":
        (first.path / "metrics.jsonl").unlink()
    elif state != "finished":
        status = json.loads((first.path / "status.json").read_text())
        (first.path / "status.json").write_text(json.dumps({**status, "state": state}))
    notes = add_notes(tree)
    notes |= _persons_folder(tree)
    for linked in (first.path / "link", tree / "bases/link", first.path / "report/link"):
        linked.symlink_to((tree / "person").absolute())
    _run(trial, name, tree, may_fail=state != "finished" and name in OF_FINISHED)
    expect_notes(trial, notes)
    for linked in (first.path / "link", tree / "bases/link", first.path / "report/link"):
        trial.expect(linked.is_symlink(), "lost", f"the link {linked.parent.name}/link")
    return trial


def linked_folder(folder: Path, name: str, linked: str) -> Trial:
    """A command where a folder of lora_lab is a link to a folder of a person's."""
    trial = Trial("a folder is a link", f"{linked}, {name}")
    tree = copy(folder / "whole", "foreign")
    notes = _persons_folder(tree)
    of_run = "runs" not in linked and linked != "bases"
    place = (_first_run(tree).path if of_run else tree) / linked
    if place.exists() and not of_run:
        # A person who keeps runs or bases on another disk: what lies there is used.
        shutil.copytree(place, tree / "person", dirs_exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    place.symlink_to((tree / "person").absolute())
    before = {path for path in (tree / "person").rglob("*") if path.is_file()}
    _run(trial, name, tree, may_fail=of_run)
    expect_notes(trial, notes)
    trial.expect(place.is_symlink(), "lost", f"the link {linked}")
    if of_run:
        after = {path for path in (tree / "person").rglob("*") if path.is_file()}
        added = ", ".join(sorted(path.name for path in after - before))
        trial.expect(not added, "lost", f"written behind the link: {added}")
    return trial


def _persons_folder(tree: Path) -> dict[Path, bytes]:
    """A person's files whose names are those of a run's, in a folder of theirs."""
    names = ("adapter.safetensors", "adapter.json", "last.ckpt", "table.md", "status.json.bak")
    (tree / "person").mkdir()
    for name in names:
        (tree / "person" / name).write_text(f"mine: {name}")
    return {tree / "person" / name: f"mine: {name}".encode() for name in names}


def _first_run(tree: Path) -> Run:
    return find_runs(tree / "runs")[0]


def _run(trial: Trial, name: str, tree: Path, may_fail: bool) -> None:
    """Runs a command; where it may fail, an exit code of 1 or 2 is right too."""
    path = _first_run(tree).path.relative_to(tree).as_posix()
    result = trial.read(run(*(a.replace("RUN", path) for a in COMMANDS[name]), folder=tree))
    is_right = result.code == 0 or (may_fail and result.code in (1, 2))
    trial.expect(is_right, "wrong end", f"exit code {result.code}")
