"""The best cells and the best run of a folder's experiments, by one metric."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lora_lab.report import cells
from lora_lab.report.cells import Cell, RunResult, epoch_of
from lora_lab.report.epochs import At, goal_of, range_text
from lora_lab.report.tables import Rows, format_number
from lora_lab.runs import Run


@dataclass(frozen=True)
class ExperimentBest:
    """The cells of one experiment, ranked by a metric, and its best single run."""

    experiment: str
    metric: str
    goal: str
    cells: list[Cell]
    """By their mean of the metric, the best first."""
    best_result: RunResult
    """The run with the best value of all; it need not be of the best cell."""

    @property
    def title(self) -> str:
        """What the cells are ranked by, and at which epoch."""
        results = [result for cell in self.cells for result in cell.finished]
        where = epoch_of(self.metric, results)
        return f"{self.experiment}: {self.goal} {self.metric} {where}"

    @property
    def best_value(self) -> str:
        """The metric of the best run, its value, and the epoch of that."""
        result = self.best_result
        where = epoch_of(self.metric, [result])
        if result.is_at_best(self.metric):
            where += f", {_best_epochs([result], self.metric)}"
        return f"{self.metric} {result.metrics[self.metric]:.5g} {where}"

    @property
    def varied_keys(self) -> list[str]:
        """The dotted keys that tell its runs apart: the swept ones, and `seed` if it varies."""
        seeds = {result.config["seed"] for cell in self.cells for result in cell.results}
        return [*cells.swept_keys(self.cells), *(["seed"] if len(seeds) > 1 else [])]

    def rows(self, limit: int) -> Rows:
        """A table of the best cells, at most `limit`.

        `best epoch` is the metric's in the cell's runs, of how many: `3–5 of 10`. Only validation
        metrics have one.
        """
        keys = cells.swept_keys(self.cells)
        has_epochs = any(self.metric in r.best for cell in self.cells for r in cell.finished)
        epochs = ["best epoch"] if has_epochs else []
        rows = [[*(keys.values() or ["cell"]), "n", self.metric, "min", "max", *epochs]]
        for cell in self.cells[:limit]:
            s = cell.metrics[self.metric]
            limits = [format_number(s.minimum), format_number(s.maximum)]
            epochs = [_best_epochs(cell.finished, self.metric)] if has_epochs else []
            rows.append([*cell.swept_texts(keys), str(s.n), str(s), *limits, *epochs])
        return rows


def _best_epochs(results: Sequence[RunResult], metric: str) -> str:
    """The best epochs of a metric in these runs, and how many epochs they have: `3–5 of 10`."""
    results = [result for result in results if metric in result.best]
    if not results:
        return "–"
    best = range_text([result.best[metric].epoch for result in results])
    return f"{best} of {range_text([result.epochs for result in results])}"


def best_by_experiment(
    runs: Sequence[Run], metric: str, goal: str | None = None, at: At = "last"
) -> list[ExperimentBest]:
    """The best cells and the best run of each experiment, among its finished runs.

    `goal` is minimize or maximize; None takes it from the metric's name. `at` is the epoch at which
    the runs are compared: the last, or the metric's best of each run. Raises ValueError for a
    metric that no run logged, and where neither `goal` nor the name tells the goal.
    """
    goals = {metric: goal} if goal else {}
    results = [cells.read_run(run, at=at, goals=goals) for run in runs]
    results = [result for result in results if result.is_finished]
    if not results:
        raise ValueError(f"none of {len(runs)} runs is finished")
    check_metric(metric, [result.last for result in results])
    if (goal := goal or goal_of(metric)) is None:
        raise ValueError(f"--goal must be given for {metric}: minimize or maximize")
    sign = 1 if goal == "minimize" else -1
    best = []
    for experiment in dict.fromkeys(result.experiment for result in results):
        members = [result for result in results if result.experiment == experiment]
        if ranked := cells.ranked_cells(cells.cells_of(members), metric, goal):
            measured = [r for cell in ranked for r in cell.finished if metric in r.metrics]
            best_result = min(measured, key=lambda result: sign * result.metrics[metric])
            best.append(ExperimentBest(experiment, metric, goal, ranked, best_result))
    return best


def check_metric(metric: str, logged: Sequence[Collection[str]]) -> None:
    """Raises ValueError, with the nearest name, for a metric that none of the runs logged.

    `logged` has the names of each finished run's metrics.
    """
    known = dict.fromkeys(key for names in logged for key in names)
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        among = ", ".join(list(known)[:6])
        raise ValueError(
            f"--metric {metric}: none of {len(logged)} finished runs has it"
            f"{nearest} (they have {among}{', …' if len(known) > 6 else ''})"
        )
