"""Each kind of `make faults` works: its first fault is brought about, and survived.

Independent truth: that of the kind (tests/faults/). A reader that believes a damaged file, and a
training that loses a person's, are told apart from those that do not.

Run: make test-slow ARGS=tests/test_faults.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.__main__ import KINDS
from tests.faults.commands import Result
from tests.faults.results import add_notes, expect_notes
from tests.faults.trial import Trial

ROOT = Path(__file__).parents[1]


def test_what_is_bad_is_counted(tmp_path: Path):
    trial = Trial("kill", "here")
    trial.read(Result("ls", 0, "all is well"))
    assert trial.survived
    trial.read(Result("ls", 1, "Traceback (most recent call last):\n  File"))
    (tmp_path / "runs/planted/r1").mkdir(parents=True)
    (tmp_path / "runs/planted/r1/status.json").write_text("{}")
    notes = add_notes(tmp_path)
    assert len(notes) == 4
    expect_notes(trial, notes)
    assert [*trial.bad] == ["traceback"]
    for change in (Path.unlink, lambda path: path.write_text("another's")):
        change(next(iter(notes)))
        trial.bad.clear()
        expect_notes(trial, notes)
        assert [*trial.bad] == ["lost"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_fault_of_each_kind(kind: str):
    command = [sys.executable, "-m", "tests.faults", "--only", kind, "--count", "1", "--seed", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "survived" in ended.stdout
