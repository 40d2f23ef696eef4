"""What a sweep runs next: points that are all known, or those that Optuna asks for."""

import math
from collections.abc import Iterator
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
from lora_lab.sweeps.sweep_file import Goal, Sweep

Space = dict[str, Parameter]

STARTUP_TRIALS = 10
"""Trials that bayes draws at random before it learns from them, and the most it asks at once."""

OPEN, DONE = TrialState.RUNNING, TrialState.COMPLETE


def random_points(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` independent draws of every parameter, each a function of (seed, its number)."""
    study = _create_study(None, "minimize")
    for number in range(count):
        yield _values(space, _draw(study, space, RandomSampler(_seed(seed, number))))


def startup_points(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The first trials of bayes, which no result decides on."""
    study = _create_study(None, "minimize")
    for number in range(min(count, STARTUP_TRIALS)):
        yield _values(space, _draw(study, space, _tpe(seed, number)))


class BayesSearch:
    """Optuna's TPE, its trials kept in a file, so that another process goes on where one stopped.

    A trial is open until its run has finished: an interrupted or failed one is run again by the
    next process, at the same point. What trial n draws is a function of (seed, n) and of the
    trials that were finished or open when it was asked for.
    """

    def __init__(self, sweep: Sweep, trial_count: int, seed: int, file: Path):
        assert sweep.metric is not None
        self.sweep, self.metric = sweep, sweep.metric
        self.trial_count, self.seed = trial_count, seed
        self._study = _create_study(f"sqlite:///{file.absolute()}", sweep.goal)
        for trial in self._trials(OPEN):
            if len(trial.params) < len(sweep.space):  # killed while it was being asked for
                self._study.tell(trial.number, state=TrialState.FAIL)
        known = self._trials(OPEN, DONE)
        self.jobs = multirun.plan_jobs([self._overrides(trial) for trial in known])
        """The job of every trial, in their order."""
        self._job = dict(zip([trial.number for trial in known], self.jobs, strict=True))
        self._asked: set[int] = set()

    def ask(self, at_once: int) -> list[list[str]]:
        """The trials left open by another process, then new ones, until there are `count`."""
        batch = [t.number for t in self._trials(OPEN) if t.number not in self._asked]
        while len(batch) < min(at_once, STARTUP_TRIALS) and len(self._job) < self.trial_count:
            batch.append(self._new())
        self._asked.update(batch)
        multirun.set_jobs(self.jobs, self.trial_count)
        multirun.record_planned(self.jobs)
        jobs = [self._job[number] for number in batch]
        return list({job.path or str(job.overrides): job.overrides for job in jobs}.values())

    def tell(self) -> None:
        """Closes the trials whose runs have finished, with the last value of the metric."""
        for number in self._asked & {trial.number for trial in self._trials(OPEN)}:
            path = self._job[number].path
            if path is not None and (run := Run(path)).finished:
                value = run.last(self.metric)
                if value is not None and math.isfinite(value):
                    self._study.tell(number, value)
                else:
                    self._study.tell(number, state=TrialState.FAIL)

    def best_run(self) -> tuple[Job, float] | None:
        """The best run so far, and its metric."""
        if not self._trials(DONE):
            return None
        best = self._study.best_trial
        assert best.value is not None
        return self._job[best.number], best.value

    def _new(self) -> int:
        trial = _draw(self._study, self.sweep.space, _tpe(self.seed, len(self._job)))
        (job,) = multirun.plan_jobs([self._overrides(trial)])
        self.jobs.append(job)
        self._job[trial.number] = job
        return trial.number

    def _overrides(self, trial: FrozenTrial) -> list[str]:
        return self.sweep.overrides_at(_values(self.sweep.space, trial))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)


def _create_study(storage: str | None, direction: Goal) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name="sweep", direction=direction, load_if_exists=True
    )


def _draw(study: optuna.Study, space: Space, sampler: BaseSampler) -> FrozenTrial:
    study.sampler = sampler
    trial = study.ask({name: parameter.distribution for name, parameter in space.items()})
    return study.get_trials(deepcopy=False)[trial.number]


def _values(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    return {name: parameter.value_of_draw(trial.params[name]) for name, parameter in space.items()}


def _tpe(seed: int, number: int) -> TPESampler:
    return TPESampler(n_startup_trials=STARTUP_TRIALS, seed=_seed(seed, number))


def _seed(seed: int, number: int) -> int:
    # A sampler that is seeded once would begin anew in every process.
    return generator(seed, "trial", number).initial_seed() % 2**32
