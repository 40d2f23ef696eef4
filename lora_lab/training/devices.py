"""One run on several devices: one process trains on each, and a launcher watches them."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lora_lab.runs import Run, RunBusyError, RunFinishedError, process_rank
from lora_lab.training import experiment
from lora_lab.training.plan import Plan
from lora_lab.training.run_record import can_continue, lock, status_in_full, wait_until_free
from lora_lab.training.written_files import remove_bases, remove_checkpoints

PR_SET_PDEATHSIG = 1
"""Linux prctl option: the signal a process gets when its parent ends (linux/prctl.h)."""

EXIT_CODES: dict[type[Exception], int] = {RunFinishedError: 3, RunBusyError: 4}
"""Exit codes by which a process says that another command has finished or is running the run."""


def is_worker() -> bool:
    """Whether this process trains on one of several devices: started by `launch` or by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def train(plan: Plan, command: Sequence[str], console: Console) -> None:
    """Trains a planned run here, or with a process for each of its devices.

    Where another command trains it, waits for that one, and goes on with what it has not finished.
    `command`: arguments of Python by which each of several processes begins. Raises
    RunFinishedError where the run is finished, by now or before, and as `experiment.run` and
    `launch` do.
    """
    try:
        if plan.processes > 1:
            launch(plan, command)
        else:
            experiment.run(plan, console)
    except RunBusyError as busy:
        console.print(f"waiting: {busy}", soft_wrap=True)
        wait_until_free(Run(plan.path))
        train(plan, command, console)


def launch(plan: Plan, command: Sequence[str]) -> None:
    """Trains a planned run in a new process for each device, and waits for them.

    `command`: arguments of Python by which each process begins, to come to `run_worker`. If one
    dies, the others are ended and the run fails: RuntimeError says which process, and how it ended.
    Raises RunFinishedError and RunBusyError as `experiment.run` does.
    """
    run, count = Run(plan.path), plan.processes
    run.path.mkdir(parents=True, exist_ok=True)
    with lock(run):
        status = status_in_full(run)
        if status["state"] == "finished" and not plan.cfg.overwrite:
            raise RunFinishedError(str(run.path))
        if not can_continue(status) or plan.cfg.overwrite:
            # Removed before the processes start: each of them looks for a checkpoint and the base.
            remove_checkpoints(run.path)
            remove_bases(run.path)
    # What torch would log of a failed process is raised below as one RuntimeError.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
            elastic_launch(config, sys.executable)(*command)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            codes = {process: failure.exitcode for process, failure in error.failures.items()}
            for exception, code in EXIT_CODES.items():
                if code in codes.values():
                    raise exception(str(run.path)) from None
            # The process that failed first is named. A negative code is a signal. A process that
            # was killed makes the others fail (code > 0), and the launcher then ends the remaining
            # ones by SIGTERM. So: first a killed one, then a failed one, last an ended one.
            first = min(codes, key=lambda p: (codes[p] == -signal.SIGTERM, codes[p] > 0, p))
            raise RuntimeError(_record_failure(run, first, count, codes[first])) from None


def _record_failure(run: Run, process: int, count: int, exitcode: int) -> str:
    """Writes why the run failed to its status and log, and gives it in one line."""
    if process == 0 and run.status["state"] == "failed":
        return run.status["error"]
    how = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    error, log = f"process {process} of {count} ended by {how}", _log(run.path, process)
    if log.exists():
        error = f"process {process} of {count}: {log.read_text().strip().splitlines()[-1]}"
    with suppress(RunBusyError), lock(run):
        run.update_status(state="failed", error=error)
        with (run.path / "log.txt").open("a") as file:
            file.write(log.read_text() if log.exists() else f"{error}\n")
    return error


def run_worker(plan: Plan, console: Console) -> None:
    """What each process does: trains its part of the run.

    If it fails, the process ends with code 1; it also ends as soon as its parent does.
    """
    if sys.platform == "linux":
        # The kernel kills the processes when their parent ends. It kills all at once: none lives on
        # to report the end of another as a failure. It also ends a process that waits for the
        # others inside a collective operation, where Python handles no gentler signal.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if process_rank():
        logging.getLogger("lora_lab").setLevel(logging.ERROR)  # process 0 logs the same
    try:
        experiment.run(plan, Console(quiet=True) if process_rank() else console)
    except tuple(EXIT_CODES) as error:
        sys.exit(EXIT_CODES[type(error)])
    except Exception:
        if process_rank():
            _log(plan.path, process_rank()).write_text(traceback.format_exc())
        sys.exit(1)


def _log(run_directory: Path, process: int) -> Path:
    """The file with the traceback of a process other than 0, whose log is the run's log.txt."""
    return run_directory / f"process{process}.txt"
