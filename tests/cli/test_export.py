"""`lora-lab export`: a run's adapter in PEFT's format, and its merged model.

Independent truth: PEFT loads the adapter and gives what the run's model gives; so does a plain
model with the merged weights.
Run: make test ARGS=tests/cli/test_export.py
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_lab import adapters
from lora_lab.models.linear import Linear
from tests.conftest import Lab, command, only_run


def base_and_adapted() -> tuple[Linear, Linear]:
    (path,) = Path("bases").glob("*.safetensors")
    base = Linear(12, 9)
    base.load_state_dict(load_file(path))
    adapted = copy.deepcopy(base)
    adapters.load(adapted, only_run().path / "adapter")
    return base, adapted


@pytest.mark.parametrize("adapter", ["lora", "pissa", "dora", "rslora", "lora_xs"])
def test_both_formats_give_the_runs_model(lab: Lab, monkeypatch: pytest.MonkeyPatch, adapter: str):
    assert lab("shift", "adapter.r=2", f"adapter={adapter}") == 0
    run, x = str(only_run().path), torch.randn(5, 12)
    assert command(monkeypatch, "export", run, "peft") == 0
    assert command(monkeypatch, "export", run, "merged", "--format", "merged") == 0
    base, adapted = base_and_adapted()
    merged = Linear(12, 9)
    merged.load_state_dict(load_file("merged/model.safetensors"))
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(base, "peft")  # pyright: ignore
    torch.testing.assert_close(theirs(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_a_fully_fine_tuned_model_is_written(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    assert lab("shift", "adapter=full") == 0
    run = only_run().path
    assert command(monkeypatch, "export", run.name[-6:], "merged", "--format=merged") == 2
    assert command(monkeypatch, "export", str(run), "merged", "--format=merged") == 0
    written, trained = (
        load_file("merged/model.safetensors"),
        load_file(run / "model/model.safetensors"),
    )
    assert torch.equal(written["linear.weight"], trained["linear.weight"])


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("adapter=none", "adapter=none: the run has no adapter to write"),
        ("adapter=full", "adapter=full: the run has no adapter to write"),
        ("peft", "peft/adapter_model.safetensors exists"),
        ("base", "is not in bases/: --bases DIR names the folder"),
    ],
)
def test_what_cannot_be_written_is_an_error(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str,
    message: str,
):
    assert lab("shift", *[before][: "=" in before]) == 0
    run = str(only_run().path)
    if before == "peft":
        assert command(monkeypatch, "export", run, "peft") == 0
    if before == "base":
        next(Path("bases").glob("*.safetensors")).unlink()
    assert command(monkeypatch, "export", run, "peft") == 2
    assert message in capsys.readouterr().err
