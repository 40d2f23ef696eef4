"""Runs jobs in other processes: starts them, watches them, prints how far they are, ends them.

Both launchers use `gather`. What differs between processes of this machine and a cluster's jobs is
in their workers.
"""

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console

from lora_lab.config.schema import ConfigError
from lora_lab.runs import RunFailedError
from lora_lab.sweeps import multirun
from lora_lab.sweeps.multirun import Job

SLOW_POLL = 1.0
"""Where workers are polled no more often than this, in seconds, each change is printed.

Such jobs wait in a cluster's queue, so that it is news when one begins. Otherwise a line is printed
when a job ends.
"""

GRACE = 30
"""Seconds that a job has to end by itself once it is stopped, before it is killed."""


class Worker(Protocol):
    """A pack of jobs that was started: a process, or a place in a cluster's queue."""

    def ended(self) -> bool:
        """Whether it has ended for good: a job that SLURM queues again has not."""
        ...

    def error(self) -> Exception | None:
        """Why it failed; None where it finished. Asked once, after it has ended.

        A LostError where the process was killed, so that its run's status does not say so.
        """
        ...

    def stop(self) -> None:
        """Asks it to end, so that its runs are interrupted and can go on later."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


Start = Callable[[list[int], int], Worker]
"""Starts a pack, given as indices of jobs, in a place: 0 … at_once − 1, used by no other then."""


class LostError(RunFailedError):
    """A job whose process was killed or cancelled before it could write how its run ended."""


def needs_process(job: Job, config: DictConfig) -> bool:
    """Whether a job is to be run: its config is valid, and it is not finished and reported."""
    if job.path is None:
        return False
    done = job.state == "finished" and (job.path / "report" / "table.md").exists()
    return config.overwrite or not done


def gather(
    jobs: Sequence[Job],
    packs: Sequence[list[int]],
    config: DictConfig,
    start: Start,
    at_once: int,
    poll_seconds: float,
) -> list[JobReturn]:
    """Runs `packs`, lists of indices of `jobs`, in workers; gives how each of `jobs` ended.

    `at_once` packs run side by side. Jobs in no pack are not run: their configs are wrong or they
    are finished. With sweep.fail_fast no job begins after the first failure. If this process is
    ended by Ctrl-C, SIGTERM or another exception, the workers are ended first.
    """
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    multirun.set_directory(Path(config.hydra.sweep.dir))
    pool = _Pool(jobs, packs, config.sweep.fail_fast, start, at_once)
    printed: str | None = None
    try:
        with _exit_on_signals():
            while pool.waiting or pool.running:
                pool.fill()
                time.sleep(poll_seconds)
                has_news = pool.collect()
                if has_news or poll_seconds >= SLOW_POLL:
                    printed = _print_progress(printed)
    except BaseException:
        _end([worker for _, worker in pool.running.values()])
        raise
    return _returns(jobs, pool.errors, config)


class _Pool:
    """The packs that wait, those that run, and how the jobs of the others ended."""

    def __init__(
        self,
        jobs: Sequence[Job],
        packs: Sequence[list[int]],
        fail_fast: bool,
        start: Start,
        at_once: int,
    ):
        self.jobs, self.fail_fast, self.start = jobs, fail_fast, start
        self.waiting = deque(packs)
        self.places = range(min(at_once, len(packs)))
        self.running: dict[int, tuple[list[int], Worker]] = {}  # by place
        packed = {i for pack in packs for i in pack}
        self.errors: dict[int, Exception | None] = {  # by job, None of those that finished
            i: ConfigError(job.error) if job.error else None
            for i, job in enumerate(jobs)
            if i not in packed
        }

    def fill(self) -> None:
        """Starts a waiting pack in each free place."""
        for place in self.places:
            if self.waiting and place not in self.running:
                pack = self.waiting.popleft()
                self.running[place] = pack, self.start(pack, place)

    def collect(self) -> bool:
        """Records how the packs that have ended did; whether any had."""
        before = len(self.errors)
        for place, (pack, worker) in list(self.running.items()):
            if worker.ended():
                del self.running[place]
                error = worker.error()
                self._record(pack, error)
                if error and self.fail_fast:
                    self._cancel_rest()
        return len(self.errors) > before

    def _record(self, pack: list[int], error: Exception | None) -> None:
        for i in pack:
            self.errors[i] = _job_error(self.jobs[i], error, len(pack))
            path = self.jobs[i].path
            if path and isinstance(self.errors[i], LostError):
                multirun.mark_lost(path, str(error))

    def _cancel_rest(self) -> None:
        """Starts no more packs, and stops those that SLURM has in its queue but has not begun."""
        self.waiting.clear()
        for pack, worker in self.running.values():
            if all(self.jobs[i].state == "none" for i in pack):
                worker.stop()


def _job_error(job: Job, error: Exception | None, pack_size: int) -> Exception | None:
    """The error of one job in a worker that ended with `error`.

    The worker's error is that of its only job. Of several, each run has its status: one may have
    failed where the others finished.
    """
    if pack_size == 1 or error is None or job.state == "finished":
        return None if pack_size > 1 else error
    return RunFailedError(job.cause) if job.state == "failed" else error


def _print_progress(printed: str | None) -> str | None:
    """Prints the multirun's progress if its counts are not those `printed` last; gives them."""
    line = multirun.progress_line()
    if line is None:
        return printed
    counts, _, _ = line.partition(", about")  # the time left changes with each look
    if counts != printed:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(f"[bold]multirun:[/] {line}", highlight=False)
    return counts


def _returns(
    jobs: Sequence[Job], errors: dict[int, Exception | None], config: DictConfig
) -> list[JobReturn]:
    """How each job ended, as Hydra has it. A job without an entry in `errors` was not begun."""
    not_begun = RunFailedError("not begun: sweep.fail_fast ended the multirun before")
    returns = []
    for i, job in enumerate(jobs):
        error = errors.get(i, not_begun)
        status = JobStatus.FAILED if error else JobStatus.COMPLETED
        returns.append(JobReturn(job.overrides, config, status=status))
        returns[-1].return_value = error
    return returns


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Within it SIGTERM and a closed terminal (SIGHUP) raise SystemExit, as Ctrl-C raises.

    By default they end the process at once, and its jobs would run on.
    """

    def leave(signum: int, _: Any) -> None:
        sys.exit(128 + signum)

    before = {s: signal.signal(s, leave) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(workers: Sequence[Worker]) -> None:
    """Stops the workers, and kills those that have not ended after GRACE seconds."""
    for worker in workers:
        worker.stop()
    until = time.monotonic() + GRACE
    while time.monotonic() < until and not all(worker.ended() for worker in workers):
        time.sleep(0.1)
    for worker in workers:
        if worker.ended():
            worker.error()  # called because it removes the output of one that ended as it should
        else:
            worker.kill()
