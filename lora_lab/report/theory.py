"""A run's final metrics compared with what theory predicts for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lora_lab.report.tables import format_mean_std
from lora_lab.runs import Run

CHECK_COLUMNS = ["metric", "measured", "theory", "gap", "holds"]
"""The column titles of a table of theory: the metric, then what `check_row` gives."""
GAP_NOTE = (
    "gap: over theory, or over the loss before adaptation where theory is 0; holds: within 1e-3, "
    "or within 3 standard errors where theory has one (±)"
)
"""The note below a table of theory."""


@dataclass(frozen=True)
class TheoryCheck:
    """A metric's measured value beside the one that a closed form predicts."""

    metric: str
    measured: float
    theory: float
    standard_error: float
    """Of theory's value, where its formula is a mean over random draws; else 0."""
    initial_loss: float
    """The loss before adaptation: a gap to a theory of 0 is relative to it."""

    @property
    def gap(self) -> float:
        """(measured − theory) / |theory|, or over the loss before adaptation where theory is 0."""
        is_zero = abs(self.theory) < 1e-9 * self.initial_loss
        return (self.measured - self.theory) / (self.initial_loss if is_zero else abs(self.theory))

    @property
    def holds(self) -> bool:
        """Whether measured lies within 3 standard errors of theory, or within 1e-3 without one."""
        exact_tolerance = 1e-3 * abs(self.theory) + 1e-6 * self.initial_loss
        tolerance = 3 * self.standard_error if self.standard_error else exact_tolerance
        return abs(self.measured - self.theory) <= tolerance


def check_against_theory(run: Run) -> list[TheoryCheck]:
    """A check of each metric for which the run logged a `theory/<metric>`."""
    loss = run.curve("val/loss")
    initial_loss = loss[min(loss)] if loss else 1.0
    checks = []
    for key in dict.fromkeys(k for row in run.rows() for k in row if k.startswith("theory/")):
        metric = key.removeprefix("theory/")
        theory, error = run.last(key), run.last(f"theory_error/{metric}")
        if theory is not None and (measured := run.last(metric)) is not None:
            checks.append(TheoryCheck(metric, measured, theory, error or 0.0, initial_loss))
    return checks


def check_row(checks: Sequence[TheoryCheck]) -> list[str]:
    """The checks of one metric, one for each run, as one row under CHECK_COLUMNS.

    The row lacks the metric's name. Over several runs, measured is mean ± deviation, theory the
    mean, the gap the worst one, and it holds where all checks do.
    """
    measured = [check.measured for check in checks]
    several = len(measured) > 1 and all(map(math.isfinite, measured))
    deviation = stdev(measured) if several else None
    theory = mean(check.theory for check in checks)
    error = max(check.standard_error for check in checks)
    worst = max(checks, key=lambda check: (abs(check.gap), not check.holds))
    means = [format_mean_std(mean(measured), deviation), format_mean_std(theory, error or None)]
    return [*means, f"{worst.gap:.1e}", "yes" if all(check.holds for check in checks) else "NO"]
