"""A data set of the user's that breaks the contract of `Data` is refused before a run is made.

Independent truth: a data set that keeps it, and one change of its text for each way to break it.
Run: make test ARGS=tests/training/test_data_contract.py
"""

import importlib
import sys
from pathlib import Path

import pytest

from lora_lab.config import compose
from lora_lab.config.schema import Config, ConfigError
from lora_lab.training.plan import plan

RIGHT = """
import torch
from lora_lab.data import Data
from torch.utils.data import TensorDataset


class Points(Data):
    task = "classification"

    def __init__(self, phase, batch_size: int, seed: int, rows: int = 20):
        super().__init__(phase, batch_size, seed)
        self.rows = rows

    @property
    def sizes(self):
        return {"in_features": 3, "out_features": 4}

    def draw(self):
        inputs = torch.rand(self.rows, 3)
        targets = torch.arange(self.rows) % 4
        return TensorDataset(inputs, targets), TensorDataset(inputs[:9], targets[:9])
"""
SETTINGS = ["name=points", "model=mlp", "~experiment", "data=digits", "data._target_=points.Points"]
SETTINGS += ["data.batch_size=8", "adapter.r=2"]

BROKEN = {
    "no Data": ("(Data)", "", "must be a Data of lora_lab"),
    "draw": ("def draw", "def drawn", r"lacks `draw` \(gives two sets of rows, .*nearest: drawn"),
    "sizes": ("def sizes", "def size", r"lacks `sizes` \(a property.*nearest: size"),
    "phase": ("phase, b", "phases, b", "must take the argument `phase`.*nearest: phases"),
    "super": ("super().__init__(phase, batch_size, seed)", "pass", "begin with super"),
    "no task": ("task =", "tasks =", "`task` must be one of .*nearest: tasks"),
    "task": ('"classification"', '"classify"', "nearest: classification"),
    "a method": ("@property", "", "`sizes` must be a property"),
    "a list": ('{"in_features": 3, "out_features": 4}', "[3, 4]", r"must be a dict .*\[3, 4\]"),
    "a number": ("4}", "4.0}", "must be a dict of whole numbers"),
    "out": ("out_features", "out_feature", "must have out_features.*nearest: out_feature$"),
    "classes": ("out_features", "classes", "they have in_features, classes; nearest: classes$"),
    "in": ("in_features", "inputs", "model.in_features: must be given.*sizes are inputs, out_f"),
    "raises": ("torch.rand(", "torch.rnd(", r"draw\(\) raises Attr.*\(points.py, line 19\)"),
    "one set": (", TensorDataset(inputs[:9], targets[:9])", "", "must give two sets of rows"),
    "pairs": ("return TensorDataset(inputs, targets)", "return [*zip(inputs, targets)]",
              "for training: rows.* must give"),
    "empty": ("[:9]", "[:0]", "for validation: there are none"),
    "one thing": ("TensorDataset(inputs, targets)", "TensorDataset(inputs)", "must give .inputs"),
    "floats": ("% 4", "% 4.0", "must be int64, targets.long"),
    "a class": ("% 4", "% 5", "must be from 0 to 3.* not 0 to 4; out_features=5"),
    "integers": ('"classification"', '"regression"', "must be numbers, targets.float"),
    "few rows": ("rows: int = 20", "rows: int = 7", "more than the 7 training rows"),
    "base phase": ("self.rows = rows", 'self.rows = rows if phase == "adapt" else 7', "phase base"),
}  # fmt: skip
"""What is broken: text, new text, what is said."""


def planned(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("points.py").write_text(text)
    monkeypatch.syspath_prepend(Path().absolute())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "points", raising=False)
    importlib.invalidate_caches()
    ((_, cfg),) = compose.compose_points([SETTINGS])
    assert isinstance(cfg, Config), cfg
    plan(cfg)


def test_what_keeps_the_contract_is_planned(monkeypatch: pytest.MonkeyPatch):
    planned(RIGHT, monkeypatch)
    assert not Path("runs").exists()


@pytest.mark.parametrize("change", BROKEN)
def test_what_breaks_the_contract_is_named(change: str, monkeypatch: pytest.MonkeyPatch):
    old, new, says = BROKEN[change]
    assert old in RIGHT
    with pytest.raises(ConfigError, match=says):
        planned(RIGHT.replace(old, new), monkeypatch)
    assert not Path("runs").exists()
