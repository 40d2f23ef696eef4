"""Each file of an experiment × {cut, flipped bit, NULs, empty, missing} × each command.

A command is compared with the same one on files that are whole. It must print and write the same
numbers, or name the file. `train` must end with the run's numbers, bit for bit. The files of the
run beside it, and a person's, stay as they are.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.conftest import SMALL
from tests.faults.commands import Result, copy, run
from tests.faults.results import add_notes, compare_with_undisturbed, expect_notes
from tests.faults.trial import Trial, words
from tests.test_damaged_runs import FAULTS, damage

SETTINGS = (*SMALL["planted_linear"], "experiment=planted_linear", "tracking=off", "figures=true")
FAULTS_TRIED = {"cut": "cut", "flip": "flipped bit", "NULs": "NULs", "empty": "empty"}
FAULTS_TRIED |= {"missing": "missing"}
"""Name in tests/test_damaged_runs.py → in the table."""

NUMBERS = (".jsonl", ".safetensors", ".npz", ".yaml", ".csv")
"""Endings of the files that hold numbers, which are compared."""

RUN, OTHER = "RUN", "OTHER"
COMMANDS: dict[str, tuple[str, ...]] = {
    "ls": ("ls",),
    "best": ("best",),
    "report": ("report", RUN, "--to=written"),
    "report of all": ("report", "runs", "--to=written"),
    "diff": ("diff", RUN, OTHER),
    "analyze": ("analyze", RUN, "--to=written"),
    "analyze of two": ("analyze", RUN, OTHER, "--to=written"),
    "export": ("export", RUN, "written"),
    "export merged": ("export", RUN, "written", "--format=merged"),
    "reproduce": ("reproduce", RUN, "--to=written"),
    "train": ("train", *SETTINGS),
}


def prepare(folder: Path) -> None:
    """Makes a finished experiment of two runs with reports, and what each command makes of it."""
    whole = folder / "whole"
    whole.mkdir()
    assert run("train", "-m", *SETTINGS, "seed=0,1", folder=whole).code == 0
    for name in COMMANDS:
        tree = copy(whole, "undamaged")
        result = run(*arguments(name, tree), folder=tree)
        assert result.code == 0, result.output
        done = folder / "done" / name
        tree.rename(done.parent.mkdir(exist_ok=True) or done)
        (done / "output").write_text(result.output)


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    whole = folder / "whole"
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    files = [path for path in files if not path.name.startswith(".output")]
    figures = [path for path in files if path.suffix in (".png", ".pdf")]
    for file in files:
        if "seed1" in str(file) or file in figures[2:]:
            continue  # the other run is what commands go on with; figures are alike
        is_empty = not (whole / file).stat().st_size
        for fault in FAULTS_TRIED:
            if is_empty and fault != "missing":
                continue  # a lock
            for name in COMMANDS:
                yield partial(damaged_file, folder, file, fault, name)


def run_paths(tree: Path) -> tuple[str, str]:
    """The run whose files are damaged, and the one beside it, by their paths in the tree."""
    paths = sorted(path for path in (tree / "runs/planted_linear").glob("r4*"))
    first, second = (path.relative_to(tree).as_posix() for path in paths)
    return first, second


def arguments(name: str, tree: Path) -> list[str]:
    """The arguments of a command for the runs in a tree."""
    first, second = run_paths(tree)
    return [{RUN: first, OTHER: second}.get(argument, argument) for argument in COMMANDS[name]]


def damaged_file(folder: Path, file: Path, fault: str, name: str) -> Trial:
    """One command on a copy of the experiment in which one file is damaged."""
    trial = Trial(f"damaged: {FAULTS_TRIED[fault]}", f"{file}, {name}")
    tree, done = copy(folder / "whole", "damaged"), folder / "done" / name
    notes = add_notes(tree)
    if (tree / file).stat().st_size or FAULTS[fault] is None:
        damage(tree / file, fault)
    before = _kept_files(tree)
    result = trial.read(run(*arguments(name, tree), folder=tree))
    _judge(trial, result, tree, done, file, name)
    expect_notes(trial, notes)
    if name != "train":
        changed = [path for path, content in before.items() if _content(tree / path) != content]
        trial.expect(not changed, "lost", f"{name} changed {', '.join(map(str, changed))}")
    shutil.rmtree(tree)
    return trial


def _judge(trial: Trial, result: Result, tree: Path, done: Path, file: Path, name: str) -> None:
    """Notes what is bad about how a command ended on a damaged file."""
    undamaged = (done / "output").read_text()
    joined = "".join(result.output.split())
    names = joined.count(file.name), "".join(undamaged.split()).count(file.name)
    is_named = names[0] > (0 if result.code else names[1])
    if file.parts[0] == "bases" and not (tree / file).exists():
        is_named |= "isnotinbases/" in joined  # a base, whose file's name no run knows
    if name == "train":
        trial.expect(result.code == 0, "wrong end", f"exit code {result.code}")
        compare_with_undisturbed(trial, tree, done)
        return
    if result.code:
        trial.expect(is_named, "wrong end", f"exit code {result.code}, and {file} is not named")
        return
    is_same = words(result.output) == words(undamaged)
    is_same |= name == "reproduce" and "values, all equal" in result.output
    trial.expect(is_named or is_same, "unsaid", f"another output, and {file} is not named")
    numbers, wanted = _numbers(tree / "written"), _numbers(done / "written")
    differing = [path for path in {**numbers, **wanted} if numbers.get(path) != wanted.get(path)]
    trial.expect(is_named or not differing, "unsaid", f"other numbers: {', '.join(differing)}")


def _numbers(folder: Path) -> dict[str, bytes]:
    """The files below a folder that hold numbers, by path."""
    paths = [path for path in folder.rglob("*") if path.suffix in NUMBERS]
    # A .npz is a zip, which dates its entries: its length and its checksums stay.
    return {path.relative_to(folder).as_posix(): _content(path) for path in paths}


def _content(path: Path) -> bytes:
    if not path.exists():
        return b""
    if path.suffix == ".npz":
        import numpy as np

        try:
            with np.load(path) as arrays:
                return b"".join(name.encode() + array.tobytes() for name, array in arrays.items())
        except Exception:  # damaged
            pass
    return path.read_bytes()


def _kept_files(tree: Path) -> dict[Path, bytes]:
    """The files of runs, which a command that reads leaves as they are."""
    paths = [path for path in (tree / "runs").rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(tree): _content(path) for path in paths}
