"""A run directory: its files, the state of its run, and the lock that one process holds on it.

config.yaml, env.json, status.json, metrics.jsonl and log.txt are what every run has.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_lab.run_files import (
    ENVIRONMENT,
    IN_FULL,
    MISSING,
    DamagedRunError,
    content_record,
    difference,
    fault,
    read_config,
    read_rows,
    with_checksum,
)

NOT_IN_IDENTITY = ("published", "runs_dir", "bases_dir", "overwrite", "figures", "sweep")
NOT_IN_IDENTITY += ("tracking", "checkpoint_every")
"""Keys of a config that cannot change the run's result: its identity leaves them out."""

DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "strategy")
"""Keys of `trainer` that cannot change the run's result beyond rounding: left out likewise."""

CHECKPOINTS = "checkpoints"
"""The folder of a run directory with the checkpoints that an interrupted run continues from."""

SERVER_FAILED = "wandb-server-failed"
"""The file in a multirun's folder that says that W&B's server has failed one of its runs."""

PREVIOUS = "previous"
"""The folder that keeps the files of a finished run while the run is being repeated."""

STATES = ("finished", "running", "failed", "interrupted", "damaged")
"""The states of a run that has begun."""


class RunFailedError(RuntimeError):
    """A run was started and failed."""


class RunBusyError(RuntimeError):
    """Another process is training in this run directory."""


class RunFinishedError(RuntimeError):
    """The run is finished already, and `overwrite` is not set."""


def process_rank() -> int:
    """The index of this process among those of one run, which has a process for each device.

    Process 0 writes the run's files. A run on one device has that process only.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@dataclass(frozen=True)
class Run:
    """One run directory. Its properties read the files as they are now.

    `known_fault` is what a reader of configs found wrong with it (config/stored_config.py).
    """

    path: Path
    known_fault: str = field(default="", compare=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with. Raises DamagedRunError."""
        return read_config(self.path / "config.yaml")

    @property
    def status(self) -> dict[str, Any]:
        """The content of status.json: state, cell, times; of a failed run the error and traceback.

        `state` is none, running, interrupted, failed, finished or damaged. A run whose file says
        "running" while no process holds its lock was killed: its state is given as "interrupted".
        One whose file says "finished" is damaged where a file of it is not as it was (run_files.py
        says how much is read to tell), and so is one that has lost its status.json, unless it has
        checkpoints: then it was never finished. `error` names the file and what is wrong with it.
        """
        try:
            status = json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return self._lost(MISSING) if is_run(self.path) else {"state": "none"}
        except ValueError:
            return self._lost("cannot be read: no JSON")
        if not isinstance(status, dict) or status.get("state") not in STATES:
            return self._lost("cannot be read: it has no state of a run")
        if status["state"] == "running":
            if not _is_locked(self.path / "lock"):
                status["state"] = "interrupted"
        elif status["state"] == "finished":
            problem = self.known_fault or fault(self.path, status)
            return status | _damaged(problem) if problem else status
        return status

    def _lost(self, problem: str) -> dict[str, Any]:
        """The status where status.json does not tell it. A finished run has no checkpoints."""
        status = _damaged(f"status.json {problem}")
        has_checkpoint = any((self.path / CHECKPOINTS).glob("*.ckpt"))
        return {**status, "state": "interrupted"} if has_checkpoint else status

    @property
    def finished(self) -> bool:
        """Whether the run ended without an error, and its files are as they were."""
        return self.status["state"] == "finished"

    @property
    def environment(self) -> dict[str, Any]:
        """The content of env.json. `env.json` in it says how the file is not as it was."""
        file = self.path / ENVIRONMENT
        recorded = self.status.get("files", {}).get(ENVIRONMENT)
        problem = difference(file, recorded, in_full=True) if recorded else ""
        try:
            content = {**json.loads(file.read_text())}
        except (OSError, ValueError, TypeError):
            content, problem = {}, problem or "cannot be read"
        return {**content, ENVIRONMENT: problem} if problem else content

    @property
    def has_report(self) -> bool:
        """Whether its report is complete, of which the page is written last."""
        return (self.path / "report" / "index.html").exists()

    def check(self, in_full: tuple[str, ...] = IN_FULL) -> dict[str, Any]:
        """The status. Raises DamagedRunError for a damaged run, with the file and what is wrong.

        Of a finished run the content of all files is compared, or of those whose names begin with
        one of `in_full`: for whoever reads them.
        """
        status = self.status
        problem = status["error"] if status["state"] == "damaged" else ""
        if status["state"] == "finished":
            problem = fault(self.path, status, in_full)
        if problem:
            raise DamagedRunError(f"{self.path} is damaged: {problem}")
        return status

    def check_finished(self, use: str) -> None:
        """Raises ValueError unless the run is finished and all its files are as they were.

        `use` is what only a finished run can be, as `reproduced`.
        """
        if (state := self.check()["state"]) != "finished":
            raise ValueError(f"{self.path} is {state}: only a finished run can be {use}")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without a last line that a crash cut short."""
        path = self.path / "metrics.jsonl"
        with suppress(FileNotFoundError):
            return _rows(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)
        return []

    def last(self, key: str) -> float | None:
        """The last value of a metric; None where it was not logged."""
        return next((row[key] for row in reversed(self.rows()) if key in row), None)

    def curve(self, key: str) -> dict[float, float]:
        """The values of a metric by epoch: an int, or with a fraction within an epoch."""
        epochs = ((row["epoch"], row) for row in self.rows() if key in row)
        return {int(e) if float(e).is_integer() else e: row[key] for e, row in epochs}

    def replace_files(self, contents: Mapping[str, bytes | None]) -> None:
        """Writes files of a finished run anew, by name, with their records; None removes one.

        While it writes, status.json has the old records and the new (`replacing`): a crash leaves a
        run whose files are each whole, the old one or the new one.
        """
        status = json.loads((self.path / "status.json").read_text())
        new = {n: None if c is None else content_record(n, c) for n, c in contents.items()}
        if "files" in status:
            self.update_status(replacing=new)
        for name, content in contents.items():
            if content is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                write_atomic(self.path / name, content)
        if "files" in status:
            files = {n: r for n, r in {**status["files"], **new}.items() if r is not None}
            self.update_status(files=files, replacing={})

    def update_status(self, **changes: Any) -> None:
        """Sets fields of status.json and keeps the others."""
        path = self.path / "status.json"
        write_status(
            self.path, {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
        )


def _is_locked(file: Path) -> bool:
    """Whether a process holds a lock. In a read-only folder it is asked for without being made."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        try:
            with file.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except OSError:  # there is no such file: no process can hold it
            return file.exists()


def _damaged(problem: str) -> dict[str, Any]:
    """The status of a damaged run, or what is different in it."""
    return {"state": "damaged", "error": problem}


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Writes status.json, with its own checksum where it has the records of a finished run."""
    content = with_checksum(status) if "files" in status else status
    write_atomic(folder / "status.json", json.dumps(content, indent=2) + "\n")


@lru_cache(maxsize=256)
def _rows(path: Path, modified_ns: int, size: int) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, parsed.

    A report asks for many metrics of one run, so the parsed rows are cached. The file's time and
    size are part of the cache's key: a file that has grown is read again.
    """
    return read_rows(path)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory: also one that has lost its status.json."""
    names = ("config.yaml", "metrics.jsonl")
    return (folder / "status.json").exists() or all((folder / name).exists() for name in names)


def find_runs(root: Path) -> list[Run]:
    """All runs in `root` and in the folders below it, sorted by path."""
    runs = []
    seen: set[str] = set()  # of links, which may lead back to a folder above
    # os.walk, unlike Path.rglob, goes on when a folder is removed while it walks.
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        if "status.json" in files or {"config.yaml", "metrics.jsonl"} <= set(files):
            runs.append(Run(Path(folder)))
            subfolders.clear()  # a run directory has no runs in it, but for previous/
    return sorted(runs, key=lambda run: run.path)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a crash leaves either the old file or the complete new one.

    The content goes to a temporary file, is flushed to disk, and is then renamed over `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # it is left where the disk is full


def find_run(path: Path) -> Run:
    """The run at `path`; or the one in runs/ whose name is `path` or whose hash begins with it.

    Raises FileNotFoundError where no run or more than one fits.
    """
    if is_run(path):
        return Run(path)
    name, paths = path.name, [run.path for run in find_runs(Path("runs"))]
    matches = [p for p in paths if p.name == name or p.name.split("-")[-1].startswith(name)]
    if len(matches) != 1:
        names = ", ".join(p.name for p in matches or paths[:3]) or "none"
        raise FileNotFoundError(f"{path} is no run directory and no run's hash; runs: {names}")
    return Run(matches[0])
