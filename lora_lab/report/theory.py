"""What a run measured, held against what theory said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lora_lab.report.tables import format_mean_std, format_number
from lora_lab.runs import Run

CHECK_COLUMNS = ["metric", "measured", "theory", "gap", "holds"]
GAP_NOTE = (
    "gap: over theory, or over the loss before adaptation where theory is 0; holds: within 1e-3, "
)
GAP_NOTE += "or within 3 standard errors where theory has one (±)"


@dataclass(frozen=True)
class TheoryCheck:
    """A measured metric held against theory's value, which has a standard error where not 0."""

    metric: str
    measured: float
    theory: float
    standard_error: float
    initial_loss: float
    """The loss before adaptation: what a gap to a theory of 0 is relative to."""

    @property
    def gap(self) -> float:
        """(measured − theory) / theory, or over the loss before adaptation where theory is 0."""
        zero = abs(self.theory) < 1e-9 * self.initial_loss
        return (self.measured - self.theory) / (self.initial_loss if zero else abs(self.theory))

    @property
    def holds(self) -> bool:
        """Within 1e-3 of theory, or within 3 standard errors where it is statistical."""
        within = (
            3 * self.standard_error
            if self.standard_error
            else 1e-3 * abs(self.theory) + 1e-6 * self.initial_loss
        )
        return abs(self.measured - self.theory) <= within


def check_against_theory(run: Run) -> list[TheoryCheck]:
    """The run's last metrics beside what theory said of them."""
    loss = run.curve("val/loss")
    start = loss[min(loss)] if loss else 1.0
    found = []
    for key in dict.fromkeys(k for row in run.rows() for k in row if k.startswith("theory/")):
        metric = key.removeprefix("theory/")
        value, error = run.last(key), run.last(f"theory_error/{metric}")
        if value is not None and (measured := run.last(metric)) is not None:
            found.append(TheoryCheck(metric, measured, value, error or 0.0, start))
    return found


def check_row_over_runs(own: Sequence[TheoryCheck]) -> list[str]:
    """Measured and theory as mean ± deviation, the worst gap, and whether all hold."""
    if len(own) == 1:
        return check_row(own[0])[1:]
    worst = max(own, key=lambda one: (abs(one.gap), not one.holds))
    measured, said = ([one.measured for one in own], [one.theory for one in own])
    error = max(one.standard_error for one in own)
    value = format_mean_std(mean(said), error) if error else format_number(mean(said))
    holds = "yes" if all(one.holds for one in own) else "NO"
    return [format_mean_std(mean(measured), stdev(measured)), value, f"{worst.gap:.1e}", holds]


def check_row(one: TheoryCheck) -> list[str]:
    """A row under HEAD."""
    holds = "yes" if one.holds else "NO"
    return [
        one.metric,
        format_number(one.measured),
        format_mean_std(one.theory, one.standard_error)
        if one.standard_error
        else format_number(one.theory),
        f"{one.gap:.1e}",
        holds,
    ]
