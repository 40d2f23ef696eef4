"""Searches: points drawn at random, and Optuna's TPE, which learns from the runs' results."""

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
from lora_lab.sweeps.search_space import Space
from lora_lab.sweeps.sweep_file import Goal, Sweep

STARTUP_TRIALS = 10
"""Trials of bayes that are drawn at random before it learns from results.

Also the most that it asks for at once: more would be drawn without a result in between.
"""

OPEN, DONE = TrialState.RUNNING, TrialState.COMPLETE


def random_points(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` independent points. Point n is a function of (seed, n) alone."""
    study = _create_study(None, "minimize")
    for number in range(count):
        yield _values(space, _draw(study, space, RandomSampler(_seed(seed, number))))


def startup_points(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The first points of bayes, at most `count`: those that do not depend on results."""
    study = _create_study(None, "minimize")
    for number in range(min(count, STARTUP_TRIALS)):
        yield _values(space, _draw(study, space, _tpe_sampler(seed, number)))


class BayesSearch:
    """Bayesian search by Optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

    Its trials are kept in an SQLite file, so that the next process goes on where this one was
    stopped. A trial is open until its run has finished: the run of an interrupted or failed one is
    run again by the next process, at the same point. The point of trial n is a function of
    (seed, n) and of the trials that were finished or open when it was asked for.

    `trial_count` is how many trials it ends with, those of earlier processes included.
    """

    def __init__(self, sweep: Sweep, trial_count: int, seed: int, file: Path):
        assert sweep.metric is not None
        self.sweep, self.metric = sweep, sweep.metric
        self.trial_count, self.seed = trial_count, seed
        self._study = _create_study(f"sqlite:///{file.absolute()}", sweep.goal)
        for trial in self._trials(OPEN):
            # Optuna writes a trial's parameters one by one. The process was killed between two.
            if len(trial.params) < len(sweep.space):
                self._study.tell(trial.number, state=TrialState.FAIL)
        trials = self._trials(OPEN, DONE)
        self.jobs = multirun.plan_jobs([self._overrides(trial) for trial in trials])
        """The jobs of all trials, in their order."""
        self._job_by_trial = dict(zip([trial.number for trial in trials], self.jobs, strict=True))
        self._asked: set[int] = set()  # trials that this process has run or is running

    def ask(self, at_once: int) -> list[list[str]]:
        """The overrides of trials that another process left open, then of new ones.

        At most `at_once` new trials, and none after the last of `trial_count`.
        """
        batch = [t.number for t in self._trials(OPEN) if t.number not in self._asked]
        while len(batch) < min(at_once, STARTUP_TRIALS) and len(self.jobs) < self.trial_count:
            batch.append(self._new_trial())
        self._asked.update(batch)
        multirun.set_jobs(self.jobs, self.trial_count)
        multirun.record_planned(self.jobs)
        jobs = [self._job_by_trial[number] for number in batch]
        # By path: two trials may draw the same point, whose run is run once.
        return list({job.path or str(job.overrides): job.overrides for job in jobs}.values())

    def tell(self) -> None:
        """Closes the trials whose runs have finished, with the last value of the metric.

        Where that is no finite number, the trial fails: TPE does not learn from it.
        """
        for number in self._asked & {trial.number for trial in self._trials(OPEN)}:
            path = self._job_by_trial[number].path
            if path is not None and (run := Run(path)).finished:
                value = run.last(self.metric)
                if value is not None and math.isfinite(value):
                    self._study.tell(number, value)
                else:
                    self._study.tell(number, state=TrialState.FAIL)

    def best_run(self) -> tuple[multirun.Job, float] | None:
        """The best job so far and its metric; None before the first has finished."""
        if not self._trials(DONE):
            return None
        best = self._study.best_trial
        assert best.value is not None
        return self._job_by_trial[best.number], best.value

    def _new_trial(self) -> int:
        """Draws a trial, plans its job, and gives its number in the study."""
        sampler = _tpe_sampler(self.seed, len(self._job_by_trial))
        trial = _draw(self._study, self.sweep.space, sampler)
        (job,) = multirun.plan_jobs([self._overrides(trial)])
        self.jobs.append(job)
        self._job_by_trial[trial.number] = job
        return trial.number

    def _overrides(self, trial: FrozenTrial) -> list[str]:
        return self.sweep.overrides_at(_values(self.sweep.space, trial))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)


def _create_study(storage: str | None, direction: Goal) -> optuna.Study:
    """A study in memory, or the one stored at `storage`, created where it does not exist."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name="sweep", direction=direction, load_if_exists=True
    )


def _draw(study: optuna.Study, space: Space, sampler: BaseSampler) -> FrozenTrial:
    """The study's next trial, all parameters of the space drawn by the sampler."""
    study.sampler = sampler
    trial = study.ask({name: parameter.distribution for name, parameter in space.items()})
    return study.get_trials(deepcopy=False)[trial.number]


def _values(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    """The parameters' values at a trial, from what was drawn for each."""
    return {name: parameter.value_of_draw(trial.params[name]) for name, parameter in space.items()}


def _tpe_sampler(seed: int, number: int) -> TPESampler:
    return TPESampler(n_startup_trials=STARTUP_TRIALS, seed=_seed(seed, number))


def _seed(seed: int, number: int) -> int:
    """The seed of one trial's sampler.

    Each trial has a new sampler: one that is seeded once would draw the first trials' numbers again
    in the next process.
    """
    return generator(seed, "trial", number).initial_seed() % 2**32
