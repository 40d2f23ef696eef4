"""The best cells and the best run of a folder, by one metric."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report import cells as of
from lora_lab.report.cells import Cell, RunResult
from lora_lab.report.tables import Rows, format_number
from lora_lab.runs import Run

GOALS = ("minimize", "maximize")


@dataclass(frozen=True)
class ExperimentBest:
    """What is best of one experiment: its cells, the best first, and the one best run."""

    experiment: str
    metric: str
    goal: str
    cells: list[Cell]
    best_result: RunResult

    @property
    def varied_keys(self) -> list[str]:
        """The dotted keys of what was swept, seed with them where there are several."""
        seeds = {result.config["seed"] for cell in self.cells for result in cell.results}
        return [*of.swept_keys(self.cells), *(["seed"] if len(seeds) > 1 else [])]

    def rows(self, shown: int) -> Rows:
        """The first cells as a table."""
        keys = of.swept_keys(self.cells)
        rows = [[*(keys.values() or ["cell"]), "n", self.metric, "min", "max"]]
        for cell in self.cells[:shown]:
            s = cell.metrics[self.metric]
            point = [of.short_text(cell.value_of(key)) for key in keys] or [cell.name]
            rows.append(
                [*point, str(s.n), str(s), format_number(s.minimum), format_number(s.maximum)]
            )
        return rows


def best_by_experiment(
    runs: Sequence[Run], metric: str, goal: str | None = None
) -> list[ExperimentBest]:
    """The best of each experiment's finished runs.

    Raises ValueError for a metric that none of them logged, and where `goal` is not given and the
    metric's name does not tell it.
    """
    results = [result for run in runs if (result := of.read_run(run)).is_finished]
    known = dict.fromkeys(key for result in results for key in result.metrics)
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        among = ", ".join(list(known)[:6]) or "none is finished"
        raise ValueError(
            f"--metric {metric}: none of {len(results)} finished runs has it"
            f"{nearest} (they have {among}{', …' if len(known) > 6 else ''})"
        )
    if (goal := goal or of.goal_of(metric)) is None:
        raise ValueError(f"--goal must be said for {metric}: {' or '.join(GOALS)}")
    found = []
    for experiment in dict.fromkeys(result.experiment for result in results):
        own = [result for result in results if result.experiment == experiment]
        if ranked := of.ranked_cells(of.cells_of(own), metric, goal):
            sign = 1 if goal == "minimize" else -1
            has = [r for cell in ranked for r in cell.finished if metric in r.metrics]
            run = min(has, key=lambda result: sign * result.metrics[metric])
            found.append(ExperimentBest(experiment, metric, goal, ranked, run))
    return found
