"""A multirun as a whole: the runs it is made of, how far they are, and how each ended."""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_lab import compose
from lora_lab.config import Config, ConfigError
from lora_lab.plan import plan
from lora_lab.runs import Run

JOBS = "LORA_LAB_JOBS"
"""The environment variable that tells every process of a multirun its runs, and when it began."""


@dataclass(frozen=True)
class Job:
    """One point of a multirun: its directory, or why its config cannot be."""

    overrides: list[str]
    path: Path | None
    error: str | None = None

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


def jobs(points: Iterable[list[str]]) -> list[Job]:
    """Every run of a multirun, each checked as a run of its own."""
    return [_job(*point) for point in compose.every(points)]


def _job(overrides: list[str], cfg: Config | ConfigError) -> Job:
    try:
        if isinstance(cfg, ConfigError):
            raise cfg
        return Job(overrides, plan(cfg).path)
    except ConfigError as error:
        return Job(overrides, None, str(error))


def begin(every: list[Job], total: int = 0) -> None:
    """Tells this process and its children what the multirun is made of, so far.

    `total` is how many runs it will have, where not all of them are known yet.
    """
    paths = list(dict.fromkeys(str(job.path.absolute()) for job in every if job.path))
    began = json.loads(os.environ[JOBS])["began"] if JOBS in os.environ else time.time()
    told = {"paths": paths, "began": began, "total": max(total, len(paths))}
    os.environ[JOBS] = json.dumps(told)


def end() -> None:
    """Whatever this process runs next is no part of it."""
    os.environ.pop(JOBS, None)


def progress() -> str | None:
    """How far the multirun is that this process is part of: done, running, failed, time left."""
    if JOBS not in os.environ:
        return None
    told = json.loads(os.environ[JOBS])
    statuses = [Run(Path(path)).status for path in told["paths"]]
    states = [status["state"] for status in statuses]
    done, failed, running = (states.count(s) for s in ("finished", "failed", "running"))
    left = told["total"] - done - failed
    took = [
        s["seconds"]
        for s in statuses
        if s["state"] in ("finished", "failed") and s.get("started", 0) >= told["began"]
    ]
    parts = [f"{done} of {told['total']} done"]
    parts += [f"{running} running"] if running else []
    parts += [f"{failed} failed"] if failed else []
    if took and left:
        seconds = sum(took) / len(took) * left / max(1, running)
        parts.append(f"about {_duration(seconds)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
