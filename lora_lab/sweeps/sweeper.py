"""The Hydra sweeper that runs the points of a search, with the launcher that the config names.

All multiruns and sweep files go through it. Hydra's basic sweeper would check a job only when it
begins it; here all known points are checked before the first runs. Only bayes has points that are
not known yet: they depend on results.
"""

from typing import Any, ClassVar, Protocol

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

from lora_lab.sweeps import multirun
from lora_lab.sweeps.multirun import Job


class Search(Protocol):
    """Decides which points are run next: a list of jobs, or a search that learns from results."""

    def ask(self, at_once: int) -> list[list[str]]:
        """The overrides of the jobs to run next; an empty list ends the sweep.

        `at_once` is how many jobs the launcher runs side by side. A search that learns from
        results gives no more than these; a list gives all that it has.
        """
        ...

    def tell(self) -> None:
        """Called when the jobs that `ask` gave last have ended."""


class JobList:
    """A search over jobs that are all known. Those with a valid config run as one batch."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        # By path: two points may be one run, as optimizer.lr=0.1 and optimizer.lr=1e-1.
        self._remaining = list({job.path: job.overrides for job in jobs if job.path}.values())

    def ask(self, at_once: int) -> list[list[str]]:
        """All jobs at the first call, none at the second."""
        batch, self._remaining = self._remaining, []
        if batch:
            multirun.record_planned(self.jobs)
        return batch

    def tell(self) -> None:
        """Nothing: results do not decide what is run next."""


class PointSweeper(Sweeper):
    """Launches batch after batch of `search`; a job that fails does not end the sweep.

    `search` is an attribute of the class because Hydra makes the sweeper's instance itself.
    """

    search: ClassVar[Search]

    def setup(self, **settings: Any) -> None:
        """Makes the launcher that the config names; Hydra calls this before `sweep`.

        `settings` are hydra_context, task_function and config, all for the launcher.
        """
        self.launcher = Plugins.instance().instantiate_launcher(**settings)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs all jobs of the search. Then raises the error of the first that failed, if any."""
        assert isinstance(self.launcher, Launcher)
        returns = []
        while batch := self.search.ask(getattr(self.launcher, "jobs_at_once", 1)):
            returns += self.launcher.launch(batch, initial_job_idx=len(returns))
            for overrides, job in zip(batch, returns[-len(batch) :], strict=True):
                if job.status == JobStatus.FAILED:
                    multirun.note_error(overrides, job._return_value)
            self.search.tell()
        # Not the property return_value, which logs an error once more before it raises it.
        for job in returns:
            if job.status != JobStatus.COMPLETED:
                raise job._return_value


def use_search(search: Search) -> None:
    """Makes `hydra/sweeper=points` run this search."""
    PointSweeper.search = search
    # Hydra takes only plugins whose name begins with hydra_plugins.
    name = "hydra_plugins.lora_lab.PointSweeper"
    Plugins.instance().class_name_to_class[name] = PointSweeper
    ConfigStore.instance().store("points", {"_target_": name}, group="hydra/sweeper")
