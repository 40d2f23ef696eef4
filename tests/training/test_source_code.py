"""A run knows the code that it was trained with, and changed code never passes for the old.

Independent truth: a small project of the user's, whose files are edited by hand.

Run: make test ARGS=tests/training/test_source_code.py
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from lora_lab.config import compose
from lora_lab.config.schema import Component, Config
from lora_lab.config.trust import components_of
from lora_lab.runs import CHECKPOINTS, Run, find_runs
from lora_lab.training import bases, source_code
from tests.conftest import Lab, command, only_run

PROJECT = {
    "net.py": '''"""A model of the user's."""
from parts import base
from parts.size import FACTOR
from loose import unit


class Net(base.Base):
    """y = f W x + s."""

    def forward(self, x):
        from late import shift

        if x is None:
            from lazy.deep.part import GAIN
        return unit.UNIT * FACTOR * self.linear(x) + shift()
''',
    "parts/__init__.py": "",
    "parts/base.py": """from torch import nn
from .bias import BIAS


class Base(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=BIAS)
""",
    "parts/bias.py": "BIAS = False\n",
    "parts/size.py": "FACTOR = 1.0\n",
    "loose/unit.py": "UNIT = 1.0\n",
    "late.py": """try:
    from .beside import NOTHING
except ImportError:
    from latin import NAME


def shift():
    return 0.0
""",
    "latin.py": "# coding: latin-1\nNAME = 'M\xfcller'\n",
    "lazy/__init__.py": "raise RuntimeError('imported')\n",
    "lazy/deep/part.py": "GAIN = 1.0\n",
    "beside.py": "NOTHING = 1\n",
    "descent.py": "import torch\n\n\nclass Descent(torch.optim.SGD):\n    rate = 1.0\n",
    "rows.py": "from lora_lab.data.shift import Shift\n\n\nclass Rows(Shift):\n    unit = 1.0\n",
}
USERS = ["model._target_=net.Net", "optimizer._target_=descent.Descent", "data._target_=rows.Rows"]
USERS += ["base.optimizer._target_=torch.optim.SGD"]

CHANGED = {
    "the model": ("net.py", "+ shift()", "- shift()"),
    "its base class": ("parts/base.py", "bias=BIAS", "bias=not BIAS"),
    "a constant it imports": ("parts/size.py", "1.0", "2.0"),
    "a folder without __init__.py": ("loose/unit.py", "1.0", "2.0"),
    "a relative import": ("parts/bias.py", "False", "True"),
    "an import in a function": ("late.py", "0.0", "1.0"),
    "a package that it never imports": ("lazy/__init__.py", "imported", "so it is"),
    "a module of that package": ("lazy/deep/part.py", "1.0", "2.0"),
    "text in another encoding": ("latin.py", "M\xfcller", "M\xf6ller"),
    "a package it imports from": ("parts/__init__.py", "", "import math\n"),
    "the optimizer": ("descent.py", "1.0", "2.0"),
    "the data": ("rows.py", "1.0", "2.0"),
}
SAME = {
    "a docstring": ("net.py", "y = f W x + s.", "A line."),
    "a comment": ("parts/base.py", "super()", "# first\n        super()"),
    "layout": ("net.py", "FACTOR * self", "(FACTOR) * self"),
    "a module that is not imported": ("beside.py", "1", "2"),
}
"""What is edited: file, text, new text."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's project, which can be imported."""
    folder = tmp_path / "project"
    for name, text in PROJECT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "latin-1")
    monkeypatch.syspath_prepend(folder)
    # Bytecode would be taken for that of a file which was edited within the same second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    return folder


def forget() -> None:
    """Lets this process import the project anew, as another process would."""
    modules = {Path(name).with_suffix("").parts[0] for name in PROJECT}
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]
    importlib.invalidate_caches()
    source_code._code_of.cache_clear()


def edit(project: Path, name: str, old: str, new: str) -> None:
    text = (project / name).read_text("latin-1")
    assert old in text
    (project / name).write_text(text.replace(old, new) if old else new, "latin-1")
    forget()


def users_config() -> Config:
    ((_, cfg),) = compose.compose_points([["experiment=shift", *USERS]])
    assert isinstance(cfg, Config)
    return cfg


def code() -> dict[str, str]:
    return source_code.code_of(components_of(users_config()).values())


@pytest.mark.parametrize("change", [*CHANGED, *SAME])
def test_the_code_of_a_run_is_all_that_its_targets_import(project: Path, change: str):
    before, before_key = code(), bases.key(users_config())
    name, old, new = {**CHANGED, **SAME}[change]
    edit(project, name, old, new)
    differing = [module for module, now in code().items() if now != before.get(module)]
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert differing == ([module] if change in CHANGED else [])
    # A base is trained with all of it but the run's optimizer.
    other_base = change in CHANGED and change != "the optimizer"
    assert (bases.key(users_config()) != before_key) is other_base


TEXTS = (b"GAIN = 1", b"GAIN = 2  # more", b"GAIN = 2", b"GAIN = = 2", b"GAIN = '\xff'", b"GAIN\0")
"""Contents of a file: the second and the third are equal, those from the fourth on no Python."""


def test_code_beside_a_models_weights_counts(tmp_path: Path):
    target = "lora_lab.models.pretrained.pretrained"
    model = Component(_target_=target, path=str(tmp_path), remote_code=True)  # pyright: ignore
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "modeling.py").write_text("GAIN = 0")
    codes = []
    for text in TEXTS:
        (tmp_path / "modeling.py").write_bytes(text)
        codes.append(source_code.code_of([model]))
    assert len({code["more/modeling.py"] for code in codes}) == 1
    hashes = [code["modeling.py"] for code in codes]
    assert hashes[1] == hashes[2]
    assert len({*hashes}) == len(TEXTS) - 1


def test_an_installed_package_counts_by_its_version(tmp_path: Path, monkeypatch):
    site = tmp_path / "of another Python" / "site-packages"
    (site / "shop-1.0.dist-info").mkdir(parents=True)
    metadata = site / "shop-1.0.dist-info" / "METADATA"
    (site / "shop-1.0.dist-info" / "top_level.txt").write_text("shop\n")
    (site / "shop.py").write_text(PROJECT["net.py"])
    monkeypatch.syspath_prepend(site)
    codes = []
    for version in ("1.0", "1.1"):
        metadata.write_text(f"Metadata-Version: 2.1\nName: shop\nVersion: {version}\n")
        forget()
        codes.append(dict(source_code._code_of(("shop", "torch.nn"))))
    assert codes == [{"shop": "1.0"}, {"shop": "1.1"}]


def status_and_rows(run: Run) -> tuple[str, bytes]:
    return run.status["state"], (run.path / "metrics.jsonl").read_bytes()


def test_a_finished_run_is_not_taken_for_one_of_changed_code(
    project: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", *USERS) == 0
    before = status_and_rows(only_run())
    assert lab("shift", *USERS) == 0
    assert "Finished before" in capsys.readouterr().out
    edit(project, *CHANGED["the model"])
    edit(project, *CHANGED["an import in a function"])
    assert lab("shift", *USERS) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "(late changed, net changed)" in shown
    assert "overwrite=true" in shown
    assert status_and_rows(only_run()) == before
    assert lab("shift", *USERS, "overwrite=true") == 0
    assert only_run().status["code"] == code()
    assert status_and_rows(only_run())[1] != before[1]


def test_an_interrupted_run_does_not_go_on_with_changed_code(project: Path, lab: Lab):
    assert lab("shift", *USERS) == 0
    run = only_run()
    (run.path / CHECKPOINTS).mkdir()
    run.update_status(state="interrupted")
    edit(project, *CHANGED["the data"])
    assert lab("shift", *USERS) == 2
    assert run.status["state"] == "interrupted"
    assert lab("shift", *USERS, "overwrite=true") == 0


def test_a_multirun_refuses_the_runs_of_changed_code_and_runs_the_others(
    project: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", *USERS, "seed=0,1", "-m") == 0
    edit(project, *CHANGED["the optimizer"])
    assert lab("shift", *USERS, "seed=0,1,2", "-m") == 2
    shown = "".join(capsys.readouterr())
    assert "descent changed" in shown
    runs = find_runs(Path("runs"))
    assert [run.status["code"] == code() for run in runs] == [False, False, True]


def test_a_run_without_a_record_of_its_code_is_taken_as_it_is(
    project: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", *USERS) == 0
    status = json.loads((only_run().path / "status.json").read_text())
    for name in ("code", "files", "checksum", "sha256"):
        status.pop(name, None)
    (only_run().path / "status.json").write_text(json.dumps(status))
    edit(project, *CHANGED["the model"])
    assert lab("shift", *USERS) == 0
    assert "Finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_versions_of_libraries_are_told_of_a_finished_run(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift") == 0
    file = only_run().path / "env.json"
    content = file.read_bytes()
    environment = json.loads(content)
    environment["packages"] |= {"torch": "1.9.0", "wandb": "0.1"}
    only_run().replace_files({"env.json": json.dumps(environment).encode()})
    capsys.readouterr()
    assert lab("shift") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(trained with torch 1.9.0 (here {torch.__version__}); overwrite=true" in shown
    assert lab("shift", "-m") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"1 runs (1 finished, 1 trained with torch 1.9.0 (here {torch.__version__}))" in shown


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(c, marks=[] if c == "an import in a function" else pytest.mark.slow)
        for c in ("the model", "an import in a function", "a docstring")
    ],
)
def test_analyze_refuses_a_model_with_another_loss(
    project: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, change: str, capsys
):
    assert lab("shift", *USERS) == 0
    run = only_run()
    edit(project, *{**CHANGED, **SAME}[change])
    if change == "the model":  # x - 0 is x + 0: the code differs, its numbers do not
        assert command(monkeypatch, "analyze", str(run.path)) == 0
        return
    before = (run.path / "spectra.npz").read_bytes()
    code = command(monkeypatch, "analyze", str(run.path))
    assert code == (0 if change in SAME else 2)
    if change in CHANGED:
        assert "(late changed)" in " ".join(capsys.readouterr().err.split())
        assert (run.path / "spectra.npz").read_bytes() == before


@pytest.mark.slow
def test_reproduce_tells_changed_code(
    project: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", *USERS) == 0
    edit(project, *CHANGED["an import in a function"])
    assert command(monkeypatch, "reproduce", str(only_run().path), "--to", "again") == 1
    assert "code: changed since the stored run: late" in capsys.readouterr().out
