"""What a run measured, held against what theory said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lora_lab.report.tables import deviating, number
from lora_lab.runs import Run

HEAD = ["metric", "measured", "theory", "gap", "holds"]
GAP = "gap: over theory, or over the loss before adaptation where theory is 0; holds: within 1e-3, "
GAP += "or within 3 standard errors where theory has one (±)"


@dataclass(frozen=True)
class Held:
    """A measured metric held against theory's value, which has a standard error where not 0."""

    metric: str
    measured: float
    theory: float
    error: float
    start: float
    """The loss before adaptation: what a gap to a theory of 0 is relative to."""

    @property
    def gap(self) -> float:
        """(measured − theory) / theory, or over the loss before adaptation where theory is 0."""
        zero = abs(self.theory) < 1e-9 * self.start
        return (self.measured - self.theory) / (self.start if zero else abs(self.theory))

    @property
    def passes(self) -> bool:
        """Within 1e-3 of theory, or within 3 standard errors where it is statistical."""
        within = 3 * self.error if self.error else 1e-3 * abs(self.theory) + 1e-6 * self.start
        return abs(self.measured - self.theory) <= within


def held(run: Run) -> list[Held]:
    """The run's last metrics beside what theory said of them."""
    loss = run.curve("val/loss")
    start = loss[min(loss)] if loss else 1.0
    found = []
    for key in dict.fromkeys(k for row in run.rows() for k in row if k.startswith("theory/")):
        metric = key.removeprefix("theory/")
        value, error = run.last(key), run.last(f"theory_error/{metric}")
        if value is not None and (measured := run.last(metric)) is not None:
            found.append(Held(metric, measured, value, error or 0.0, start))
    return found


def over_runs(own: Sequence[Held]) -> list[str]:
    """Measured and theory as mean ± deviation, the worst gap, and whether all hold."""
    if len(own) == 1:
        return line(own[0])[1:]
    worst = max(own, key=lambda one: (abs(one.gap), not one.passes))
    measured, said = ([one.measured for one in own], [one.theory for one in own])
    error = max(one.error for one in own)
    value = deviating(mean(said), error) if error else number(mean(said))
    holds = "yes" if all(one.passes for one in own) else "NO"
    return [deviating(mean(measured), stdev(measured)), value, f"{worst.gap:.1e}", holds]


def line(one: Held) -> list[str]:
    """A row under HEAD."""
    holds = "yes" if one.passes else "NO"
    return [
        one.metric,
        number(one.measured),
        deviating(one.theory, one.error) if one.error else number(one.theory),
        f"{one.gap:.1e}",
        holds,
    ]
