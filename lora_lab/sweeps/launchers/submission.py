"""hydra/launcher=submitit_…: every job submitted to SLURM, or to submitit's own processes here.

A job that is preempted or out of time is queued again by submitit, or by SLURM itself, and then
does what it did: the same run, which goes on.
"""

import copy
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import submitit
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from omegaconf import OmegaConf
from submitit.core.utils import UncompletedJobError

from lora_lab.sweeps import multirun
from lora_lab.sweeps.launchers.gather import LostError, Worker, gather, needs_process
from lora_lab.sweeps.packs import group_into_packs, pack_task

MISSING = 30
"""Seconds for which SLURM's queue does not have a job, and no result is there: it was lost."""


Submit = Callable[[list[int]], submitit.Job[JobReturn]]


class _Launcher(BaseSubmititLauncher):
    """What SLURM's launcher and the local one share."""

    @property
    def jobs_at_once(self) -> int:
        """How many jobs run side by side, at most."""
        return self.params["array_parallelism"]

    def executor(self) -> submitit.AutoExecutor:
        """submitit's executor with the launcher's parameters. Raises HydraException."""
        params = {key: value for key, value in self.params.items() if value is not None}
        folder, timeouts = params.pop("submitit_folder"), params.pop("max_num_timeout")
        for ours in ("pack", "max_runs"):
            params.pop(ours, None)
        cluster, plain = self._EXECUTOR, OmegaConf.structured(BaseQueueConf)
        assert self.config is not None
        trainer = self.config.trainer
        if cluster == "local":  # which knows no limit of its own
            del params["array_parallelism"]
        elif "gpus_per_node" not in params and trainer.accelerator in ("gpu", "cuda"):
            params["gpus_per_node"] = trainer.devices
        try:
            executor = submitit.AutoExecutor(
                folder, cluster=cluster, **{f"{cluster}_max_num_timeout": timeouts}
            )
            executor.update_parameters(
                **{key if key in plain else f"{cluster}_{key}": v for key, v in params.items()}
            )
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            text = " ".join(str(error).split())
            raise HydraException(f"hydra/launcher=submitit_{cluster}: {text}") from None
        return executor

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Runs the jobs to their ends, and gives how each ended."""
        config, state = self.config, Singleton.get_state()
        assert config is not None
        executor = self.executor()
        jobs = [multirun.find_job(overrides) for overrides in job_overrides]

        def submit(pack: list[int]) -> submitit.Job[JobReturn]:
            one, which = copy.copy(self), initial_job_idx + pack[0]
            one.task_function = pack_task(self, jobs, pack, elsewhere=True)
            overrides = jobs[pack[0]].overrides
            return executor.submit(one, overrides, "hydra.sweep.dir", which, "", state)

        wanted = [index for index, job in enumerate(jobs) if needs_process(job, config)]
        packs = [[i] for i in wanted]
        if self.params["pack"] and wanted:
            packs = group_into_packs(jobs, wanted, 1, self.params["max_runs"])
        returns = gather(jobs, packs, config, *self.workers(executor, submit, packs))
        folder = Path(self.params["submitit_folder"])
        if not [*folder.glob("*_log.out")]:  # no job was lost
            shutil.rmtree(folder, ignore_errors=True)
        return returns

    def workers(
        self, executor: submitit.AutoExecutor, submit: Submit, packs: list[list[int]]
    ) -> tuple[Callable[[list[int], int], Worker], int, float]:
        """How a job is started, how many at once, and the seconds between two looks."""
        return lambda pack, _: Submitted(submit(pack)), self.jobs_at_once, 0.2


class LocalLauncher(_Launcher):
    """Runs `array_parallelism` jobs at once in submitit's processes on this machine."""

    _EXECUTOR = "local"


class SlurmLauncher(_Launcher):
    """Submits the jobs to SLURM as an array, and waits for them."""

    _EXECUTOR = "slurm"

    def workers(
        self, executor: submitit.AutoExecutor, submit: Submit, packs: list[list[int]]
    ) -> tuple[Callable[[list[int], int], Worker], int, float]:
        """All are submitted now: SLURM has its own mind when each begins."""
        with executor.batch(allow_implicit_submissions=True):
            submitted = {pack[0]: submit(pack) for pack in packs}
        queue = Queue()
        return lambda pack, _: Queued(submitted[pack[0]], queue), len(packs) or 1, 1.0


class Submitted:
    """A job in a process of submitit's on this machine."""

    def __init__(self, job: submitit.Job[JobReturn]):
        self.job = job

    def ended(self) -> bool:
        """Whether it runs no more, and will not again."""
        return self.job.done()

    def error(self) -> Exception | None:
        """Why it did not reach its end, from the result that submitit keeps, or its absence."""
        paths = self.job.paths
        if not paths.result_pickle.exists():
            return LostError(
                f"{self.what} was killed or cancelled; its output is in {paths.stdout}"
            )
        try:
            result = self.job.result()
        except UncompletedJobError as error:
            last = str(error).strip().splitlines()[-1]
            return LostError(f"{self.what}: {last}: {paths.stdout}")
        for file in paths.folder.glob(f"{self.job.job_id}_*"):  # its run's status says the rest
            file.unlink()
        return None if result.status == JobStatus.COMPLETED else result._return_value

    @property
    def what(self) -> str:
        """The job's name for people."""
        return f"the process {self.job.job_id}"

    def stop(self) -> None:
        """Tells it to end."""
        self.job.cancel(check=False)

    def kill(self) -> None:
        """Nothing more: submitit's controller kills what does not end."""


class Queued(Submitted):
    """A job of SLURM's."""

    def __init__(self, job: submitit.Job[JobReturn], queue: "Queue"):
        super().__init__(job)
        self.queue = queue

    def ended(self) -> bool:
        """Whether there is a result, or SLURM has not known of the job for a while."""
        return self.job.paths.result_pickle.exists() or self.queue.misses(self.job.job_id)

    @property
    def what(self) -> str:
        """The job's name for people."""
        return f"SLURM's job {self.job.job_id}"


class Queue:
    """SLURM's queue, asked as a whole every few seconds: sacct is not on every cluster."""

    def __init__(self) -> None:
        self.asked = 0.0
        self.seen: dict[str, float] = {}

    def misses(self, job: str) -> bool:
        """Whether the job has not been in the queue for MISSING seconds."""
        now = time.monotonic()
        if now - self.asked > 3:
            command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
            try:
                there = subprocess.run(command, capture_output=True, text=True, timeout=30)
                known = there.stdout.split() if there.returncode == 0 else list(self.seen)
            except subprocess.TimeoutExpired:  # a busy controller: nothing is known
                known = list(self.seen)
            self.asked = now
            self.seen |= dict.fromkeys(known, now)
        return now - self.seen.setdefault(job, now) > MISSING
