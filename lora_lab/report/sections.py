"""What the report of a folder of runs holds, before it is written as files or as a page."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_lab.report.cells import Cell, RunResult
from lora_lab.report.tables import Rows


@dataclass(frozen=True)
class ExperimentReport:
    """One experiment of a sweep: its tables, by name, and its figures' captions, by file."""

    name: str
    directory: Path
    cells: list[Cell]
    tables: dict[str, Rows]
    notes: dict[str, str]
    """A word under a table, by its name."""
    figures: dict[str, str]


@dataclass(frozen=True)
class SweepReport:
    """What a report says of a folder of runs."""

    directory: Path
    results: list[RunResult]
    sections: list[ExperimentReport]
    not_finished: Rows
    """Under the head experiment, run, status, cause; with the missing ones, which have no run."""

    @property
    def counts(self) -> dict[str, int]:
        """Runs by state, finished first."""
        states = Counter(r.state for r in self.results if r.is_finished)
        states.update(row[2] for row in self.not_finished[1:])
        return dict(states)

    @property
    def summary(self) -> str:
        """The counts in a line."""
        return ", ".join(f"{n} {state}" for state, n in self.counts.items())
