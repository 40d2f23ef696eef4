"""hydra/launcher=submitit_…: submits each job to SLURM, or to submitit's processes on this machine.

A job that is preempted or out of time is queued again by submitit, or by SLURM itself. It then runs
the same command, which goes on with the same run.
"""

import copy
import shutil
import subprocess
import time
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
from lora_lab.sweeps.launchers.gather import LostError, Overrides, Pool
from lora_lab.sweeps.packs import Pack, pack_task, packs_to_run

MISSING = 30
"""Seconds after which a job that is not in SLURM's queue and has left no result is lost."""


class _Launcher(BaseSubmititLauncher):
    """What the launchers for SLURM and for local processes share."""

    @property
    def jobs_at_once(self) -> int:
        """How many jobs run side by side, at most."""
        return self.params["array_parallelism"]

    def executor(self) -> submitit.AutoExecutor:
        """submitit's executor, with the launcher's parameters. Raises HydraException."""
        params = {key: value for key, value in self.params.items() if value is not None}
        cluster, folder = self._EXECUTOR, params.pop("submitit_folder")
        timeouts = {f"{cluster}_max_num_timeout": params.pop("max_num_timeout")}
        for ours in ("pack", "max_runs"):
            params.pop(ours, None)
        assert self.config is not None
        trainer = self.config.trainer
        if cluster == "local":
            del params["array_parallelism"]  # submitit has no such limit here: Pool keeps it
        elif "gpus_per_node" not in params and trainer.accelerator in ("gpu", "cuda"):
            params["gpus_per_node"] = trainer.devices
        # submitit wants the cluster's name before settings that only this cluster has: slurm_qos.
        common = OmegaConf.structured(BaseQueueConf)
        params = {key if key in common else f"{cluster}_{key}": v for key, v in params.items()}
        try:
            executor = submitit.AutoExecutor(folder, cluster=cluster, **timeouts)
            executor.update_parameters(**params)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            text = " ".join(str(error).split())
            raise HydraException(f"hydra/launcher=submitit_{cluster}: {text}") from None
        return executor

    def launch(self, job_overrides: Overrides, initial_job_idx: int) -> list[JobReturn]:
        """Runs the jobs in other processes and waits for all. Gives how each ended, in their order.

        A job that fails does not raise here: the sweeper reads its error from its JobReturn.
        `initial_job_idx` is the number of the first of these jobs in the multirun.
        """
        config, hydra_state = self.config, Singleton.get_state()
        assert config is not None
        executor = self.executor()
        jobs = [multirun.find_job(overrides) for overrides in job_overrides]

        def submit(pack: Pack) -> submitit.Job[JobReturn]:
            # Called by submitit in the job's process. The launcher itself is what is called, for
            # its method `checkpoint`, by which submitit queues a preempted job again.
            callee, number = copy.copy(self), initial_job_idx + pack[0]
            callee.task_function = pack_task(self, jobs, pack, elsewhere=True)
            overrides = jobs[pack[0]].overrides
            return executor.submit(callee, overrides, "hydra.sweep.dir", number, "", hydra_state)

        packs = packs_to_run(jobs, config, processes=1)
        submitted: dict[int, submitit.Job[JobReturn]] = {}  # SLURM's, by the first job of the pack
        at_once, poll_seconds, queue = self.jobs_at_once, 0.2, SlurmQueue()
        if self._EXECUTOR == "slurm":
            # All packs are submitted at once, as one array: SLURM decides when each begins.
            at_once, poll_seconds = len(packs), 1.0
            with executor.batch(allow_implicit_submissions=True):
                submitted = {pack[0]: submit(pack) for pack in packs}

        def start(pack: Pack, _: int) -> SubmittedJob:
            return SlurmJob(submitted[pack[0]], queue) if submitted else SubmittedJob(submit(pack))

        returns = Pool(jobs, packs, config, start, at_once).run(poll_seconds)
        folder = Path(self.params["submitit_folder"])
        if not [*folder.glob("*_log.out")]:  # no job was lost: these are left by lost ones alone
            shutil.rmtree(folder, ignore_errors=True)
        return returns


class LocalLauncher(_Launcher):
    """Runs `array_parallelism` jobs at once in submitit's processes on this machine."""

    _EXECUTOR = "local"


class SlurmLauncher(_Launcher):
    """Submits the jobs to SLURM as an array, and waits for them."""

    _EXECUTOR = "slurm"


class SubmittedJob:
    """A job in one of submitit's processes on this machine, as a worker of a Pool."""

    kind = "the process"
    """What messages call it, before its number."""

    def __init__(self, job: submitit.Job[JobReturn]):
        self.job = job

    def ended(self) -> bool:
        """Whether it has ended for good."""
        return self.job.done()

    def error(self) -> Exception | None:
        """Why it failed, from the result that submitit pickles; None where it finished.

        A job without a result is lost.
        """
        paths, name = self.job.paths, f"{self.kind} {self.job.job_id}"
        if not paths.result_pickle.exists():
            return LostError(f"{name} was killed or cancelled; its output is in {paths.stdout}")
        try:
            result = self.job.result()
        except UncompletedJobError as error:
            last_line = str(error).strip().splitlines()[-1]
            return LostError(f"{name}: {last_line}: {paths.stdout}")
        # It ended by itself: its run's status says how, and submitit's files can go.
        for file in paths.folder.glob(f"{self.job.job_id}_*"):
            file.unlink()
        return None if result.status == JobStatus.COMPLETED else result._return_value

    def stop(self) -> None:
        """Asks it to end."""
        self.job.cancel(check=False)

    def kill(self) -> None:
        """Nothing: submitit's controller kills a process that does not end."""


class SlurmJob(SubmittedJob):
    """A job of SLURM's, as a worker of a Pool."""

    kind = "SLURM's job"

    def __init__(self, job: submitit.Job[JobReturn], queue: "SlurmQueue"):
        super().__init__(job)
        self.queue = queue

    def ended(self) -> bool:
        """Whether it has left a result, or has been missing from SLURM's queue for a while."""
        return self.job.paths.result_pickle.exists() or self.queue.misses(self.job.job_id)


class SlurmQueue:
    """SLURM's queue, asked for all jobs at once and at most once in 3 seconds.

    submitit would ask sacct, which some clusters lack.
    """

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.last_seen: dict[str, float] = {}
        """The time at which each job was in the queue last."""

    def misses(self, job: str) -> bool:
        """Whether the job has not been in the queue for MISSING seconds."""
        now = time.monotonic()
        if now - self.asked_at > 3:
            self.asked_at = now
            self.last_seen |= dict.fromkeys(self._queued(), now)
        return now - self.last_seen.setdefault(job, now) > MISSING

    def _queued(self) -> list[str]:
        """The jobs in the queue. Where SLURM does not answer, all that have been in it."""
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except subprocess.SubprocessError:
            return list(self.last_seen)
        return answer.stdout.split()
