"""Jobs in other processes: started, watched, told of in one line, and ended with this one."""

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from rich.console import Console

from lora_lab import multirun
from lora_lab.config import ConfigError
from lora_lab.runs import Run, RunFailedError

SLOW = 1.0
"""Seconds between two looks from which on the start of a job is told, too."""

GRACE = 30
"""Seconds that a job which is told to end has, before it is killed."""


class Worker(Protocol):
    """A job that was started: a process, or a place in a cluster's queue."""

    def ended(self) -> bool:
        """Whether it runs no more, and will not again."""
        ...

    def error(self) -> Exception | None:
        """Why it did not reach its end: a LostError where it could not say so itself."""
        ...

    def stop(self) -> None:
        """Tells it to end: its run is interrupted then."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class LostError(RunFailedError):
    """A job whose process ended without a word: killed, cancelled, out of memory."""


@dataclass(frozen=True)
class Point:
    """A job of a multirun: what Hydra knows of it, its run, and how it ended without a process."""

    overrides: list[str]
    config: DictConfig
    run: Run | None
    error: ConfigError | None

    @property
    def to_do(self) -> bool:
        """Whether it needs a process: its config can be, and it is not done already."""
        if self.run is None:
            return False
        done = self.run.finished and (self.run.path / "report" / "table.md").exists()
        return self.config.overwrite or not done

    def returned(self, error: Exception | None) -> JobReturn:
        """What Hydra is told of it; of a job that was lost its run's status is told, too."""
        if isinstance(error, LostError) and self.run:
            multirun.lost(self.run.path, str(error))
        status = JobStatus.COMPLETED if error is None else JobStatus.FAILED
        result = JobReturn(self.overrides, self.config, status=status)
        result.return_value = error
        return result


def points(
    context: HydraContext, config: DictConfig, job_overrides: Sequence[Sequence[str]]
) -> list[Point]:
    """The jobs that Hydra's sweeper asks for; of two that are one run the first has it."""
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    multirun.keeps(Path(config.hydra.sweep.dir))
    found: list[Point] = []
    for overrides in job_overrides:
        content = context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(content):
            said = list(content.pop("hydra").overrides.task)
        try:
            run, error = Run(multirun.path(said, content)), None
        except ConfigError as wrong:
            run, error = None, wrong
        if run in [point.run for point in found]:
            run = None
        found.append(Point(list(overrides), content, run, error))
    return found


def gather(
    jobs: Sequence[Point], start: Callable[[int, int], Worker], at_once: int, every: float
) -> list[JobReturn]:
    """Starts the jobs, `at_once` at a time, and waits for all of them; looks every `every` seconds.

    `start` is given a job's index and its place, 0 … at_once − 1, which no other job has then. With
    sweep.fail_fast none begins after the first failure. Left by Ctrl-C, SIGTERM or another
    exception, it first ends what runs.
    """
    waiting = deque(i for i, job in enumerate(jobs) if job.to_do)
    returns = {i: job.returned(job.error) for i, job in enumerate(jobs) if not job.to_do}
    live: dict[int, tuple[int, Worker]] = {}
    told, console = None, Console(width=None if sys.stdout.isatty() else 200)
    try:
        with _terminable():
            while waiting or live:
                taken = {place for place, _ in live.values()}
                for place in range(min(at_once, len(jobs))):
                    if waiting and place not in taken:
                        index = waiting.popleft()
                        live[index] = place, start(index, place)
                time.sleep(every)
                ended = len(returns)
                for index, (_, worker) in list(live.items()):
                    if worker.ended():
                        del live[index]
                        error = worker.error()
                        returns[index] = jobs[index].returned(error)
                        if error and jobs[index].config.sweep.fail_fast:
                            waiting.clear()
                            for other, (_, pending) in live.items():
                                if (run := jobs[other].run) and run.status["state"] == "none":
                                    pending.stop()
                if line := multirun.progress():
                    counts, _, _ = line.partition(", about")
                    if counts != told and (len(returns) > ended or every >= SLOW):
                        console.print(f"[bold]multirun:[/] {line}", highlight=False)
                        told = counts
    except BaseException:
        _end([worker for _, worker in live.values()])
        raise
    never = RunFailedError("not begun: sweep.fail_fast ended the multirun before")
    return [returns.get(i) or job.returned(never) for i, job in enumerate(jobs)]


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and a closed terminal end this process as Ctrl-C does: by an exception."""

    def leave(signum: int, _: Any) -> None:
        sys.exit(128 + signum)

    before = {s: signal.signal(s, leave) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.stop()
    until = time.monotonic() + GRACE
    while time.monotonic() < until and not all(worker.ended() for worker in workers):
        time.sleep(0.1)
    for worker in workers:
        if worker.ended():
            worker.error()  # its output goes with it, where its run says the rest
        else:
            worker.kill()
