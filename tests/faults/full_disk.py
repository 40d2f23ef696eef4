"""Disks that fill up: the run's, the base's, W&B's and the one for temporary files.

Each is a small file system in memory, which only root can mount. A training that no room is left
for ends with exit code 1 and names the cause; once there is room, the same command ends with the
numbers of a run that nothing happened to. A finished run stays finished, whatever finds no room.
"""

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from lora_lab.runs import find_runs
from tests.faults.commands import SHIFT, Result, copy, fork, run
from tests.faults.results import compare_with_undisturbed
from tests.faults.trial import Trial

TRAIN = ("train", *SHIFT, "trainer.max_epochs=8", "checkpoint_every=0")
NO_ROOM = "No space left on device"

SMALL_DISKS = {
    "run": ("runs", (4, 40, 70, 80, 90, 100, 120, 140, 160, 200)),
    "base": ("bases", (4, 8, 16, 24, 40)),
    "W&B": ("runs/shift/wandb", (4, 16, 64, 200)),
    "tmp": ("tmp", (4, 16)),
}
"""What lies on the small disk → the folder, and the sizes of the disk in KiB."""

READERS: dict[str, tuple[str, ...]] = {
    "report": ("report",),
    "analyze": ("analyze",),
    "export": ("export",),
    "reproduce": ("reproduce",),
    "train again": (*TRAIN, "overwrite=true"),
}
"""Commands on a finished run that lies on a full disk."""


def prepare(folder: Path) -> None:
    """Runs what nothing happens to."""
    for name in ("undisturbed", "empty"):
        (folder / name).mkdir()
    assert run(*TRAIN, folder=folder / "undisturbed").code == 0


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    for name, (where, sizes) in SMALL_DISKS.items():
        for size in sizes:
            yield partial(small_disk, folder, name, where, size)
    for name in READERS:
        for room in (0, 8, 100):
            yield partial(full_disk, folder, name, room)


def small_disk(folder: Path, name: str, where: str, size: int) -> Trial:
    """A training with a small disk, which gets room after it."""
    trial, tree = Trial(f"full disk: {name}", f"{size} KiB"), copy(folder / "empty", "disk")
    if why := _mount(tree / where, size):
        trial.skipped = why
        return trial
    try:
        environment = {"TMPDIR": str(tree / "tmp")} if name == "tmp" else {}
        tracking = "tracking=offline" if name in ("W&B", "tmp") else "tracking=off"
        command = (*TRAIN, tracking, "tracking.finish_timeout=4")
        result = trial.read(fork(*command, folder=tree, environment=environment).wait())
        _expect_cause(trial, result)
        _remount(tree / where, 2**16)
        result = trial.read(fork(*command, folder=tree, environment=environment).wait())
        trial.expect(result.code == 0, "wrong end", f"exit code {result.code}")
        compare_with_undisturbed(trial, tree, folder / "undisturbed")
        for finished in find_runs(tree / "runs"):
            if name == "W&B" and "wandb_error" in finished.status:
                said = "W&BHOLDS" in "".join("".join(trial.outputs).split())
                trial.expect(said, "unsaid", "W&B lacks rows, and no output says it")
    finally:
        _unmount(tree / where)
    return trial


def full_disk(folder: Path, name: str, room: int) -> Trial:
    """A command on a finished run whose disk has `room` KiB left; and once more with room."""
    trial = Trial("full disk: of a finished run", f"{name}, {room} KiB left")
    tree = copy(folder / "empty", "disk")
    if why := _mount(tree, 2**14):
        trial.skipped = why
        return trial
    try:
        source = folder / "undisturbed"
        subprocess.run(["cp", "-r", *map(str, source.glob("[a-z]*")), str(tree)], check=True)
        path = str(find_runs(tree / "runs")[0].path)
        options = {"report": (path,), "analyze": (path,), "export": (path, "out")}
        options["reproduce"] = (path, "--to=out")
        arguments = (*READERS[name], *options.get(name, ()))
        _fill(tree, room)
        result = trial.read(_with_output_elsewhere(arguments, tree, folder))
        _expect_cause(trial, result)
        if name != "analyze":  # which adds a row
            _expect_kept(trial, tree, source, is_repeated=name == "train again")
        (tree / "filling").unlink()
        if not (tree / "out" / "adapter_model.safetensors").exists():  # else export had room
            result = trial.read(_with_output_elsewhere(arguments, tree, folder))
        trial.expect(result.code == 0, "wrong end", f"with room: exit code {result.code}")
        if name != "analyze":
            compare_with_undisturbed(trial, tree, source)
        else:
            states = [run.check()["state"] for run in find_runs(tree / "runs")]
            trial.expect(states == ["finished"], "lost", f"the run is {states}")
    finally:
        _unmount(tree)
    return trial


def _expect_kept(trial: Trial, tree: Path, source: Path, is_repeated: bool) -> None:
    """Notes it where a finished run is gone; while it is repeated, previous/ keeps it."""
    (finished,) = find_runs(tree / "runs")
    if is_repeated and not finished.finished:
        kept = finished.path / "previous" / "adapter" / "adapter.safetensors"
        trial.expect(kept.exists(), "lost", "the finished run is not in previous/")
    else:
        compare_with_undisturbed(trial, tree, source)


def _with_output_elsewhere(arguments: tuple[str, ...], tree: Path, folder: Path) -> Result:
    """Runs a command whose output does not go to the full disk."""
    return fork(*arguments, folder=tree, logs=folder).wait()


def _expect_cause(trial: Trial, result: Result) -> None:
    """A command that found no room ends with 1 or 2 and names the cause, or ends well."""
    if result.code:
        is_said = NO_ROOM in " ".join(result.output.split())
        trial.expect(is_said, "wrong end", f"exit code {result.code}, and no cause")
        trial.expect(result.code in (1, 2), "wrong end", f"exit code {result.code}")


def _mount(folder: Path, size: int) -> str:
    """Mounts a file system of `size` KiB; says why where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(mount, check=True, capture_output=True)
        return ""
    return "only root can mount a small disk"


def _remount(folder: Path, size: int) -> None:
    options = f"remount,size={size}k"
    subprocess.run(["mount", "-o", options, str(folder)], check=True, capture_output=True)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(tree: Path, room: int) -> None:
    """Writes a file that leaves `room` KiB on the disk."""
    with suppress(OSError), (tree / "filling").open("wb") as file:
        while True:
            file.write(bytes(2**12))
            file.flush()
    with (tree / "filling").open("ab") as file:
        file.truncate((tree / "filling").stat().st_size - room * 2**10)
