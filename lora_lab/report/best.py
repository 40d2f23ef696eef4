"""The best cells and the best run of a folder's experiments, by one metric."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report import cells
from lora_lab.report.cells import Cell, RunResult
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
    def varied_keys(self) -> list[str]:
        """The dotted keys that tell its runs apart: the swept ones, and `seed` if it varies."""
        seeds = {result.config["seed"] for cell in self.cells for result in cell.results}
        return [*cells.swept_keys(self.cells), *(["seed"] if len(seeds) > 1 else [])]

    def rows(self, limit: int) -> Rows:
        """A table of the best cells, at most `limit`."""
        keys = cells.swept_keys(self.cells)
        rows = [[*(keys.values() or ["cell"]), "n", self.metric, "min", "max"]]
        for cell in self.cells[:limit]:
            s = cell.metrics[self.metric]
            limits = [format_number(s.minimum), format_number(s.maximum)]
            rows.append([*cell.swept_texts(keys), str(s.n), str(s), *limits])
        return rows


def best_by_experiment(
    runs: Sequence[Run], metric: str, goal: str | None = None
) -> list[ExperimentBest]:
    """The best cells and the best run of each experiment, among its finished runs.

    `goal` is minimize or maximize; None takes it from the metric's name. Raises ValueError for a
    metric that no run logged, and where neither `goal` nor the name tells the goal.
    """
    results = [result for run in runs if (result := cells.read_run(run)).is_finished]
    if not results:
        raise ValueError(f"none of {len(runs)} runs is finished")
    _check_metric(metric, results)
    if (goal := goal or cells.goal_of(metric)) is None:
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


def _check_metric(metric: str, results: Sequence[RunResult]) -> None:
    """Raises ValueError, with the nearest name, for a metric that none of the runs logged."""
    known = dict.fromkeys(key for result in results for key in result.metrics)
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        among = ", ".join(list(known)[:6])
        raise ValueError(
            f"--metric {metric}: none of {len(results)} finished runs has it"
            f"{nearest} (they have {among}{', …' if len(known) > 6 else ''})"
        )
