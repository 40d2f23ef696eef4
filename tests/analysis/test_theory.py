"""Experiments whose answer theory knows, at a few points; `make theory` runs all of them.

Truth: the closed forms of analysis/theory.py, themselves tested in test_theory_formulas.py.

Run: make test ARGS=tests/analysis/test_theory.py
"""

from pathlib import Path

import pytest

from lora_lab.report.theory import TheoryCheck
from lora_lab.runs import find_runs
from tests.conftest import command
from tests.theory import MULTIRUNS, SMALL, commands, lines


def test_every_known_experiment_is_in_both_tables():
    assert list(SMALL) == list(MULTIRUNS)


SLOW = ("what_trains", "planted_conv", "planted_embedding", "group_shift", "subspace")
SLOW += ("planted_linear", "intruders")
"""Their formulas are in test_theory_formulas.py; others go the same way from end to end."""


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SMALL],
)
@pytest.mark.slow
def test_theory_holds(monkeypatch: pytest.MonkeyPatch, experiment: str):
    for arguments in commands({experiment: SMALL[experiment]}):
        assert command(monkeypatch, "train", *arguments) == 0
    results = lines(find_runs(Path("runs")))
    assert results
    for line in results:
        assert len(line.seeds) >= 3
        assert line.passes, (line.point, line.r, line.metric, line.worst)


@pytest.mark.parametrize(
    ("measured", "theory", "error", "passes"),
    [
        (1.0009, 1.0, 0.0, True),
        (1.0011, 1.0, 0.0, False),
        (0.9, 1.0, 0.04, True),
        (0.9, 1.0, 0.03, False),
        (1e-7, 0.0, 0.0, True),
        (1e-5, 0.0, 0.0, False),
    ],
)
def test_a_gap_is_judged_by_its_size(measured: float, theory: float, error: float, passes: bool):
    held = TheoryCheck("val/loss", measured, theory, error, initial_loss=1.0)
    assert held.holds == passes
    assert held.gap == pytest.approx(measured - theory)
    relative = TheoryCheck("val/loss", 0.3, 0.2, 0.0, initial_loss=4.0)
    assert relative.gap == pytest.approx(0.5)
    assert TheoryCheck("val/loss", 0.3, 1e-12, 0.0, initial_loss=4.0).gap == pytest.approx(0.075)
