"""hydra/launcher=joblib: one machine's cores or GPUs, shared out to jobs in processes of their own.

joblib's own pool dies as a whole when one of its processes is killed, and uses a process again for
the next job, when its GPU is chosen and its memory is used. Here every job is a fresh process,
forked from a server that has imported everything and computed nothing.
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
from hydra.errors import HydraException
from hydra_plugins.hydra_joblib_launcher._core import execute_job
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from joblib import cpu_count

from lora_lab.config.schema import ConfigError
from lora_lab.runs import RunFailedError
from lora_lab.sweeps import multirun
from lora_lab.sweeps.launchers.gather import LostError, gather, needs_process
from lora_lab.sweeps.packs import group_into_packs, pack_task
from lora_lab.training import bases


class ProcessLauncher(JoblibLauncher):
    """Runs `n_jobs` jobs at once on this machine. Each has its share of the GPUs and cores."""

    @property
    def gpus(self) -> list[str]:
        """The GPUs that its jobs share."""
        assert self.config is not None
        return [] if self.config.trainer.accelerator == "cpu" else visible_gpus()

    @property
    def processes(self) -> int:
        """How many jobs, or packs of them, run side by side."""
        assert self.config is not None
        return resolve_n_jobs(self.joblib["n_jobs"], len(self.gpus), self.config.trainer.devices)

    @property
    def jobs_at_once(self) -> int:
        """How many jobs a search is asked for: as many as run side by side, in packs too."""
        own = self.joblib
        return self.processes * ((own.get("max_runs") or 8) if own.get("pack") else 1)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Runs the jobs to their ends, and gives how each ended."""
        context, config = self.hydra_context, self.config
        assert context is not None
        assert config is not None
        jobs = [multirun.find_job(overrides) for overrides in job_overrides]
        wanted = [i for i, job in enumerate(jobs) if needs_process(job, config)]
        gpus, n, packs = self.gpus, self.processes, [[i] for i in wanted]
        if self.joblib["pack"] and wanted:
            packs = group_into_packs(jobs, wanted, n, self.joblib["max_runs"])
            n = min(n, len(packs))
        told = os.environ.get("OMP_NUM_THREADS")
        # Where runs wait for a base, the one that trains it has their cores.
        trained = {bases.key(plan.cfg) for i in wanted if (plan := jobs[i].plan)}
        threads = [
            int(told or max(1, cpu_count() // min(n, at_work)))
            for at_work in (n, len(trained) or 1)
        ]
        server = multiprocessing.get_context("forkserver")
        logs = Path(config.hydra.sweep.dir).absolute()
        state = Singleton.get_state()

        def start(pack: list[int], place: int) -> Process:
            job = (initial_job_idx + pack[0], list(job_overrides[pack[0]]))
            sent = cloudpickle.dumps((*job, context, config, pack_task(self, jobs, pack), state))
            log = logs / f"{initial_job_idx + pack[0]}.log"
            given = (gpus_of_job(gpus, place, n), threads, log, sent)
            process = server.Process(target=_job, args=given)
            process.start()
            return Process(process, log)

        return gather(jobs, packs, config, start, n, every=0.2)


def resolve_n_jobs(n_jobs: int | None, gpus: int, devices: object) -> int:
    """How many jobs run at once: as asked for; else one for each `devices` GPUs, or for each core.

    Raises HydraException where it is not a number of jobs.
    """
    if n_jobs is None:
        return max(1, (gpus or cpu_count()) // (devices if isinstance(devices, int) else 1))
    if not isinstance(n_jobs, int) or n_jobs == 0 or n_jobs < -1:
        raise HydraException(f"hydra.launcher.n_jobs={n_jobs}: must be 1 or more, or -1: all cores")
    return cpu_count() if n_jobs == -1 else n_jobs


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    if told := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return told.split(",")
    return list(map(str, range(torch.cuda.device_count())))


def gpus_of_job(gpus: list[str], place: int, n: int) -> list[str]:
    """The GPUs of the job at `place` of `n`: as many for each; one, where there are fewer."""
    each = max(1, len(gpus) // n)
    groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
    return groups[place % len(groups)] if groups else []


class Process:
    """One job's process, and the file that has its output where it does not end well."""

    def __init__(self, process: BaseProcess, log: Path):
        self.process = process
        self.log = log

    def ended(self) -> bool:
        """Whether it runs no more."""
        return not self.process.is_alive()

    def error(self) -> Exception | None:
        """How it ended, by its exit code."""
        code = self.process.exitcode or 0
        if code in (0, 1, 2, 130, 143):  # its run's status says the rest
            said = self.log.read_text().strip() if self.log.exists() else ""
            self.log.unlink(missing_ok=True)
            return ConfigError(said) if code == 2 else RunFailedError(said) if code else None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return LostError(f"its process ended by {name}{hint}; its output is in {self.log}")

    def stop(self) -> None:
        """Ctrl-C, for this process alone."""
        if (pid := self.process.pid) and self.process.is_alive():
            os.kill(pid, signal.SIGINT)

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()


def _job(gpus: list[str], threads: list[int], log: Path, sent: bytes) -> None:
    """What a job's process does. Exits with 0: finished, 1: failed, 2: config error.

    `threads`: of the run, and of its base where it trains one.
    """
    os.setpgrp()  # the terminal's Ctrl-C is for the launcher, which tells its jobs
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    os.environ["OMP_NUM_THREADS"] = str(threads[0])
    torch.set_num_threads(threads[0])
    bases.base_threads = threads[1]
    threading.Thread(target=_follow, daemon=True).start()
    result = execute_job(*cloudpickle.loads(sent))
    if result.status != JobStatus.COMPLETED:
        sys.exit(2 if isinstance(result._return_value, ConfigError) else 1)


def _follow() -> None:
    """Ends this process soon after the launcher's, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(30)
    os.kill(os.getpid(), signal.SIGKILL)
