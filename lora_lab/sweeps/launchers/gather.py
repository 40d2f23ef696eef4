"""Jobs in other processes: started, watched, told of in one line, and ended with this one."""

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


def needs_process(job: Job, config: DictConfig) -> bool:
    """Whether a job needs a process: its config can be, and it is not done already."""
    if job.path is None:
        return False
    done = job.state == "finished" and (job.path / "report" / "table.md").exists()
    return config.overwrite or not done


def gather(
    jobs: Sequence[Job],
    packs: Sequence[list[int]],
    config: DictConfig,
    start: Callable[[list[int], int], Worker],
    at_once: int,
    every: float,
) -> list[JobReturn]:
    """Starts `packs` of jobs, `at_once` at a time, and waits for all; looks every `every` seconds.

    `start` is given the jobs' indices and a place, 0 … at_once − 1, which no other has then. With
    sweep.fail_fast none begins after the first failure. Left by Ctrl-C, SIGTERM or another
    exception, it first ends what runs.
    """
    Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    multirun.set_directory(Path(config.hydra.sweep.dir))
    waiting, wanted = deque(packs), {i for pack in packs for i in pack}
    errors: dict[int, Exception | None] = {
        i: ConfigError(job.error) if job.error else None
        for i, job in enumerate(jobs)
        if i not in wanted
    }
    live: dict[int, tuple[list[int], Worker]] = {}  # by place
    told, console = None, Console(width=None if sys.stdout.isatty() else 200)
    try:
        with _terminable():
            while waiting or live:
                for place in range(min(at_once, len(packs))):
                    if waiting and place not in live:
                        pack = waiting.popleft()
                        live[place] = pack, start(pack, place)
                time.sleep(every)
                ended = len(errors)
                for place, (pack, worker) in list(live.items()):
                    if worker.ended():
                        del live[place]
                        error = worker.error()
                        for i in pack:
                            errors[i] = _own(jobs[i], error, len(pack))
                            path = jobs[i].path
                            if path and isinstance(errors[i], LostError):
                                multirun.mark_lost(path, str(error))
                        if error and config.sweep.fail_fast:
                            waiting.clear()
                            for others, pending in live.values():
                                if all(jobs[i].state == "none" for i in others):
                                    pending.stop()
                if line := multirun.progress_line():
                    counts, _, _ = line.partition(", about")
                    if counts != told and (len(errors) > ended or every >= SLOW):
                        console.print(f"[bold]multirun:[/] {line}", highlight=False)
                        told = counts
    except BaseException:
        _end([worker for _, worker in live.values()])
        raise
    never = RunFailedError("not begun: sweep.fail_fast ended the multirun before")
    returns = []
    for i, job in enumerate(jobs):
        error = errors.get(i, never)
        status = JobStatus.FAILED if error else JobStatus.COMPLETED
        returns.append(JobReturn(job.overrides, config, status=status))
        returns[-1].return_value = error
    return returns


def _own(job: Job, error: Exception | None, runs: int) -> Exception | None:
    """What a job's error is, of a process with that many: each run of a pack ends by itself."""
    if runs == 1 or error is None or job.state == "finished":
        return None if runs > 1 else error
    return RunFailedError(job.cause) if job.state == "failed" else error


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
