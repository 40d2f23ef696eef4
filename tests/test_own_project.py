"""docs/own-project.md: its files are written and its commands run, in their order.

Truth: the page itself. Trainings are cut to one epoch.
Run: make test ARGS=tests/test_own_project.py
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

from lora_lab.config import project
from lora_lab.runs import find_runs
from tests.conftest import command

PAGE = Path(__file__).parents[1] / "docs" / "own-project.md"
BRIEF = ["base.epochs=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
BRIEF += ["tracking=off", "figures=false", "spectra.truncation=none", "spectra.against_base=false"]


def files_and_commands() -> list[tuple[str, str]]:
    """The page's blocks: (path, content) of a file, and ("", commands)."""
    blocks, path = [], ""
    for before, language, text in re.findall(r"(.*?)\n```(\w*)\n(.*?)```", PAGE.read_text(), re.S):
        if named := re.findall(r"\bIn `(\S+)`|As a file, `(\S+)`", before):
            path = "".join(named[-1])
        if language != "toml":
            blocks.append((path if language else "", text))
    return blocks


DEAR = ("hydra/launcher", "report")
"""What commands have that start other processes or draw figures: test_wheel.py has a report too."""


@pytest.mark.parametrize("left_out", [DEAR, pytest.param((), marks=pytest.mark.slow)])
def test_the_pages_files_and_commands(
    left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(project, "project", None)
    monkeypatch.setenv(project.PROJECT_VARIABLE, "")
    for path, text in files_and_commands():
        if path:
            Path(path).write_text(text)
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            if any(word.startswith(left_out) for word in words if left_out):
                continue
            if words[0] == "cd":
                monkeypatch.chdir(words[1])
                continue
            trains = words[1] in ("train", "sweep") and "--help" not in words
            code = command(monkeypatch, *words[1:], *(BRIEF if trains else []))
            assert code == 0, line + "".join(capsys.readouterr())
    runs = [run.path.parent.name for run in find_runs(Path("runs"))]
    assert (runs.count("mine"), runs.count("wave")) == ((0, 7) if left_out else (8, 11))
    assert all(run.finished for run in find_runs(Path("runs")))
    assert left_out or Path("runs/report/index.html").exists()
    assert left_out or Path("runs/wave/report/index.html").exists()
