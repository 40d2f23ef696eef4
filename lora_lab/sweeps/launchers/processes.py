"""hydra/launcher=joblib: shares one machine's cores or GPUs among jobs, each in a fresh process.

joblib's pool dies with all its jobs when one of its processes is killed, and it uses a process
again for the next job, when its GPU is chosen and its memory is taken. Here each job is forked from
a server that has imported everything and computed nothing (see fork_server.py).
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import cloudpickle
import torch
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_joblib_launcher._core import execute_job
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from joblib import cpu_count

from lora_lab.config.schema import ConfigError
from lora_lab.exit_codes import CONFIG_ERROR, CTRL_C, FAILED, FINISHED, SIGTERM
from lora_lab.runs import RunFailedError
from lora_lab.sweeps import multirun
from lora_lab.sweeps.launchers.gather import LostError, Overrides, Pool
from lora_lab.sweeps.multirun import Job
from lora_lab.sweeps.packs import Pack, pack_task, packs_to_run
from lora_lab.training import bases


class ProcessLauncher(JoblibLauncher):
    """Runs `n_jobs` jobs, or packs of them, at once on this machine.

    Each has its share of the GPUs and of the cores.
    """

    @property
    def gpus(self) -> list[str]:
        """The GPUs that its jobs share."""
        assert self.config is not None
        return [] if self.config.trainer.accelerator == "cpu" else visible_gpus()

    @property
    def process_count(self) -> int:
        """How many jobs, or packs of them, run side by side."""
        assert self.config is not None
        return resolve_n_jobs(self.joblib["n_jobs"], len(self.gpus), self.config.trainer.devices)

    @property
    def jobs_at_once(self) -> int:
        """How many jobs a search is asked for at once: enough for packs of `max_runs`, or of 8."""
        settings = self.joblib
        runs_per_pack = (settings.get("max_runs") or 8) if settings.get("pack") else 1
        return self.process_count * runs_per_pack

    def launch(self, job_overrides: Overrides, initial_job_idx: int) -> list[JobReturn]:
        """Runs the jobs in other processes and waits for all. Gives how each ended, in their order.

        A job that fails does not raise here: the sweeper reads its error from its JobReturn.
        `initial_job_idx` is the number of the first of these jobs in the multirun.
        """
        config, context, hydra_state = self.config, self.hydra_context, Singleton.get_state()
        assert config is not None
        jobs = [multirun.find_job(overrides) for overrides in job_overrides]
        gpus, at_once = self.gpus, self.process_count
        packs = packs_to_run(jobs, config, at_once)
        if self.joblib["pack"] and packs:
            at_once = min(at_once, len(packs))
        threads = _threads([jobs[i] for pack in packs for i in pack], at_once)
        server = multiprocessing.get_context("forkserver")
        logs = Path(config.hydra.sweep.dir).absolute()

        def start(pack: Pack, place: int) -> JobProcess:
            number, overrides = initial_job_idx + pack[0], jobs[pack[0]].overrides
            task = pack_task(self, jobs, pack)
            # cloudpickle, because a plan holds functions that pickle does not know by a name.
            call = cloudpickle.dumps((number, overrides, context, config, task, hydra_state))
            log = logs / f"{number}.log"
            arguments = (gpus_of_job(gpus, place, at_once), threads, log, call)
            process = server.Process(target=_run_in_process, args=arguments)
            process.start()
            return JobProcess(process, log)

        return Pool(jobs, packs, config, start, at_once).run(poll_seconds=0.2)


def _threads(jobs: Sequence[Job], at_once: int) -> tuple[int, int]:
    """Threads of a run, and of the training of a base.

    With 8 cores and 4 jobs at once a run has 2 threads. If all 4 need the same base, the first
    trains it with 8, as the others only wait for it. OMP_NUM_THREADS, where set, holds for both.
    """
    if wanted := os.environ.get("OMP_NUM_THREADS"):
        return int(wanted), int(wanted)
    base_count = len({bases.key(job.plan.cfg) for job in jobs if job.plan}) or 1
    run_threads = max(1, cpu_count() // at_once)
    return run_threads, max(1, cpu_count() // min(at_once, base_count))


def resolve_n_jobs(n_jobs: int | None, gpu_count: int, devices: object) -> int:
    """How many jobs run at once: `n_jobs`, or all cores where it is -1.

    Where it is None: one for each `devices` GPUs (those of one run), and without GPUs one for each
    `devices` cores.
    """
    if n_jobs is None:
        per_job = devices if isinstance(devices, int) else 1  # "auto"
        return max(1, (gpu_count or cpu_count()) // per_job)
    return cpu_count() if n_jobs == -1 else n_jobs


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else list(map(str, range(torch.cuda.device_count())))


def gpus_of_job(gpus: list[str], place: int, job_count: int) -> list[str]:
    """The GPUs of the job in `place` (0, 1, …) of `job_count`.

    With GPUs 0, 1, 2, 3 and two jobs: [0, 1] and [2, 3]. With GPUs 5, 7 and four jobs, where two
    jobs share each GPU: [5], [7], [5], [7].
    """
    gpus_per_job = max(1, len(gpus) // job_count)
    starts = range(0, len(gpus) - gpus_per_job + 1, gpus_per_job)
    groups = [gpus[start : start + gpus_per_job] for start in starts]
    return groups[place % len(groups)] if groups else []


class JobProcess:
    """A job's process, as a worker of a Pool. `log` has its output, kept if it was killed."""

    def __init__(self, process: BaseProcess, log: Path):
        self.process, self.log = process, log

    def ended(self) -> bool:
        """Whether it runs no more."""
        return not self.process.is_alive()

    def error(self) -> Exception | None:
        """Why it failed, from its exit code; None where it finished."""
        code = self.process.exitcode or 0
        if code in (FINISHED, FAILED, CONFIG_ERROR, CTRL_C, SIGTERM):
            # It ended by itself: its run's status says how, and its output is not needed.
            output = self.log.read_text().strip() if self.log.exists() else ""
            self.log.unlink(missing_ok=True)
            kind = ConfigError if code == CONFIG_ERROR else RunFailedError
            return kind(output) if code != FINISHED else None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return LostError(f"its process ended by {name}{hint}; its output is in {self.log}")

    def stop(self) -> None:
        """Sends it what Ctrl-C sends."""
        if (pid := self.process.pid) and self.process.is_alive():
            os.kill(pid, signal.SIGINT)

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()


def _run_in_process(gpus: list[str], threads: tuple[int, int], log: Path, call: bytes) -> None:
    """Runs one job, in a process forked for it. Exits with a code of exit_codes.py.

    `threads` are those of the run and of its base's training. `call` holds the pickled arguments of
    hydra_joblib_launcher's execute_job.
    """
    # A new process group: the terminal sends Ctrl-C to the launcher's group alone, and the launcher
    # sends it on to its jobs. Otherwise they would get it twice.
    os.setpgrp()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the fork server blocks
    log.parent.mkdir(parents=True, exist_ok=True)  # empty, it may have been tidied away
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpus:
        # In time, as the server has not looked for GPUs: CUDA reads this when it is first used.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    run_threads, bases.base_threads = threads
    # OpenMP read the variable when torch was imported in the server, so torch is set as well. The
    # variable is for the processes that a run with several devices starts.
    os.environ["OMP_NUM_THREADS"] = str(run_threads)
    torch.set_num_threads(run_threads)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    result = execute_job(*cloudpickle.loads(call))
    if result.status != JobStatus.COMPLETED:
        sys.exit(CONFIG_ERROR if isinstance(result._return_value, ConfigError) else FAILED)


def _end_with_launcher() -> None:
    """Ends this process soon after the launcher has ended, even if that was killed.

    The system's parent of this process is the fork server. multiprocessing's parent_process is the
    launcher: its sentinel is a pipe that is closed when the launcher ends, whatever ended it.
    """
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGINT)  # the run writes that it was interrupted
    threading.Event().wait(30)
    os.kill(os.getpid(), signal.SIGKILL)
