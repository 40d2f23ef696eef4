"""Run directories of an earlier version are read, and their runs are not repeated.

Independent truth: two small runs in stored_runs/ (LoRA and adapter=full, over base.safetensors), as
commit a1e4053 wrote them; their hashes are the literal strings of that version.

Run: make test ARGS=tests/training/test_stored_runs.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lora_lab.config.checks import parse_config
from lora_lab.runs import Run
from tests.conftest import command

STORED = Path(__file__).parent / "stored_runs"
LORA = "r4-alpha8-kaiming-linear-lr0.02-data0-seed0-27c6ee6bbf"
FULL = "full-linear-lr0.02-data0-seed0-9f3b87190e"
HASHES = {
    LORA: (
        "27c6ee6bbfe8dae31770f23a17cb4cd260b3b7bf4452ec75ce6b98189692122b",
        "r4-alpha8-kaiming-linear-lr0.02-data0-03e580",
    ),
    FULL: (
        "9f3b87190e104a8c0255e589dd39ca00a2f0ce0f1c0850ac30f8b0e3cd511de8",
        "full-linear-lr0.02-data0-654416",
    ),
}
"""Identity and cell of each stored run."""
SETTINGS = (
    *("experiment=planted_linear", "tracking=off", "figures=false"),
    *("data.samples=16", "data.in_features=12", "data.out_features=10", "data.steps=2"),
    *("trainer.max_epochs=2", "base=checkpoint", "base.path=base.safetensors"),
)
"""The settings that the stored runs were trained with."""


@pytest.fixture(autouse=True)
def stored_runs(elsewhere: None) -> None:
    """Copies the stored runs and their base into the test's folder."""
    shutil.copytree(STORED, ".", dirs_exist_ok=True)


def stored(name: str) -> Run:
    return Run(Path("runs/planted_linear") / name)


@pytest.mark.parametrize("name", HASHES)
def test_a_configs_hashes_are_those_of_then(name: str):
    cfg = parse_config(dict(stored(name).config))
    assert (cfg.identity(), cfg.cell()) == HASHES[name]


@pytest.mark.parametrize(("name", "settings"), [(LORA, ()), (FULL, ("adapter=full",))])
def test_the_same_settings_repeat_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    settings: tuple[str, ...],
):
    files = [path for path in STORED.rglob("*") if path.is_file()]
    assert command(monkeypatch, "train", *SETTINGS, *settings) == 0
    shown = capsys.readouterr().out
    assert "Finished before, not repeated" in shown
    assert name in shown
    for path in files:
        assert path.relative_to(STORED).read_bytes() == path.read_bytes()
    assert len(list(Path("runs/planted_linear").iterdir())) == 2


def test_reports_and_lists_show_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "report", "runs") == 0
    assert command(monkeypatch, "ls") == 0
    shown = capsys.readouterr().out
    for name in HASHES:
        lines = (STORED / "runs/planted_linear" / name / "metrics.jsonl").read_text().splitlines()
        losses = [row["val/loss"] for row in map(json.loads, lines) if "val/loss" in row]
        assert f"{losses[-1]:.4f}" in shown


@pytest.mark.parametrize("name", HASHES)
def test_an_analysis_finds_what_it_found_then(monkeypatch: pytest.MonkeyPatch, name: str):
    assert command(monkeypatch, "analyze", str(stored(name).path)) == 0
    new, old = (
        yaml.safe_load((root / name / "advice.yaml").read_text())
        for root in (Path("runs/planted_linear"), STORED / "runs/planted_linear")
    )
    assert new.pop("loss") == pytest.approx(old.pop("loss"), rel=1e-5)
    assert new.pop("share") == pytest.approx(old.pop("share"), rel=1e-5)
    assert new == old
    *rows, again = stored(name).rows()
    then = {key: value for row in rows for key, value in row.items()}
    assert len(again) > 5
    assert {k: v for k, v in again.items() if k != "step"} == pytest.approx(
        {k: then[k] for k in again if k != "step"}, rel=1e-4, abs=1e-6
    )


def test_exported_to_peft_the_update_is_that_of_then(monkeypatch: pytest.MonkeyPatch):
    assert command(monkeypatch, "export", str(stored(LORA).path), "exported") == 0
    tensors = load_file("exported/adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.linear.lora_{factor}.weight"] for factor in "AB")
    about = json.loads(Path("exported/adapter_config.json").read_text())
    with np.load(stored(LORA).path / "spectra.npz") as arrays:
        delta = arrays["linear/delta"]  # (10, 12): all of it
    np.testing.assert_allclose(about["lora_alpha"] / about["r"] * B @ A, delta, rtol=0, atol=1e-7)


def test_a_diff_shows_what_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "diff", str(stored(LORA).path), str(stored(FULL).path)) == 0
    shown = capsys.readouterr().out
    assert "adapter.method" in shown
    assert "data.samples" not in shown
