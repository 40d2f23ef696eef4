"""A run directory: whose it is, how it ended, and files that are whole or not there."""

import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

PACKAGES = ("lora_lab", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "numpy")


class RunFailedError(RuntimeError):
    """A run that was started and did not reach its end."""


class RunBusyError(RuntimeError):
    """Another process is running this very run."""


class RunFinishedError(RuntimeError):
    """The run has been finished, by this process or another, and is not to be repeated."""


@dataclass(frozen=True)
class Run:
    """One run's directory, as it is on disk now."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config it was started with."""
        return yaml.safe_load((self.path / "config.yaml").read_text())

    @property
    def status(self) -> dict[str, Any]:
        """status.json: state, cell, times, and for a failed run the error and its traceback.

        A run that says it is running while nobody holds its lock was killed: interrupted.
        """
        try:
            status = json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {"state": "none"}
        except ValueError:
            return {"state": "damaged"}
        if status.get("state", "damaged") == "running":
            try:
                with FileLock(self.path / "lock", timeout=0):
                    status["state"] = "interrupted"
            except (Timeout, OSError):  # held, or not ours to hold: a folder that is read-only
                pass
        return {"state": "damaged", **status}

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.status["state"] == "finished"

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a crash is left out."""
        try:
            about = (self.path / "metrics.jsonl").stat()
        except FileNotFoundError:
            return []
        return _rows((self.path / "metrics.jsonl").absolute(), about.st_mtime_ns, about.st_size)

    def last(self, key: str) -> float | None:
        """The last value of a metric, None where it was never logged."""
        return next((row[key] for row in reversed(self.rows()) if key in row), None)

    def curve(self, key: str) -> dict[int, float]:
        """A metric by epoch."""
        return {int(row["epoch"]): row[key] for row in self.rows() if key in row}

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl: what is found out after the run."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def update(self, **changes: Any) -> None:
        """Sets fields of status.json."""
        path = self.path / "status.json"
        status = json.loads(path.read_text()) if path.exists() else {}
        write_atomic(path, json.dumps({**status, **changes}, indent=2) + "\n")


@lru_cache(maxsize=256)
def _rows(path: Path, date: int, size: int) -> list[dict[str, Any]]:
    """Read once: a report asks for many metrics. `date` and `size` tell when there is more."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def find_runs(root: Path) -> list[Run]:
    """Every run below `root`, `root` itself included, by name."""
    return [Run(status.parent) for status in sorted(root.rglob("status.json"))]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file that is, whatever happens, either the old one or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def record(
    path: Path, config: dict[str, Any], *, overwrite: bool = False, **about: Any
) -> Iterator[Run]:
    """Within it the run is `running`; how it is left is how it ended.

    Clears what an earlier try left, keeps the log in log.txt, and holds the directory's lock, so
    that a run which was killed is told from one that goes on. Raises RunBusyError where another
    process holds it, RunFinishedError where the run is finished and `overwrite` is not set.
    """
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    try:
        lock = FileLock(path / "lock").acquire(timeout=1)
    except Timeout:
        host = run.status.get("host", "an unknown host")
        raise RunBusyError(f"{path} is being run by another process, on {host}") from None
    with lock:
        if run.finished and not overwrite:
            raise RunFinishedError(str(path))
        started = time.time()
        status = {"state": "running", "started": started, "host": socket.gethostname(), **about}
        write_atomic(path / "status.json", json.dumps(status, indent=2) + "\n")
        for old in path.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name not in ("lock", "status.json"):
                old.unlink()
        write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_atomic(path / "env.json", json.dumps(environment(), indent=2) + "\n")
        handler = logging.FileHandler(path / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield run
        except BaseException as error:
            # Lightning turns Ctrl-C and SIGTERM into SystemExit.
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            with (path / "log.txt").open("a") as file:
                file.write(traceback.format_exc())
            run.update(
                state="interrupted" if stopped else "failed",
                seconds=time.time() - started,
                error=f"{type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
            )
            raise
        else:
            run.update(state="finished", seconds=time.time() - started)
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a run's numbers came from."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*command: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def named_run(path: Path) -> Run:
    """The run at `path`, or the one under runs/ whose hash begins with it.

    Raises FileNotFoundError where there is none, or more than one.
    """
    if (path / "status.json").exists():
        return Run(path)
    runs = find_runs(Path("runs"))
    hits = [
        run
        for run in runs
        if run.path.name == path.name or run.path.name.rpartition("-")[2].startswith(path.name)
    ]
    if len(hits) != 1:
        names = ", ".join(run.path.name for run in hits or runs[:3]) or "none"
        raise FileNotFoundError(f"{path} is no run directory and no run's hash; runs: {names}")
    return hits[0]
