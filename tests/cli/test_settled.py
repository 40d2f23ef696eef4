"""When `lora-lab reproduce` says that a run's end moves by more than the two runs differ.

Independent truth: the movement and the difference, worked out by hand for each row of a table.
Run: make test ARGS=tests/cli/test_settled.py
"""

import json
from pathlib import Path

import pytest

from lora_lab.cli.comparison import comparisons
from lora_lab.cli.settled import movement_line
from lora_lab.runs import Run

NAN = float("nan")

# The stored run's val/loss at each of its epochs, the new run's last one, and what is said:
# (measurements, movement, difference), or None.
ROWS = {
    "equal": ([9, 5, 3, 2, 1], 1, None),
    "moves by less": ([9, 1.01, 1.0], 1.1, None),
    "moves by as much": ([9, 1.25, 1.0], 1.25, None),
    "moves by more": ([9, 5, 1.12, 1.0], 1.03, (2, "12 %", "3 %")),
    "up and down": ([9, 9, 9, 9, 1.0, 1.1, 0.9, 1.0], 1.125, (4, "20 %", "12 %")),
    "five of them count": ([*[9] * 20, 9, 2, 1.5, 1.4, 1.3, 1.2, 1.0], 1.1, (5, "50 %", "10 %")),
    "those of the second half": ([9, 8, 7, 5, 4, 4, 4], 4.4, (4, "25 %", "10 %")),
    "one of two is in the second half": ([9, 1], 1.1, None),
    "one": ([1.0], 1.1, None),
    "a stored 0": ([1, 1, 0], 0.1, None),
    "negative": ([-9, -5, -3, -2], -2.2, (2, "50 %", "10 %")),
    "not a number": ([9, NAN, 1.0], 1.1, None),
    "the new one is not": ([9, 2.0, 1.0], NAN, None),
    "the new one has none": ([9, 2.0, 1.0], None, None),
}


def run_with(folder: str, rows: list[dict[str, float]]) -> Run:
    Path(folder).mkdir()
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(Path(folder))


def rows_of(metric: str, values: list[float]) -> list[dict[str, float]]:
    return [{"step": 10 * i, "epoch": i, metric: value} for i, value in enumerate(values)]


@pytest.mark.parametrize("row", ROWS)
def test_a_movement_beside_a_difference(row: str):
    values, new_value, expected = ROWS[row]
    stored = run_with("stored", rows_of("val/loss", values))
    new = run_with("new", [] if new_value is None else rows_of("val/loss", [new_value]))
    line = movement_line(stored, comparisons(stored, new))
    if expected is None:
        assert line is None
    else:
        count, movement, gap = expected
        assert line == (
            f"the run's own last {count} measurements of val/loss move by {movement}, more than "
            f"the {gap} between the two runs: its end is not settled to {gap}"
        )


def test_the_metric_that_differs_most_and_only_of_validation():
    metrics = {"val/loss": 1.01, "val/error": 1.05, "val/other": 1.4, "train/loss": 1.06}
    rows = [row for name in metrics for row in rows_of(name, [2, 1.2, 1.2, 1.0])]
    stored = run_with("stored", rows)
    new = run_with("new", [{"step": 30, "epoch": 3, **metrics}])
    line = movement_line(stored, comparisons(stored, new))
    assert line is not None
    assert "measurements of val/error move by 20 %, more than the 5 %" in line


def test_a_best_validation_that_is_logged_again_counts_once():
    """With `select` the row of the best step comes last: it is the result, at its own step."""
    rows = [*rows_of("val/loss", [9, 8, 3, 1.0, 1.2]), {"step": 30, "epoch": 3, "val/loss": 1.0}]
    stored = run_with("stored", rows)
    new = run_with("new", [{"step": 30, "epoch": 3, "val/loss": 1.1}])
    line = movement_line(stored, comparisons(stored, new))
    assert line is not None
    assert "last 3 measurements of val/loss move by 200 %, more than the 10 %" in line
