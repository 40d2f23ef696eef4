"""Command lines that cannot be run: exit 2, one paragraph, and nothing made.

Independent truth: a table of commands with the words that say what is right.
Run: make test ARGS=tests/cli/test_bad_commands.py
"""

import shlex
from pathlib import Path

import pytest

from tests.conftest import SMALL, command

MULTIRUN = "train -m adapter.r=1 "
COMMANDS = {
    "train -m seed=0,1 --dry-run": "--dry-run: lora-lab train has no such option; `lora-lab sweep",
    "train seed=1 --mulirun seed=2": "--mulirun: lora-lab train has no such option; nearest: --mul",
    "train seed=0,1": "seed=0,1: has several values, each a run: -m runs them all",
    "train adapter.r": "adapter.r: cannot be read; settings are KEY=VALUE",
    "train data=null": "data=null: must be the name of an option: conf/data has bytes",
    "train early_stopping={metric: val/loss, patience: 3}": "'early_stopping={NAME: VALUE}'",
    MULTIRUN + "seed=range(100000000)": "asks for 100000000 runs; one command has 100000 at most",
    MULTIRUN + "seed=range(999) data.seed=range(999)": "asks for 998001 runs; one command has",
    MULTIRUN + "seed=range(3,1)": "seed=range(3,1): has no value, and so no run",
    MULTIRUN + "seed=range(0,inf)": "seed=range(0,inf): has no end",
    MULTIRUN + "seed=range(0,3,0)": "seed=range(0,3,0): has no end",
    MULTIRUN + "seed=interval(0,1)": "seed=interval(0,1): has no end of values; range(0,3) has",
    MULTIRUN + "adapter=glob(zz*)": "adapter=glob(zz*): has no value, and so no run",
    MULTIRUN + "seed": "seed: cannot be read",
    MULTIRUN + "hydra/launcher=pcked": "there is no such hydra/launcher; nearest: packed",
    MULTIRUN + "hydra/sweeper=x": "hydra/sweeper=x: there is no such hydra/sweeper",
    MULTIRUN + "hydra.sweeper.max_batch_size=-1": "max_batch_size=-1: must be greater than 0",
    MULTIRUN + "hydra/launcher=packed hydra.launcher.max_runs=x": "max_runs=x: must be a valid int",
    MULTIRUN + "hydra/launcher=packed hydra.launcher.max_runs=0": "max_runs=0: must be greater tha",
    MULTIRUN + "hydra/launcher=joblib hydra.launcher.n_jobs=-2": "n_jobs=-2: must be greater than",
    MULTIRUN + "hydra/launcher=joblib hydra.launcher.n_job=2": "there is no such key; nearest: n_j",
    "report ''": "a path must not be empty",
    "ls ''": "a path must not be empty",
    "best empty": "lora-lab best: there are no runs in empty",
    "best --shown -1": "argument --shown: -1 must be an integer of at least 1",
    "best --shown x": "argument --shown: x must be an integer of at least 1",
    "diff run run": "lora-lab diff: run and run are one run: give two",
    "export run run/status.json": "run/status.json is a file: give a folder",
    "export run run/status.json/in": "run/status.json is a file: give a folder",
    "sweep run": "there is no file run",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
):
    Path("empty").mkdir()
    Path("run").mkdir()
    Path("run/status.json").write_text('{"state": "finished"}')
    before = sorted(Path().rglob("*"))
    # As the shell splits a line, but braces stay: unquoted, they are cut at the spaces.
    assert command(monkeypatch, *shlex.split(line)) == 2
    printed = capsys.readouterr()
    assert COMMANDS[line] in " ".join(printed.err.split())
    assert not printed.out
    assert "Traceback" not in printed.err
    assert sorted(Path().rglob("*")) == before


def test_flags_may_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["adapter.r=0", "-m", *SMALL["shift"], "seed=0,1"]
    assert command(monkeypatch, "train", *words) == 2
    assert "adapter.r=0: must be greater than 0, or full (2 of the runs)" in capsys.readouterr().err
    assert command(monkeypatch, "train", "adapter.r=1", "--cfg", "job", "seed=5") == 0
    assert "\nseed: 5\n" in capsys.readouterr().out
