"""Bases are trained once for all runs that share them, and a damaged one is trained again.

Independent truth: files read back, their bytes compared, and for a base's key the model's source
edited by hand.

Run: make test ARGS=tests/training/test_bases.py
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.config import compose
from lora_lab.config.schema import Config
from lora_lab.models import linear
from lora_lab.runs import find_runs
from lora_lab.training import bases
from tests.conftest import SMALL, Lab, only_run, quick


def base_file() -> Path:
    (path,) = Path("bases").glob("*.safetensors")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def forget(path: Path) -> None:
    path.with_suffix(".json").unlink()


def garble(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def empty(path: Path) -> None:
    path.with_suffix(".json").write_text("[]")


def lose_rows(path: Path) -> None:
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**about, "rows": about["rows"][:1]}))


@pytest.mark.parametrize(
    "damage", quick([cut, flip, forget, garble, empty, lose_rows], [flip, lose_rows])
)
def test_a_damaged_base_is_trained_again_and_said(lab: Lab, damage):
    lab("shift", "seed=0")
    path = base_file()
    content = path.read_bytes()
    damage(path)
    assert lab("shift", "seed=1") == 0
    logs = [(run.path / "log.txt").read_text() for run in find_runs(Path("runs"))]
    assert "is damaged" in logs[1]
    assert "base trained in" in logs[1]
    assert path.read_bytes() == content
    assert lab("shift", "seed=2") == 0
    assert "base found" in (find_runs(Path("runs"))[2].path / "log.txt").read_text()


@pytest.mark.slow
def test_runs_at_once_train_their_base_once():
    command = [sys.executable, "-m", "lora_lab.train", *SMALL["shift"], "tracking=off"]
    command.append("base.epochs=200")
    runs = [subprocess.Popen([*command, f"seed={seed}"]) for seed in range(3)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    logs = [(run.path / "log.txt").read_text() for run in find_runs(Path("runs"))]
    assert sorted(("base trained in" in log, "base found" in log) for log in logs) == [
        (False, True),
        (False, True),
        (True, False),
    ]
    curves = [run.curve("base/train/loss") for run in find_runs(Path("runs"))]
    assert curves[0] == curves[1] == curves[2]


def test_the_json_beside_it_says_what_it_is(lab: Lab):
    lab("shift")
    about = json.loads(base_file().with_suffix(".json").read_text())
    assert about["config"]["base"]["epochs"] == 4
    assert about["config"]["data"]["samples"] == 256
    assert [row["base/val/loss"] for row in about["rows"] if "base/val/loss" in row] == list(
        only_run().curve("base/val/loss").values()
    )


def test_a_run_that_dies_while_training_its_base_leaves_none(lab: Lab):
    assert lab("shift", "base.optimizer.lr=1e30", "base.optimizer._target_=torch.optim.SGD") == 1
    assert "base/train/loss became" in only_run().status["error"]
    assert not list(Path("bases").glob("*.safetensors"))


SOURCE = '''"""One linear layer."""

from torch import nn


class Linear(nn.Module):
    """y = x Wᵀ."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        """(B, in) → (B, out)."""
        return self.linear(x)
'''
SAME = {
    "a comment": ("        return", "        # (B, out)\n        return"),
    "a comment behind": ("return self.linear(x)", "return self.linear(x)  # (B, out)"),
    "the module's docstring": ("One linear layer", "A model"),
    "the class's docstring": ("y = x Wᵀ", "A matrix"),
    "no docstring": ('        """(B, in) → (B, out)."""\n', ""),
    "a docstring under an attribute": ("bias=False)\n", 'bias=False)\n        """W."""\n'),
    "blank lines": ("    def forward", "\n\n    def forward"),
    "another layout": ("(inputs, outputs, ", "(\n            inputs,\n            outputs, "),
}
OTHER = {
    "a number": ("return self.linear(x)", "return self.linear(x) * 2"),
    "an operator": ("return self.linear(x)", "return -self.linear(x)"),
    "an argument": ("bias=False", "bias=True"),
    "a line less": ("        super().__init__()\n", ""),
    "text that is used": ("bias=False)", 'bias=False)\n        self.name = "W"'),
}


@pytest.mark.parametrize(
    ("edit", "is_same"),
    [*((edit, True) for edit in SAME), *((edit, False) for edit in OTHER)],
)
def test_a_bases_key_follows_what_the_models_code_does(
    monkeypatch: pytest.MonkeyPatch, edit: str, is_same: bool
):
    ((_, cfg),) = compose.compose_points([["experiment=shift"]])
    assert isinstance(cfg, Config)
    read = inspect.getsource
    old, new = {**SAME, **OTHER}[edit]
    assert SOURCE.count(old) == 1
    keys = []
    for source in (SOURCE, SOURCE.replace(old, new)):
        texts = {linear: source}
        monkeypatch.setattr(bases.inspect, "getsource", lambda m: texts.get(m) or read(m))  # noqa: B023
        keys.append(bases.key(cfg))
    assert (keys[0] == keys[1]) is is_same
