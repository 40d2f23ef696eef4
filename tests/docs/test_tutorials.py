"""docs/tutorials/: the files that a page shows are written and its commands run, in their order.

Truth: the pages themselves. Commands are the blocks marked as bash. A page is run as it stands only
with -m slow; else trainings are brief, of fewer points, and in one process, and no report is drawn.
Run: make test ARGS=tests/docs/test_tutorials.py
"""

import re
import shlex
import sys
from collections import Counter
from glob import glob
from pathlib import Path

import pytest

from lora_lab.config import project
from lora_lab.runs import find_runs
from tests.conftest import command, unknown_metrics

PAGES = Path(__file__).parents[2] / "docs" / "tutorials"
BRIEF = ["base.epochs=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
BRIEF += ["tracking=off", "figures=false", "spectra.truncation=none", "spectra.against_base=false"]
FEWER = {"seed=0,1,2": "seed=0", "seed=0,1": "seed=0", "adapter.r=1,2,4,8": "adapter.r=1,8"}
"""What stands in the place of a sweep's values where a page is run briefly."""
LEFT_OUT = {
    "own-project": ("hydra/launcher", "report"),
    "first-ablation": ("report", "reproduce", "optimizer.lr", "adapter=full"),
}
"""Words whose commands take long: they draw figures, or start processes."""

RUNS = {
    "first-ablation": ({"digits": 3}, {"digits": 22}),
    "own-project": ({"wave": 7}, {"mine": 8, "wave": 11}),
    "pretrained-model": (None, {"docs_minilm": 3, "films": 2}),
    "cluster": (None, {"digits": 7}),
    "reading-a-spectrum": (None, {"planted_linear": 4, "digits": 4}),
}
"""Page → how many finished runs it leaves by experiment: brief (None: only as it stands), and as
it stands."""


def files_and_commands(page: str) -> list[tuple[str, str]]:
    """The page's blocks in their order: (path, content) of a file, and ("", commands)."""
    blocks, path = [], ""
    text = (PAGES / f"{page}.md").read_text()
    for before, language, content in re.findall(r"(.*?)\n```(\w*)\n(.*?)```", text, re.DOTALL):
        if named := re.findall(r"\bIn `(\S+)`|As a file, `(\S+)`", before):
            path = "".join(named[-1])
        if language == "bash":
            blocks.append(("", content))
        elif language in ("python", "yaml", "json") and named:
            blocks.append((path, content))
    return blocks


def words_of(line: str) -> list[str]:
    """The words of a command as a shell gives them: what has a * outside quotes is a path."""
    words = []
    for word in shlex.split(line):
        found = sorted(glob(word)) if word.startswith("runs/") else []
        words += found or [word]
    return words


def test_each_tutorial_is_run():
    assert set(RUNS) == {page.stem for page in PAGES.glob("*.md")}


BOTH = [(page, True) for page, (brief, _) in RUNS.items() if brief]
AS_IT_STANDS = [pytest.param(page, False, marks=pytest.mark.slow) for page in RUNS]


@pytest.mark.parametrize(("page", "is_brief"), [*BOTH, *AS_IT_STANDS])
def test_the_pages_files_and_commands(
    page: str,
    is_brief: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(project, "project", None)
    monkeypatch.setenv(project.PROJECT_VARIABLE, "")
    for path, text in files_and_commands(page):
        if path:
            Path(path).write_text(text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = words_of(line)
            if words[0] == "cd":
                monkeypatch.chdir(words[1])
                continue
            if is_brief and any(word.startswith(LEFT_OUT[page]) for word in words):
                continue
            trains = words[1] in ("train", "sweep") and "--help" not in words
            if is_brief and trains:
                kept = [w for w in words if not w.startswith("hydra/launcher")]
                words = [*(FEWER.get(w, w) for w in kept), *BRIEF]
            code = command(monkeypatch, *words[1:])
            assert code == 0, line + "".join(capsys.readouterr())
    runs = find_runs(Path("runs"))
    assert all(run.finished for run in runs)
    assert Counter(run.path.parent.name for run in runs) == RUNS[page][0 if is_brief else 1]
    assert not unknown_metrics()
