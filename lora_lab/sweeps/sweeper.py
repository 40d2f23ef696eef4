"""The Hydra sweeper that runs the points a search gives it, by the launcher that is configured."""

from typing import Any, ClassVar, Protocol

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lora_lab.sweeps import multirun
from lora_lab.sweeps.multirun import Job


class Search(Protocol):
    """What a sweeper asks: which points are next, none at the end; told when they have been run."""

    def ask(self, at_once: int) -> list[list[str]]:
        """The overrides of the next jobs, as many as can run at once or all that are known."""
        ...

    def tell(self) -> None:
        """What was asked last has been run."""
        ...


class JobList:
    """Jobs that are all known: those that can be run as one batch."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self._left = list({job.path: job.overrides for job in jobs if job.path}.values())

    def ask(self, at_once: int) -> list[list[str]]:
        """All of them, once."""
        multirun.record_planned(self.jobs)
        batch, self._left = self._left, []
        return batch

    def tell(self) -> None:
        """Nothing: no result decides on what is next."""


class PointSweeper(Sweeper):
    """Launches what its search asks for, batch by batch, whatever becomes of each job."""

    search: ClassVar[Search]

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Makes the launcher that the config names."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs all that is asked for. Raises what the first job that failed raised."""
        assert isinstance(self.launcher, Launcher)
        returns = []
        while batch := self.search.ask(getattr(self.launcher, "jobs_at_once", 1)):
            returns += self.launcher.launch(batch, initial_job_idx=len(returns))
            self.search.tell()
        # Not by its return_value, which says an error once more before it raises it.
        for job in returns:
            if job.status != JobStatus.COMPLETED:
                raise job._return_value


def use_search(search: Search) -> None:
    """Makes `hydra/sweeper=points` run this search."""
    PointSweeper.search = search
    # Hydra wants a plugin named as one of hydra_plugins.
    name = "hydra_plugins.lora_lab.PointSweeper"
    Plugins.instance().class_name_to_class[name] = PointSweeper
    ConfigStore.instance().store("points", {"_target_": name}, group="hydra/sweeper")
