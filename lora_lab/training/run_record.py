"""How a run directory is written while its run trains: lock, status.json, log.txt, env.json."""

import json
import logging
import os
import platform
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, check_output
from typing import Any

import yaml
from filelock import AcquireReturnProxy, FileLock, Timeout

from lora_lab.run_files import DamagedRunError, file_records
from lora_lab.runs import (
    CHECKPOINTS,
    PREVIOUS,
    Run,
    RunBusyError,
    RunFinishedError,
    write_atomic,
    write_status,
)
from lora_lab.training.written_files import (
    linked_folder,
    remove_checkpoints,
    remove_files,
    remove_previous,
    written_files,
)

log = logging.getLogger(__name__)

PACKAGES = ("lora_lab", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "numpy")
PACKAGES += ("transformers", "timm", "bitsandbytes")
"""Packages whose versions env.json names."""

RESERVE = ".reserve"
"""A file that holds room on the disk while a run runs: given back to write how the run ended."""

RESERVED_BYTES = 65536
"""Room for status.json and for log.txt with a traceback."""

NOTHING_LAST = nullcontext()

_logged_run: ContextVar[Path | None] = ContextVar("_logged_run", default=None)


@contextmanager
def log_only_to(path: Path) -> Iterator[None]:
    """Within it, log messages go to the log.txt of the run at `path` only.

    A pack has many runs open at once, each with a handler on the root logger; without this each
    message would be written to the log of all of them.
    """
    token = _logged_run.set(path)
    try:
        yield
    finally:
        _logged_run.reset(token)


class RunDirectoryError(RuntimeError):
    """A run's directory, or a file in it, was removed meanwhile; or a folder in it is a link."""


@contextmanager
def record_run(
    run: Run,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    last: AbstractContextManager[Any] = NOTHING_LAST,
    **about: Any,
) -> Iterator[Run]:
    """A context in which a run trains; it keeps status.json, log.txt and the directory's lock.

    The state is `running` within it, and afterwards `finished`, `interrupted` (Ctrl-C, SIGTERM) or
    `failed` (another exception, which is raised further). A run that goes on (`can_continue`) keeps
    its checkpoints and its log, and its tries and seconds are added up; all other files of an
    earlier try are removed. A finished run that is repeated, and a damaged one, is kept in
    previous/ until the new one is finished. `last` is left once status.json says how the run ended,
    before the lock is freed. `about` are further fields of status.json. Raises RunBusyError where
    another process holds the lock, RunFinishedError where the run is finished and `overwrite` is
    not set.
    """
    path = run.path
    path.mkdir(parents=True, exist_ok=True)
    with lock(run):
        # This process has the lock now: a state of "running" is that of a process that was killed.
        before = status_in_full(run)
        if before["state"] == "finished" and not overwrite:
            raise RunFinishedError(str(path))
        if link := linked_folder(path):
            raise RunDirectoryError(f"{link} is a link, and a run writes into no other folder")
        status = {"state": "running", "started": time.time(), "host": platform.node(), **about}
        continues = can_continue(before) and not overwrite
        if continues:
            status |= {"tries": before.get("tries", 1) + 1, "spent": _seconds_spent(path, before)}
            status |= {key: before[key] for key in ("wandb", "packed") if key in before}
        # First, so that a full disk leaves the directory as it was. Zeros may be stored as a hole.
        write_atomic(path / RESERVE, os.urandom(RESERVED_BYTES))
        _clear(path, status, before["state"] in ("finished", "damaged"), continues)
        with _log_file(path), last, _outcome(run, status):
            write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            write_atomic(path / "env.json", json.dumps(environment(), indent=2) + "\n")
            if before["state"] == "damaged" and not overwrite:
                log.warning("the run is damaged (%s): training it again", before["error"])
            yield run


def status_in_full(run: Run) -> dict[str, Any]:
    """The run's status, which is damaged too where a large file of it has another content."""
    status = run.status
    try:
        return run.check()
    except DamagedRunError as error:
        fault = str(error).removeprefix(f"{run.path} is damaged: ")
        return {**status, "state": "damaged", "error": fault}


def can_continue(status: dict[str, Any]) -> bool:
    """Whether the next try of a run goes on from the checkpoint that it left, if it left one.

    So it does after an interruption, and after an error in what follows the last step: there the
    training is done, and no step would come out another way. An error in a step would come again.
    """
    is_trained = status["state"] == "failed" and status.get("training_ended", False)
    return status["state"] in ("running", "interrupted") or is_trained


def lock(run: Run) -> AcquireReturnProxy:
    """The run's lock, acquired. Raises RunBusyError where another process holds it."""
    try:
        return FileLock(run.path / "lock").acquire(timeout=1)
    except Timeout:
        host = run.status.get("host", "an unknown host")
        raise RunBusyError(f"{run.path} is being run by another process, on {host}") from None


def wait_until_free(run: Run) -> Run:
    """Waits until no process trains in the run directory, and gives the run."""
    with FileLock(run.path / "lock").acquire(poll_interval=0.5):
        return run


def _clear(path: Path, status: dict[str, Any], is_kept: bool, continues: bool) -> None:
    """Writes the new status.json, and removes the files that the try before wrote.

    Where `is_kept`, they are moved to previous/. The order matters: previous/ has a copy of the
    status before status.json is replaced, and status.json says `running` before any other file
    goes, so that a crash in between leaves no directory that claims to be finished and is not.
    """
    if is_kept:
        remove_previous(path)
        (path / PREVIOUS).mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # a damaged run may have lost it
            shutil.copy(path / "status.json", path / PREVIOUS)
    write_status(path, status)
    has_log = not (path / "log.txt").is_symlink()  # what a link leads to is no log of this run
    stays = (CHECKPOINTS, *(["log.txt"] if has_log else [])) if continues else ()
    files = written_files(path, stays)
    for file in files if is_kept else ():
        previous = path / PREVIOUS / file.relative_to(path)
        previous.parent.mkdir(parents=True, exist_ok=True)
        file.rename(previous)
    remove_files(files, path)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Within it the root logger writes to the run's log.txt too."""
    handler = logging.FileHandler(path / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda _: _logged_run.get() in (None, path))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):
            handler.close()


@contextmanager
def _outcome(run: Run, status: dict[str, Any]) -> Iterator[None]:
    """Writes to status.json how the run ended. `status` is that with which it began.

    A run whose directory was removed meanwhile has failed. If another process has begun a run there
    by now, its files are left alone.
    """
    lock_file, begun = (run.path / "lock").stat().st_ino, status["started"]

    def record(state: str, **fields: Any) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        seconds = status.get("spent", 0.0) + time.time() - begun
        fields = {"state": state, "seconds": seconds, **fields}
        write_status(run.path, {**status, **_stored_fields(run), **fields})

    try:
        try:
            yield
        except Exception as error:
            if _is_removed(run, lock_file):
                raise RunDirectoryError(f"{_removed(run.path)} ({error})") from error
            raise
        (run.path / RESERVE).unlink(missing_ok=True)
        files = file_records(run.path)
        if _is_removed(run, lock_file) or "config.yaml" not in files:
            raise RunDirectoryError(_removed(run.path))
        record("finished", files=files)
    except BaseException as error:
        (run.path / RESERVE).unlink(missing_ok=True)
        if _is_removed(run, lock_file) and _stored_fields(run).get("started", begun) != begun:
            raise  # the status is that of another process
        # Lightning turns Ctrl-C and SIGTERM into SystemExit.
        state = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        trace = traceback.format_exc()
        with suppress(OSError):  # what ended the run is raised, not that it cannot be written
            record(state, error=f"{type(error).__name__}: {error}", traceback=trace)
            with (run.path / "log.txt").open("a") as file:
                file.write(trace)
        raise
    remove_checkpoints(run.path)
    remove_previous(run.path)


def _is_removed(run: Run, lock_file: int) -> bool:
    """Whether the lock is not the file any more that it was, by the number of its inode.

    This process keeps it open, so that no other file has that number.
    """
    try:
        return (run.path / "lock").stat().st_ino != lock_file
    except FileNotFoundError:
        return True


def _stored_fields(run: Run) -> dict[str, Any]:
    """The fields of status.json; {} where the file was removed."""
    with suppress(FileNotFoundError):
        return json.loads((run.path / "status.json").read_text())
    return {}


def _removed(path: Path) -> str:
    return f"{path}, or its config.yaml, was removed while the run trained"


def _seconds_spent(path: Path, before: dict[str, Any]) -> float:
    """Seconds that all earlier tries took, by the status `before` this one.

    A try that was killed wrote no `seconds`: it is taken to have lasted until its last file write.
    """
    if "seconds" in before:
        return before["seconds"]
    last_write = max(file.stat().st_mtime for file in path.glob("*.*"))
    return before.get("spent", 0.0) + max(0.0, last_write - before.get("started", last_write))


@cache
def package_versions() -> dict[str, str | None]:
    """The versions of PACKAGES; None for one that is not installed."""
    installed = {name: next(iter(distributions(name=name)), None) for name in PACKAGES}
    return {name: package and package.version for name, package in installed.items()}


def environment() -> dict[str, Any]:
    """The content of env.json: the machine, package versions and git commit of a run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": package_versions(),
        "git": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*command: str) -> str | None:
    """The output of a git command; None where git or the repository is missing."""
    with suppress(OSError, SubprocessError):
        return check_output(["git", *command], stderr=DEVNULL, text=True, timeout=5).strip()
    return None
