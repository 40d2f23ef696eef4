"""What a sweep runs next: points that are all known, or those that Optuna asks for."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from lora_lab.runs import Run
from lora_lab.seeding import generator
from lora_lab.sweeps import multirun
from lora_lab.sweeps.multirun import Job
from lora_lab.sweeps.search_space import Parameter
from lora_lab.sweeps.sweep_file import Goal

Space = dict[str, Parameter]
Point = Callable[[dict[str, Any]], list[str]]

STARTUP = 10
"""Trials that bayes draws at random before it learns from them, and the most it asks at once."""

OPEN, DONE = TrialState.RUNNING, TrialState.COMPLETE


def at_random(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` independent draws of every parameter, each a function of (seed, its number)."""
    study = _study(None, "minimize")
    for number in range(count):
        yield _values(space, _draw(study, space, RandomSampler(_seed(seed, number))))


def startup(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The first trials of bayes, which no result decides on."""
    study = _study(None, "minimize")
    for number in range(min(count, STARTUP)):
        yield _values(space, _draw(study, space, _tpe(seed, number)))


class Bayes:
    """Optuna's TPE, its trials kept in a file, so that another process goes on where one stopped.

    A trial is open until its run has finished: an interrupted or failed one is run again by the
    next process, at the same point. What trial n draws is a function of (seed, n) and of the
    trials that were finished or open when it was asked for.
    """

    def __init__(
        self,
        space: Space,
        point: Point,
        metric: str,
        direction: Goal,
        count: int,
        seed: int,
        file: Path,
    ):
        self.space, self.point, self.metric = space, point, metric
        self.count, self.seed = count, seed
        self.study = _study(f"sqlite:///{file.absolute()}", direction)
        for trial in self._trials(OPEN):
            if len(trial.params) < len(space):  # killed while it was being asked for
                self.study.tell(trial.number, state=TrialState.FAIL)
        known = self._trials(OPEN, DONE)
        self.jobs = multirun.jobs([point(_values(space, trial)) for trial in known])
        """The job of every trial, in their order."""
        self._job = dict(zip([trial.number for trial in known], self.jobs, strict=True))
        self._asked: set[int] = set()

    def ask(self, at_once: int) -> list[list[str]]:
        """The trials left open by another process, then new ones, until there are `count`."""
        batch = [t.number for t in self._trials(OPEN) if t.number not in self._asked]
        while len(batch) < min(at_once, STARTUP) and len(self._job) < self.count:
            batch.append(self._new())
        self._asked.update(batch)
        multirun.begin(self.jobs, self.count)
        multirun.keep(self.jobs)
        jobs = [self._job[number] for number in batch]
        return list({job.path or str(job.overrides): job.overrides for job in jobs}.values())

    def tell(self) -> None:
        """Closes the trials whose runs have finished, with the last value of the metric."""
        for number in self._asked & {trial.number for trial in self._trials(OPEN)}:
            path = self._job[number].path
            if path is not None and (run := Run(path)).finished:
                value = run.last(self.metric)
                if value is not None and math.isfinite(value):
                    self.study.tell(number, value)
                else:
                    self.study.tell(number, state=TrialState.FAIL)

    def best(self) -> tuple[Job, float] | None:
        """The best run so far, and its metric."""
        if not self._trials(DONE):
            return None
        best = self.study.best_trial
        assert best.value is not None
        return self._job[best.number], best.value

    def _new(self) -> int:
        trial = _draw(self.study, self.space, _tpe(self.seed, len(self._job)))
        (job,) = multirun.jobs([self.point(_values(self.space, trial))])
        self.jobs.append(job)
        self._job[trial.number] = job
        return trial.number

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)


def _study(storage: str | None, direction: Goal) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name="sweep", direction=direction, load_if_exists=True
    )


def _draw(study: optuna.Study, space: Space, sampler: BaseSampler) -> FrozenTrial:
    study.sampler = sampler
    trial = study.ask({name: parameter.draws for name, parameter in space.items()})
    return study.get_trials(deepcopy=False)[trial.number]


def _values(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    return {name: parameter.value(trial.params[name]) for name, parameter in space.items()}


def _tpe(seed: int, number: int) -> TPESampler:
    return TPESampler(n_startup_trials=STARTUP, seed=_seed(seed, number))


def _seed(seed: int, number: int) -> int:
    # A sampler that is seeded once would begin anew in every process.
    return generator(seed, "trial", number).initial_seed() % 2**32
