"""A multirun as a whole: the runs it is made of, how far they are, and how each ended."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from lora_lab.config import compose
from lora_lab.config.schema import Config, ConfigError
from lora_lab.runs import PLANNED_FILE, Run, planned_runs, write_atomic
from lora_lab.training.plan import Plan, plan


@dataclass(frozen=True)
class Job:
    """One point of a multirun: its directory, or why its config cannot be."""

    overrides: list[str]
    path: Path | None
    error: str | None = None
    plan: Plan | None = field(default=None, compare=False, repr=False)

    @property
    def state(self) -> str:
        """The run's status, `config error`, or `none` of a run that was not begun."""
        return Run(self.path).status["state"] if self.path else "config error"

    @property
    def cause(self) -> str:
        """Why it failed, in one line."""
        if self.path is None:
            return self.error or ""
        return str(Run(self.path).status.get("error", "")).partition("\n")[0]


@dataclass
class Multirun:
    """The one that this process conducts."""

    jobs: list[Job] = field(default_factory=list)
    total: int = 0
    began: float = field(default_factory=time.time)
    directory: Path | None = None
    lost: set[Path] = field(default_factory=set)
    """Runs whose process ended without a word."""


_now: Multirun | None = None


def plan_jobs(points: Iterable[list[str]]) -> list[Job]:
    """Every run of a multirun, each checked as a run of its own."""
    return [_job(*point) for point in compose.compose_points(points)]


def _job(overrides: list[str], cfg: Config | ConfigError) -> Job:
    try:
        if isinstance(cfg, ConfigError):
            raise cfg
        planned = plan_job(cfg)
        return Job(overrides, planned.path, plan=planned)
    except ConfigError as error:
        return Job(overrides, None, str(error))


def plan_job(cfg: Config) -> Plan:
    """The plan of a job, which checks its devices itself where they are not this machine's.

    Devices do not change a run's directory.
    """
    if "hydra/launcher=submitit_slurm" in sys.argv:
        trainer = cfg.trainer.model_copy(update={"accelerator": "cpu", "devices": 1})
        cfg = cfg.model_copy(update={"trainer": trainer})
    return plan(cfg)


def find_job(overrides: Sequence[str]) -> Job:
    """The job of these overrides: as it was checked before it began, or now."""
    point = list(overrides)
    known = [one for one in (_now.jobs if _now else ()) if one.overrides == point]
    return known[0] if known else plan_jobs([point])[0]


def set_jobs(every: list[Job], total: int = 0) -> None:
    """Tells this process what the multirun is made of, so far.

    `total` is how many runs it will have, where not all of them are known yet.
    """
    global _now
    _now = _now or Multirun()
    _now.jobs, _now.total = every, max(total, len({job.path for job in every if job.path}))


def record_planned(every: list[Job]) -> None:
    """Adds the runs to the planned.json of their folder, so that a report misses none."""
    folders: dict[Path, dict[str, list[str]]] = {}
    for job in every:
        if job.path:
            folders.setdefault(job.path.parent, {})[job.path.name] = job.overrides
    for folder, own in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{PLANNED_FILE}.lock"):
            content = json.dumps({**planned_runs(folder), **own}, indent=1)
            write_atomic(folder / PLANNED_FILE, content + "\n")


def set_directory(directory: Path) -> None:
    """Names the folder of what the multirun keeps that is no run's."""
    if _now is not None:
        _now.directory = directory


def close() -> Path | None:
    """Whatever this process runs next is no part of it. Gives the folder that is left of it.

    What Hydra writes there is in every run's directory, too.
    """
    global _now
    directory = _now.directory if _now else None
    _now = None
    if directory is None:
        return None
    (directory / "multirun.yaml").unlink(missing_ok=True)
    for folder in (*directory.glob("*/"), directory, directory.parent):
        with suppress(OSError):
            folder.rmdir()  # where it is empty
    return directory if directory.exists() else None


def mark_lost(path: Path, cause: str) -> None:
    """Keeps, for a run whose process ended without a word, what became of it."""
    if _now is not None:
        _now.lost.add(path)
    if Run(path).status["state"] in ("none", "interrupted"):
        path.mkdir(parents=True, exist_ok=True)
        Run(path).update_status(state="interrupted", error=cause)


def progress_line() -> str | None:
    """How far the multirun is that this process conducts: done, running, failed, time left."""
    if _now is None:
        return None
    paths = dict.fromkeys(job.path for job in _now.jobs if job.path)
    statuses = [Run(path).status for path in paths]
    states = [status["state"] for status in statuses]
    now = [s["state"] for s in statuses if s.get("started", 0) >= _now.began]
    done, running, failed = *map(states.count, ("finished", "running")), now.count("failed")
    left = _now.total - done - failed - len(_now.lost)
    took = [
        s["seconds"]
        for s in statuses
        if s["state"] in ("finished", "failed") and s.get("started", 0) >= _now.began
    ]
    parts = [f"{done} of {_now.total} done"]
    parts += [f"{running} running"] if running else []
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{len(_now.lost)} interrupted"] if _now.lost else []
    if took and left:
        parts.append(f"about {_duration(sum(took) / len(took) * left / max(1, running))} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
