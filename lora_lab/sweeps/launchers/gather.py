"""Runs jobs in other processes: starts them, watches them, prints how far they are, ends them.

All launchers use `Pool`. What differs between processes of this machine and a cluster's jobs is in
their workers.
"""

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from lora_lab.config.schema import ConfigError
from lora_lab.console import print_labelled
from lora_lab.exit_codes import SIGTERM
from lora_lab.runs import RunFailedError
from lora_lab.sweeps import multirun
from lora_lab.sweeps.multirun import Job
from lora_lab.sweeps.packs import Pack

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

    def stop(self) -> None:
        """Asks it to end, so that its runs are interrupted and can go on later."""

    def kill(self) -> None:
        """Ends it at once."""


Start = Callable[[Pack, int], Worker]
"""Starts a pack in a place: 0 … at_once − 1, used by no other pack at that time."""

Overrides = Sequence[Sequence[str]]
"""The overrides of several jobs, as Hydra gives them to a launcher."""


class LostError(RunFailedError):
    """A job whose process was killed or cancelled before it could write how its run ended."""


class Pool:
    """Runs packs of jobs in workers, `at_once` of them side by side, and gives how each job ended.

    Jobs in none of the packs are not run: their configs are wrong or they are finished. With
    sweep.fail_fast no job begins after the first failure.
    """

    def __init__(
        self, jobs: list[Job], packs: list[Pack], config: DictConfig, start: Start, at_once: int
    ):
        self.jobs, self.config, self.start = jobs, config, start
        self.waiting = deque(packs)
        self.places = range(min(at_once, len(packs)))
        self.running: dict[int, tuple[Pack, Worker]] = {}  # by place
        # The error of each job; None of those that finished.
        errors = (ConfigError(job.error) if job.error else None for job in jobs)
        self.errors: list[Exception | None] = list(errors)
        for i in chain(*packs):
            self.errors[i] = RunFailedError("not begun: sweep.fail_fast ended the multirun before")
        self.printed = ""

    def run(self, poll_seconds: float) -> list[JobReturn]:
        """Runs all packs, and looks at their workers once in `poll_seconds`.

        If this process is ended by Ctrl-C, SIGTERM or another exception, the workers are ended
        first.
        """
        directory = Path(self.config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        multirun.set_directory(directory)
        try:
            with _exit_on_signals():
                while self.waiting or self.running:
                    self._fill()
                    time.sleep(poll_seconds)
                    if self._collect() or poll_seconds >= SLOW_POLL:
                        self._print_progress()
        except BaseException:
            _end([worker for _, worker in self.running.values()])
            raise
        returns = []
        for job, error in zip(self.jobs, self.errors, strict=True):
            status = JobStatus.FAILED if error else JobStatus.COMPLETED
            returns.append(JobReturn(job.overrides, self.config, status=status))
            returns[-1].return_value = error
        return returns

    def _fill(self) -> None:
        """Starts a waiting pack in each free place."""
        for place in self.places:
            if self.waiting and place not in self.running:
                pack = self.waiting.popleft()
                self.running[place] = pack, self.start(pack, place)

    def _collect(self) -> bool:
        """Records how the packs that have ended did; whether any had."""
        ended = [place for place, (_, worker) in self.running.items() if worker.ended()]
        for place in ended:
            pack, worker = self.running.pop(place)
            error = worker.error()
            for i in pack:
                self.errors[i] = _job_error(self.jobs[i], error, len(pack))
                path = self.jobs[i].path
                if path and isinstance(self.errors[i], LostError):
                    multirun.mark_lost(path, str(error))
            if error and self.config.sweep.fail_fast:
                self._cancel_rest()
        return bool(ended)

    def _cancel_rest(self) -> None:
        """Starts no more packs, and stops those that SLURM has in its queue but has not begun."""
        self.waiting.clear()
        for pack, worker in self.running.values():
            if all(self.jobs[i].state == "none" for i in pack):
                worker.stop()

    def _print_progress(self) -> None:
        """Prints how far the multirun is, if that has changed since it was printed last."""
        line = multirun.progress_line() or ""
        counts, _, _ = line.partition(", about")  # the time left changes with each look
        if counts != self.printed:
            print_labelled("multirun", line)
            self.printed = counts


def _job_error(job: Job, error: Exception | None, pack_size: int) -> Exception | None:
    """The error of one job in a worker that ended with `error`.

    The worker's error is that of its only job. Of several, each run has its status: one may have
    failed where the others finished.
    """
    if pack_size == 1 or error is None or job.state == "finished":
        return None if pack_size > 1 else error
    return RunFailedError(job.cause) if job.state == "failed" else error


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Within it SIGTERM and a closed terminal (SIGHUP) raise SystemExit, as Ctrl-C raises.

    By default they end the process at once, and its jobs would run on. A SIGHUP that nohup has
    ignored stays so.
    """

    def leave(*_: Any) -> None:
        sys.exit(SIGTERM)

    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, leave) for s in heard}
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
