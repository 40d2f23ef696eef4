"""Whether a run's own end moves by more than it differs from its reproduction."""

from collections.abc import Sequence

from lora_lab.cli.comparison import Comparison
from lora_lab.runs import Run

MEASUREMENTS = 5
"""How many of a run's last validations tell how far its end moves."""


def movement_line(run: Run, compared: Sequence[Comparison]) -> str | None:
    """A line where a metric's last measurements move by more than the two runs differ, else None.

    The last measurements of a `val/` metric are its last five in the stored run's second half, by
    steps. They move by the largest less the smallest, of the value that is stored: 1.0, 1.1, 0.9
    move by 22 %. A metric is named where the runs differ in it, and by less than that: who trains
    the run for an epoch more or less gets a larger difference. Of several, the one that the runs
    differ most in is named. None too where the run has a single measurement or one is not finite.
    """
    lines: dict[float, str] = {}
    for c in compared:
        values = last_measurements(run, c.name) if c.name.startswith("val/") else []
        movement = max(values, default=0) - min(values, default=0)
        if c.stored and 0 < c.absolute < movement < float("inf"):
            move, gap = (_percent(x / c.stored) for x in (movement, c.absolute))
            lines[c.relative] = (
                f"the run's own last {len(values)} measurements of {c.name} move by {move}, more "
                f"than the {gap} between the two runs: its end is not settled to {gap}"
            )
    return lines[max(lines)] if lines else None


def _percent(share: float) -> str:
    """A share in percent, to two digits."""
    return f"{float(f'{100 * abs(share):.2g}'):g} %"


def last_measurements(run: Run, metric: str) -> list[float]:
    """The last five values of a metric, of those from the second half of the training."""
    # By step: the row of the best validation is logged again at the end (`select`).
    by_step = {row["step"]: row[metric] for row in run.rows() if metric in row}
    return [by_step[step] for step in sorted(by_step) if 2 * step >= max(by_step)][-MEASUREMENTS:]
