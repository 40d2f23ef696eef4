"""The state of the multirun that this process conducts: its jobs, how far they are, how they ended.

It is one object of the module, because Hydra calls the launchers with overrides and nothing else:
they look up here what was checked before the first job began.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from lora_lab.config import compose
from lora_lab.config.schema import Config, ConfigError
from lora_lab.config.stored_config import checked_config
from lora_lab.run_files import PLANNED_FILE, DamagedRunError, planned_checksum, planned_runs
from lora_lab.runs import SERVER_FAILED, Run, write_atomic
from lora_lab.tracking.wandb_run import Server
from lora_lab.training.plan import Plan, plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One point of a multirun, after its config was checked.

    `path` is its run directory. Where the config is invalid, `path` and `plan` are None and
    `error` says why.
    """

    overrides: list[str]
    path: Path | None
    error: str | None = None
    plan: Plan | None = field(default=None, compare=False, repr=False)

    @property
    def state(self) -> str:
        """The state in the run's status.json, `none` before it began, or `config error`."""
        return self._run.status["state"] if self._run else "config error"

    @property
    def cause(self) -> str:
        """Why it failed, in one line; empty where it did not."""
        if self._run is None:
            return self.error or ""
        error = self._run.status.get("error")
        if error is None and _current is not None:  # where the disk was too full to write it
            error = _current.errors.get(self._run.path, "")
        return str(error or "").partition("\n")[0]

    @property
    def rows_lost(self) -> bool:
        """Whether W&B lacks something of the run."""
        return self._run is not None and "wandb_error" in self._run.status

    @property
    def _run(self) -> Run | None:
        return checked_config(Run(self.path)) if self.path else None


@dataclass
class Multirun:
    """What a process knows of the multirun that it conducts."""

    jobs: list[Job] = field(default_factory=list)
    """The jobs known so far: all of a grid, those asked for until now of a search."""
    total: int = 0
    """How many runs it will have."""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch. A run that started earlier is an earlier command's."""
    directory: Path | None = None
    """Hydra's folder for the multirun, with multirun.yaml and the output of lost jobs."""
    errors: dict[Path, str] = field(default_factory=dict)
    """Run directory → what the job's process says it failed with."""
    lost: set[Path] = field(default_factory=set)
    """Directories of runs whose process was killed, so that status.json does not say the end."""


_current: Multirun | None = None


def plan_jobs(points: Iterable[list[str]]) -> list[Job]:
    """Checks each point (the overrides of one run) as a run by itself and gives its job.

    A wrong config raises nothing: the job has the error, so that the other jobs can run.
    """
    jobs = []
    for overrides, cfg in compose.compose_points(points):
        try:
            if isinstance(cfg, ConfigError):
                raise cfg
            job_plan = _plan_job(cfg)
            jobs.append(Job(overrides, job_plan.path, plan=job_plan))
        except ConfigError as error:
            jobs.append(Job(overrides, None, str(error)))
    return jobs


def _plan_job(cfg: Config) -> Plan:
    """The plan of one job. Raises ConfigError.

    A job for SLURM is planned for one CPU: this machine may lack the cluster's GPUs, and the job
    checks its devices itself when it starts. Devices do not change a run's directory.
    """
    if "hydra/launcher=submitit_slurm" in sys.argv:
        trainer = cfg.trainer.model_copy(update={"accelerator": "cpu", "devices": 1})
        cfg = cfg.model_copy(update={"trainer": trainer})
    return plan(cfg)


def find_job(overrides: Sequence[str]) -> Job:
    """The job with these overrides: the one checked before the multirun began, else a new one."""
    point, jobs = list(overrides), _current.jobs if _current else []
    return next((job for job in jobs if job.overrides == point), None) or plan_jobs([point])[0]


def set_jobs(jobs: list[Job], total: int = 0) -> None:
    """Sets the jobs of this process's multirun, and begins it where none is conducted.

    `total` is how many runs it will have, where `jobs` are not all of them yet.
    """
    global _current
    _current = _current or Multirun()
    _current.jobs, _current.total = jobs, max(total, len({job.path for job in jobs if job.path}))


def note_error(overrides: Sequence[str], error: object) -> None:
    """Keeps what the job with these overrides failed with, for the table at the end."""
    if _current is not None and (path := find_job(overrides).path):
        _current.errors[path] = str(error)


def record_planned(jobs: list[Job]) -> None:
    """Adds the jobs to planned.json beside their runs, so that a report knows which are missing."""
    overrides_by_folder: dict[Path, dict[str, list[str]]] = {}
    for job in jobs:
        if job.path:
            overrides_by_folder.setdefault(job.path.parent, {})[job.path.name] = job.overrides
    for folder, overrides in overrides_by_folder.items():
        folder.mkdir(parents=True, exist_ok=True)
        # The lock: another multirun may add to the same file, and neither must lose a line.
        with FileLock(folder / f".{PLANNED_FILE}.lock"):
            for part in folder.glob(f".{PLANNED_FILE}.*.part"):  # of a multirun that was killed
                part.unlink()
            try:
                planned = planned_runs(folder)
            except DamagedRunError as error:
                log.warning("%s: it is written anew, with the runs of this command", error)
                planned = {}
            planned |= overrides
            content = {**planned, "sha256": planned_checksum(planned)}
            write_atomic(folder / PLANNED_FILE, json.dumps(content, indent=1) + "\n")


def set_directory(directory: Path) -> None:
    """Names the folder of the multirun itself, which `close` tidies.

    There the multirun's processes tell each other of a server of W&B's that failed one of them.
    Empty folders that killed multiruns left beside it go. One of another multirun that runs may be
    among them: its jobs make theirs anew.
    """
    Server.failure_file = directory / SERVER_FAILED
    if _current is None or _current.directory == directory:
        return
    _current.directory = directory
    for other in directory.parent.glob("*/"):
        if other != directory:
            _remove_empty(other)


def close() -> Path | None:
    """Ends this process's multirun. Gives its folder where output of lost jobs is left in it.

    multirun.yaml goes: each run's directory has the same settings in its config.yaml.
    """
    global _current
    directory = _current.directory if _current else None
    _current = None
    if directory is None:
        return None
    (directory / SERVER_FAILED).unlink(missing_ok=True)
    _remove_empty(directory)
    with suppress(OSError):
        directory.parent.rmdir()
    return directory if directory.exists() else None


def _remove_empty(directory: Path) -> None:
    """Removes a multirun's folder if there is nothing in it but multirun.yaml and empty folders."""
    (directory / "multirun.yaml").unlink(missing_ok=True)
    # Innermost first. rmdir fails on a folder that is not empty, which is then left.
    for folder in (*directory.glob("*/"), directory):
        with suppress(OSError):
            folder.rmdir()


def mark_lost(path: Path, cause: str) -> None:
    """Writes `cause` into the status.json of a run whose process was killed before it could."""
    if _current is not None:
        _current.lost.add(path)
    if Run(path).status["state"] in ("none", "interrupted"):
        path.mkdir(parents=True, exist_ok=True)
        Run(path).update_status(state="interrupted", error=cause)


def progress_line() -> str | None:
    """How far the multirun is, as `3 of 8 done, 2 running, 1 failed, about 4 min left`.

    None where this process conducts no multirun. Failures of earlier commands do not count, and
    the time left is from the runs of this command.
    """
    if _current is None:
        return None
    paths = dict.fromkeys(job.path for job in _current.jobs if job.path)
    statuses = [Run(path).status for path in paths]
    new_statuses = [s for s in statuses if s.get("started", 0) >= _current.began]
    states = [status["state"] for status in statuses]
    done, running = states.count("finished"), states.count("running")
    failed = sum(status["state"] == "failed" for status in new_statuses)
    left = _current.total - done - failed - len(_current.lost)
    seconds = [s["seconds"] for s in new_statuses if s["state"] in ("finished", "failed")]
    others = {"running": running, "failed": failed, "interrupted": len(_current.lost)}
    parts = [f"{done} of {_current.total} done"]
    parts += [f"{n} {state}" for state, n in others.items() if n]
    if seconds and left:
        # `running` jobs share what is left.
        estimate = sum(seconds) / len(seconds) * left / max(1, running)
        parts.append(f"about {_duration(estimate)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
