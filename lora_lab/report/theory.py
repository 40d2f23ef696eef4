"""A run's final metrics compared with what theory predicts for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lora_lab.report.tables import format_mean_std, format_number
from lora_lab.runs import Run

CHECK_COLUMNS = ["metric", "measured", "theory", "gap", "holds"]
"""The column titles above the rows of `check_row`."""
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


def check_row(check: TheoryCheck) -> list[str]:
    """One check as a row under CHECK_COLUMNS."""
    theory = format_mean_std(check.theory, check.standard_error or None)
    return [check.metric, format_number(check.measured), theory, *_gap_and_verdict(check, [check])]


def check_row_over_runs(checks: Sequence[TheoryCheck]) -> list[str]:
    """The checks of one metric in a cell's runs as one row under CHECK_COLUMNS, without the metric.

    Measured is mean ± deviation, the gap is the worst one, and it holds where all checks do.
    """
    if len(checks) == 1:
        return check_row(checks[0])[1:]
    worst = max(checks, key=lambda check: (abs(check.gap), not check.holds))
    measured = [check.measured for check in checks]
    error = max(check.standard_error for check in checks)
    theory = format_mean_std(mean(check.theory for check in checks), error or None)
    deviation = format_mean_std(mean(measured), stdev(measured))
    return [deviation, theory, *_gap_and_verdict(worst, checks)]


def _gap_and_verdict(worst: TheoryCheck, checks: Sequence[TheoryCheck]) -> list[str]:
    return [f"{worst.gap:.1e}", "yes" if all(check.holds for check in checks) else "NO"]
