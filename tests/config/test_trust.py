"""A run directory that someone sends runs no code but what is known, unless --trust says so.

Independent truth: files that the code would write.
Run: make test ARGS=tests/config/test_trust.py
"""

import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab.config.checks import parse_config
from lora_lab.config.schema import ConfigError
from lora_lab.config.trust import check_trusted
from lora_lab.run_files import file_records
from lora_lab.runs import Run
from tests.conftest import command
from tests.training.test_stored_runs import LORA, STORED

WRITES = "from pathlib import Path\nPath('ran').touch()\n"
OS_SYSTEM: dict[str, Any] = {"_target_": "os.system", "command": "touch ran"}
COMMANDS = {
    "analyze": ("analyze", "RUN"),
    "peft": ("export", "RUN", "exported"),
    "merged": ("export", "RUN", "exported", "--format=merged"),
    "reproduce": ("reproduce", "RUN"),
}


@pytest.fixture
def run(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run; the current folder and the run's are on the import path."""
    shutil.copytree(STORED, ".", dirs_exist_ok=True)
    run = Run(Path("runs/planted_linear") / LORA)
    (run.path / "sent.py").write_text(WRITES)
    Path("mine.py").write_text(WRITES)
    monkeypatch.syspath_prepend(Path().absolute())
    monkeypatch.syspath_prepend(run.path.absolute())
    for name in ("sent", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return run


def change(run: Run, **nodes: Any) -> Run:
    """The run with other nodes in its config, as if it had been trained with them."""
    content = run.config | nodes
    (run.path / "config.yaml").write_text(yaml.safe_dump(content))
    run.update_status(files=file_records(run.path))
    return Run(run.path)


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("key", ["data", "model", "optimizer"])
@pytest.mark.parametrize("trust", [False, True])
def test_no_command_calls_what_a_config_names(
    run: Run,
    arguments: tuple[str, ...],
    key: str,
    trust: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    extra = {"lr": 1.0, "schedule": "constant", "warmup": 0} if key == "optimizer" else {}
    run = change(run, **{key: OS_SYSTEM | extra})
    words = [str(run.path) if word == "RUN" else word for word in arguments]
    assert command(monkeypatch, *words, *(["--trust"] if trust else [])) == 2
    assert not Path("ran").exists()
    says = "must be a" if trust else "--trust runs it"
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{key}._target_=os.system" in shown
    assert says in shown


@pytest.mark.parametrize(
    ("target", "is_trusted"),
    [
        *(("sent.Model", False), ("sent:Model", False), ("mine.Model", True)),
        *(("runs.sent.Model", False), ("runs.planted_linear.sent:Model", False)),
        *(("os.system", False), ("subprocess:Popen", False), ("__main__.Model", False)),
        *(("torch.nn.Linear", True), ("torch.hub.load", False), ("torch.os.system", False)),
        *(("lora_lab.models.mlp.MLP", True), ("lightning.pytorch.LightningModule", False)),
        *(("yaml.unsafe_load", False), ("sklearn.base.clone", False), ("pluggy.f", True)),
        *(("tests.words.Words", True), ("no_such_package.Model", True)),
    ],
)
def test_what_may_be_run(run: Run, target: str, is_trusted: bool):
    run = change(run, model={"_target_": target})
    error = pytest.raises(ConfigError, match=re.escape(f"model._target_={target}"))
    with nullcontext() if is_trusted else error:
        check_trusted(parse_config(dict(run.config)), run.path)
    assert not Path("ran").exists()


def test_code_beside_a_models_weights_needs_trust(run: Run):
    model = {"_target_": "lora_lab.models.pretrained.pretrained", "path": "x", "remote_code": True}
    run = change(run, model=model)
    with pytest.raises(ConfigError, match=r"model\.remote_code=true .*--trust runs it"):
        check_trusted(parse_config(dict(run.config)), run.path)
