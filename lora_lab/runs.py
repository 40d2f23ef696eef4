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
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

PACKAGES = ("lora_lab", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "numpy")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where there is one: ten times as fast."""
PLANNED_FILE = "planned.json"
"""The file beside an experiment's runs with those that multiruns were to run: name → overrides."""

NOT_IN_IDENTITY = ("published", "runs_dir", "bases_dir", "overwrite", "figures", "sweep")
NOT_IN_IDENTITY += ("tracking", "checkpoint_every")
DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "strategy")
"""What of a config, and of its trainer, cannot change a run's result."""

CHECKPOINTS = "checkpoints"
"""The folder of a run that an interrupted try leaves to the next one."""

PREVIOUS = "previous"
"""The folder of a run that is being repeated, with its finished self until the new one is."""


class RunFailedError(RuntimeError):
    """A run that was started and did not reach its end."""


class RunBusyError(RuntimeError):
    """Another process is running this very run."""


class RunFinishedError(RuntimeError):
    """The run has been finished, by this process or another, and is not to be repeated."""


def process_rank() -> int:
    """Which of a run's processes this is, on several devices: the first has its files."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@dataclass(frozen=True)
class Run:
    """One run's directory, as it is on disk now."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config it was started with."""
        return yaml.load((self.path / "config.yaml").read_text(), LOADER)

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

    def append_row(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl: what is found out after the run."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def update_status(self, **changes: Any) -> None:
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
    found = []
    for folder, inner, files in os.walk(root):  # folders may go meanwhile
        if "status.json" in files:
            found.append(Run(Path(folder)))
            inner.clear()
    return sorted(found, key=lambda run: run.path)


def planned_runs(folder: Path) -> dict[str, list[str]]:
    """The runs that multiruns were to run in a folder, each with its overrides."""
    try:
        return json.loads((folder / PLANNED_FILE).read_text())
    except FileNotFoundError:
        return {}


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file that is, whatever happens, either the old one or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


_logged: ContextVar[Path | None] = ContextVar("_logged", default=None)


@contextmanager
def log_only_to(path: Path) -> Iterator[None]:
    """Within it what is logged is the run's at `path` alone, of those that are open at once."""
    token = _logged.set(path)
    try:
        yield
    finally:
        _logged.reset(token)


@contextmanager
def record_run(
    path: Path, config: dict[str, Any], *, overwrite: bool = False, **about: Any
) -> Iterator[Run]:
    """Within it the run is `running`; how it is left is how it ended.

    Clears what an earlier try left, keeps the log in log.txt, and holds the directory's lock, so
    that a run which was killed is told from one that goes on. A run that was interrupted keeps its
    checkpoints and its log, and its tries and seconds are counted together. A finished one that is
    to be repeated is kept in previous/ until it has been. Raises RunBusyError where another
    process holds the lock, RunFinishedError where the run is finished and `overwrite` is not set.
    """
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    try:
        lock = FileLock(path / "lock").acquire(timeout=1)
    except Timeout:
        host = run.status.get("host", "an unknown host")
        raise RunBusyError(f"{path} is being run by another process, on {host}") from None
    with lock:
        before = run.status  # as the lock is ours, a run that says it is running was killed
        finished = before["state"] == "finished"
        if finished and not overwrite:
            raise RunFinishedError(str(path))
        started, spent = time.time(), 0.0
        status = {"state": "running", "started": started, "host": socket.gethostname(), **about}
        kept = {"lock", "status.json", PREVIOUS}
        if before["state"] in ("running", "interrupted") and not overwrite:
            kept |= {CHECKPOINTS, "log.txt"}
            spent = _spent(path, before)
            status |= {"tries": before.get("tries", 1) + 1, "spent": spent}
            status |= {"wandb": before["wandb"]} if "wandb" in before else {}
        if finished:
            shutil.rmtree(path / PREVIOUS, ignore_errors=True)
            (path / PREVIOUS).mkdir()
            shutil.copy(path / "status.json", path / PREVIOUS)
        write_atomic(path / "status.json", json.dumps(status, indent=2) + "\n")
        for old in [old for old in path.iterdir() if old.name not in kept]:
            if finished:
                old.rename(path / PREVIOUS / old.name)
            elif old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
        write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_atomic(path / "env.json", json.dumps(environment(), indent=2) + "\n")
        handler = logging.FileHandler(path / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.addFilter(lambda _: _logged.get() in (None, path))
        logging.getLogger().addHandler(handler)
        try:
            yield run
        except BaseException as error:
            # Lightning turns Ctrl-C and SIGTERM into SystemExit.
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            with (path / "log.txt").open("a") as file:
                file.write(traceback.format_exc())
            run.update_status(
                state="interrupted" if stopped else "failed",
                seconds=spent + time.time() - started,
                error=f"{type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
            )
            raise
        else:
            run.update_status(state="finished", seconds=spent + time.time() - started)
            for done in (CHECKPOINTS, PREVIOUS):
                shutil.rmtree(path / done, ignore_errors=True)
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _spent(path: Path, before: dict[str, Any]) -> float:
    """Seconds that all tries took; one that was killed took until it last wrote a file."""
    if "seconds" in before:
        return before["seconds"]
    last = max(file.stat().st_mtime for file in path.glob("*.*"))
    return before.get("spent", 0.0) + max(0.0, last - before.get("started", last))


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


def find_run(path: Path) -> Run:
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
