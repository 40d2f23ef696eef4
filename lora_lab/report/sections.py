"""What the report of a folder of runs holds, before it is written as files or as a page."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_lab.report.cells import Cell, RunResult
from lora_lab.report.tables import Rows


@dataclass(frozen=True)
class ExperimentReport:
    """The part of a report on one experiment, the runs whose config has the same `name`."""

    name: str
    directory: Path
    """Where its tables and figures are written."""
    cells: list[Cell]
    tables: dict[str, Rows]
    """Title → table, without those that have no rows."""
    notes: dict[str, str]
    """Title of a table → the note below it."""
    captions: dict[str, str]
    """File name of each figure that was drawn, without its suffix → caption."""


@dataclass(frozen=True)
class SweepReport:
    """The report of a folder of runs: a part for each experiment, and what is not finished."""

    directory: Path
    """The folder of the runs."""
    report: Path
    """Where the report is written."""
    results: list[RunResult]
    experiments: list[ExperimentReport]
    unfinished: Rows
    """The rows of `summary.unfinished_table`: runs not finished, and those that are missing."""

    @property
    def counts(self) -> dict[str, int]:
        """State → number of runs, finished first; `missing` counts runs that have no directory."""
        states = Counter(r.state for r in self.results if r.is_finished)
        states.update(row[2] for row in self.unfinished[1:])
        return dict(states)

    @property
    def counts_text(self) -> str:
        """The counts in one line: `20 finished, 1 failed`."""
        return ", ".join(f"{n} {state}" for state, n in self.counts.items())
