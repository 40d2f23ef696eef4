"""The best cells and the best run of a folder, by one metric."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lab.report import cells as of
from lora_lab.report.cells import Cell, Result
from lora_lab.report.tables import Rows, number
from lora_lab.runs import Run

GOALS = ("minimize", "maximize")


@dataclass(frozen=True)
class Best:
    """What is best of one experiment: its cells, the best first, and the one best run."""

    experiment: str
    metric: str
    goal: str
    cells: list[Cell]
    run: Result

    @property
    def keys(self) -> list[str]:
        """The dotted keys of what was swept, seed with them where there are several."""
        seeds = {result.config["seed"] for cell in self.cells for result in cell.results}
        return [*of.swept(self.cells), *(["seed"] if len(seeds) > 1 else [])]

    def rows(self, shown: int) -> Rows:
        """The first cells as a table."""
        keys = of.swept(self.cells)
        rows = [[*(keys.values() or ["cell"]), "n", self.metric, "min", "max"]]
        for cell in self.cells[:shown]:
            s = cell.metrics[self.metric]
            point = [of.said(of.setting(cell, key)) for key in keys] or [cell.name]
            rows.append([*point, str(s.n), str(s), number(s.low), number(s.high)])
        return rows


def best(runs: Sequence[Run], metric: str, goal: str | None = None) -> list[Best]:
    """The best of each experiment's finished runs.

    Raises ValueError for a metric that none of them logged, and where `goal` is not given and the
    metric's name does not tell it.
    """
    results = [result for run in runs if (result := of.read(run)).done]
    known = dict.fromkeys(key for result in results for key in result.finals)
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        among = ", ".join(list(known)[:6]) or "none is finished"
        raise ValueError(
            f"--metric {metric}: none of {len(results)} finished runs has it"
            f"{nearest} (they have {among}{', …' if len(known) > 6 else ''})"
        )
    if (goal := goal or of.goal(metric)) is None:
        raise ValueError(f"--goal must be said for {metric}: {' or '.join(GOALS)}")
    found = []
    for experiment in dict.fromkeys(result.experiment for result in results):
        own = [result for result in results if result.experiment == experiment]
        if ranked := of.best(of.cells_of(own), metric, goal):
            sign = 1 if goal == "minimize" else -1
            has = [r for cell in ranked for r in cell.done if metric in r.finals]
            run = min(has, key=lambda result: sign * result.finals[metric])
            found.append(Best(experiment, metric, goal, ranked, run))
    return found
