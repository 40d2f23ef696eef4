"""A run directory: its files, the state of its run, and the lock that one process holds on it.

config.yaml, env.json, status.json, metrics.jsonl and log.txt are what every run has.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The YAML loader: libyaml's where it is installed, which is ten times as fast."""

PLANNED_FILE = "planned.json"
"""The file in an experiment's folder that lists the runs of its multiruns: name → overrides."""

NOT_IN_IDENTITY = ("published", "runs_dir", "bases_dir", "overwrite", "figures", "sweep")
NOT_IN_IDENTITY += ("tracking", "checkpoint_every")
"""Keys of a config that cannot change the run's result: its identity leaves them out."""

DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "strategy")
"""Keys of `trainer` that cannot change the run's result beyond rounding: left out likewise."""

CHECKPOINTS = "checkpoints"
"""The folder of a run directory with the checkpoints that an interrupted run continues from."""

PREVIOUS = "previous"
"""The folder that keeps the files of a finished run while the run is being repeated."""


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
    """One run directory. Its properties read the files as they are now."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with."""
        return yaml.load((self.path / "config.yaml").read_text(), LOADER)

    @property
    def status(self) -> dict[str, Any]:
        """The content of status.json: state, cell, times; of a failed run the error and traceback.

        `state` is none, running, interrupted, failed, finished or damaged (the file cannot be
        read). A run whose file says "running" while no process holds its lock was killed:
        its state is given as "interrupted".
        """
        try:
            status = json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {"state": "none"}
        except ValueError:
            return {"state": "damaged"}
        if status.get("state") == "running":
            # Timeout: its process holds the lock. OSError: the folder is read-only.
            with suppress(Timeout, OSError), FileLock(self.path / "lock", timeout=0):
                status["state"] = "interrupted"
        return {"state": "damaged", **status}

    @property
    def finished(self) -> bool:
        """Whether the run ended without an error."""
        return self.status["state"] == "finished"

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

    def append_row(self, row: dict[str, Any]) -> None:
        """Adds a row to metrics.jsonl, for what is measured after the run has ended."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def update_status(self, **changes: Any) -> None:
        """Sets fields of status.json and keeps the others."""
        path = self.path / "status.json"
        status = json.loads(path.read_text()) if path.exists() else {}
        write_atomic(path, json.dumps({**status, **changes}, indent=2) + "\n")


@lru_cache(maxsize=256)
def _rows(path: Path, modified_ns: int, size: int) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, parsed.

    A report asks for many metrics of one run, so the parsed rows are cached. The file's time and
    size are part of the cache's key: a file that has grown is read again.
    """
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def find_runs(root: Path) -> list[Run]:
    """All runs in `root` and in the folders below it, sorted by path."""
    runs = []
    # os.walk, unlike Path.rglob, goes on when a folder is removed while it walks.
    for folder, subfolders, files in os.walk(root):
        if "status.json" in files:
            runs.append(Run(Path(folder)))
            subfolders.clear()  # a run directory has no runs in it, but for previous/
    return sorted(runs, key=lambda run: run.path)


def planned_runs(folder: Path) -> dict[str, list[str]]:
    """Name → overrides of each run that multiruns were asked to run in an experiment's folder."""
    with suppress(FileNotFoundError):
        return json.loads((folder / PLANNED_FILE).read_text())
    return {}


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a crash leaves either the old file or the complete new one.

    The content goes to a temporary file, is flushed to disk, and is then renamed over `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def find_run(path: Path) -> Run:
    """The run at `path`; or the one in runs/ whose name is `path` or whose hash begins with it.

    Raises FileNotFoundError where no run or more than one fits.
    """
    if (path / "status.json").exists():
        return Run(path)
    name, paths = path.name, [run.path for run in find_runs(Path("runs"))]
    matches = [p for p in paths if p.name == name or p.name.split("-")[-1].startswith(name)]
    if len(matches) != 1:
        names = ", ".join(p.name for p in matches or paths[:3]) or "none"
        raise FileNotFoundError(f"{path} is no run directory and no run's hash; runs: {names}")
    return Run(matches[0])
