"""A run on several devices: a process for each, started and watched by one that trains nothing."""

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lora_lab.runs import CHECKPOINTS, Run, RunBusyError, RunFinishedError, process_rank
from lora_lab.training import experiment
from lora_lab.training.plan import Plan

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""

OTHERS: dict[type[Exception], int] = {RunFinishedError: 3, RunBusyError: 4}
"""Exit codes of a process that found the run to be another command's."""


def is_worker() -> bool:
    """Whether this process is one of a run's: started by `launch`, or by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(plan: Plan, overrides: Sequence[str]) -> None:
    """Runs what was planned in a fresh process for each device, and waits for them.

    When one dies, the others are ended, and the run fails: RuntimeError says which, and how.
    Raises RunFinishedError and RunBusyError as `experiment.run` does.
    """
    run, count = Run(plan.path), plan.processes
    run.path.mkdir(parents=True, exist_ok=True)
    with _held(run):
        state = run.status["state"]
        if state == "finished" and not plan.cfg.overwrite:
            raise RunFinishedError(str(run.path))
        if state not in ("running", "interrupted") or plan.cfg.overwrite:
            # Before any of them can look.
            shutil.rmtree(run.path / CHECKPOINTS, ignore_errors=True)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # told below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "lora_lab.train", *overrides)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            codes = {which: failure.exitcode for which, failure in error.failures.items()}
            for other in OTHERS:
                if OTHERS[other] in codes.values():
                    raise other(str(run.path)) from None
            # One that was killed is why others failed; those still there were ended by SIGTERM.
            which = min(codes, key=lambda w: (codes[w] == -signal.SIGTERM, codes[w] > 0, w))
            raise RuntimeError(_told(run, which, count, codes[which])) from None


def _told(run: Run, which: int, count: int, exitcode: int) -> str:
    """Why the run failed, kept in its status."""
    if which == 0 and run.status["state"] == "failed":
        return run.status["error"]
    how = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    error, log = f"process {which} of {count} ended by {how}", _log(run.path, which)
    if log.exists():
        error = f"process {which} of {count}: {log.read_text().strip().splitlines()[-1]}"
    with suppress(RunBusyError), _held(run):
        run.update_status(state="failed", error=error)
        with (run.path / "log.txt").open("a") as file:
            file.write(log.read_text() if log.exists() else f"{error}\n")
    return error


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """Within it no process runs the run. Raises RunBusyError."""
    try:
        with FileLock(run.path / "lock").acquire(timeout=1):
            yield
    except Timeout:
        raise RunBusyError(f"{run.path} is being run by another process") from None


def run_worker(plan: Plan, console: Console) -> None:
    """What each of the processes does. Ends it with 1 where it fails, at once with its parent."""
    if sys.platform == "linux":
        # By the kernel: all at once, so that none takes the others' end for a failure, and also one
        # that waits for them inside a collective operation, where it hears no gentler signal.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if process_rank():
        logging.getLogger("lora_lab").setLevel(logging.ERROR)  # the first says it
    try:
        experiment.run(plan, Console(quiet=True) if process_rank() else console)
    except tuple(OTHERS) as error:
        sys.exit(OTHERS[type(error)])
    except Exception:
        if process_rank():
            _log(plan.path, process_rank()).write_text(traceback.format_exc())
        sys.exit(1)


def _log(run: Path, which: int) -> Path:
    return run / f"process{which}.txt"
