"""Adapters that start from stored ones (adapter.start_from).

Truth: the loss of the run that stored them, and ΔW of its files.
Run: make test ARGS=tests/training/test_start_from.py
"""

from pathlib import Path

import pytest
import torch

from lora_lab import adapters
from lora_lab.adapters.stored import read_updates
from lora_lab.runs import find_runs
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.conftest import SMALL, Lab, command, only_run

HERE = ("spectra.truncation=none", "spectra.against_base=false")
FIRST = ("adapter.r=2", "adapter.alpha=8", *HERE)


def test_a_run_starts_where_the_stored_adapter_ended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("digits", *FIRST) == 0
    first = only_run()
    ended = first.last("val/loss")
    assert first.curve("val/loss")[0] != ended
    assert command(monkeypatch, "export", str(first.path), "peft") == 0
    for folder, alpha in ((first.path / "adapter", 8), (Path("peft"), 3)):
        runs = f"runs_dir=from_{folder.name}"
        settings = (f"adapter.start_from={folder}", "adapter.r=2", f"adapter.alpha={alpha}", *HERE)
        assert lab("digits", *settings, runs) == 0
        run = only_run(f"from_{folder.name}")
        assert run.curve("val/loss")[0] == pytest.approx(ended, rel=1e-6)
        assert run.last("val/loss") != ended
        assert run.config["adapter"]["start_sha256"]
    settings = (f"adapter.start_from={first.path / 'adapter'}", *FIRST)
    capsys.readouterr()
    for wrong, message in {
        "adapter.r=3": "'body.fc1' has there r=2 on a weight 16 × 64, and here r=3",
        "adapter.init=pissa": "'body.fc1' has init=pissa, which draws its own first values",
        "adapter.start_from=peft/none": "peft/none",
    }.items():
        assert lab("digits", *settings, wrong) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_runs_of_a_pack_start_from_it_too(lab: Lab):
    assert lab("digits", *FIRST) == 0
    first = only_run()
    settings = (f"adapter.start_from={first.path / 'adapter'}", *FIRST, "runs_dir=pack")
    assert lab("digits", "-m", "seed=0,1", "hydra/launcher=packed", *settings) == 0
    for run in find_runs(Path("pack")):
        assert run.curve("val/loss")[0] == pytest.approx(first.last("val/loss"), rel=1e-6)
        assert run.status["packed"] == 2


def test_the_identity_has_the_stored_adapters_content_and_not_its_path():
    settings = ("experiment=digits", *SMALL["digits"], *FIRST)
    cfg = composed(*settings)
    model = plan(cfg).model()
    adapters.attach(model, r=2)
    for adapter in adapters.attached(model).values():
        torch.nn.init.normal_(adapter.B)
    for folder in ("one", "same"):
        adapters.save(model, folder)
    one, same = (plan(composed(*settings, f"adapter.start_from={f}")) for f in ("one", "same"))
    assert one.cfg.identity() == same.cfg.identity() != cfg.identity()
    attached = plan(one.cfg).attach(one_model := one.model())
    for site, delta in adapters.deltas(one_model).items():
        assert torch.allclose(delta.double(), read_updates(Path("one"))[site].product(), atol=1e-6)
    assert [site.name for site in attached.sites] == [*adapters.deltas(model)]
