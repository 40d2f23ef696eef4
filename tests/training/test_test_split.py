"""The test split: a run's result is looked at once on it, at its end.

Independent truth: a plain loop over the rows of test.jsonl with the model that the run exported;
the files of the same run without a test split, by one process, and never interrupted.

Run: make test ARGS=tests/training/test_test_split.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy

from lora_lab import train
from lora_lab.cli.sweep import logged_metrics
from lora_lab.config.checks import parse_config
from lora_lab.runs import Run
from lora_lab.training import finish
from lora_lab.training.plan import plan
from tests.conftest import command, only_run, quick
from tests.text_files import IDS, save_rows, save_tokenizer
from tests.tiny_models import tiny_model
from tests.training.test_resume import assert_equal

ROWS = 13
"""Rows of the test: odd, more than one batch, and no multiple of two processes."""

SETTINGS = (
    *("name=ours", "model=pretrained", "model.path=model", "model.head=classification"),
    *("base=pretrained", "data=text", "data.train=train.jsonl", "data.val=val.jsonl"),
    *("data.batch_size=4", "data.eval_batch_size=4", "also_train=[classifier]"),
    *("target.linear.match=*.query", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1"),
    *("trainer.accelerator=cpu", "optimizer.lr=0.01", "tracking=off", "figures=false"),
    *("spectra.truncation=none", "data.metrics=[accuracy,f1]"),
)
TEST = "data.test=test.jsonl"


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", "cache")
    tiny_model("bert", "model", "classification", num_labels=2)
    save_tokenizer("model")
    for name, count in (("train", 16), ("val", 7), ("test", ROWS)):
        save_rows(f"{name}.jsonl", count)


def train_here(*settings: str) -> int:
    sys.argv[1:] = [*SETTINGS, *settings]
    try:
        train.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def by_a_plain_loop(run: Run) -> dict[str, float]:
    """Mean loss, accuracy and F1 of `good`, one row after another, by the exported model."""
    from transformers import AutoModelForSequenceClassification

    folder = "model"
    if run.config["adapter"]["method"] != "none":
        folder = f"exported-{run.path.name}"
        with pytest.MonkeyPatch.context() as patch:
            assert command(patch, "export", str(run.path), folder, "--format=merged") == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    losses, pairs = [], []
    for line in Path("test.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = [IDS["[CLS]"], *(IDS[word] for word in row["text"].split()), IDS["[SEP]"]]
        target = ["bad", "good"].index(row["label"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        losses.append(cross_entropy(logits, torch.tensor([target])).item())
        pairs.append((int(logits.argmax()), target))
    true, wrong = pairs.count((1, 1)), sum(a != b for a, b in pairs)
    return {
        "test/loss": sum(losses) / len(losses),
        "test/accuracy": sum(a == b for a, b in pairs) / len(pairs),
        "test/f1": 2 * true / (2 * true + wrong),
    }


def row_of_test(run: Run) -> dict[str, Any]:
    """The only row of a run with metrics of the test."""
    (row,) = [row for row in run.rows() if any(key.startswith("test/") for key in row)]
    return row


CASES = {
    "lora": (),
    "full": ("adapter=full", "also_train=[]", "optimizer.lr=0.001"),
    "none": ("adapter=none", "also_train=[]"),
    "selected": ("select=best val/loss", "optimizer.lr=0.3"),
}
"""Settings of runs whose test is compared with a plain loop."""


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_tested_once_on_all_rows(case: str):
    assert train_here(*CASES[case], TEST) == 0
    assert train_here(*CASES[case], "runs_dir=without") == 0
    run, without = only_run(), only_run("without")
    row = row_of_test(run)
    assert row["epoch"] == (0 if case == "none" else run.last("best/epoch") or 3)
    if case == "selected":
        assert run.last("best/epoch") != 3, "the last weights would be the result"
    expected = by_a_plain_loop(run)
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    run_plan = plan(parse_config(dict(run.config)))
    names = logged_metrics(run_plan)
    assert {name for name in names if name.startswith("test/")} == {*expected}
    data = run_plan.data("adapt")
    for stage, rows in (("validate", 0), ("fit", ROWS), ("test", ROWS)):
        data.setup(stage)
        assert len(data.test or ()) == rows, "who only validates looks at no test"
    # All else is what it is without a test.
    assert [other for other in run.rows() if other != row] == without.rows()
    folder = "adapter" if case not in ("full", "none") else "model"
    for file in without.path.glob(f"{folder}/*.safetensors"):
        assert file.read_bytes() == (run.path / folder / file.name).read_bytes()


@pytest.mark.parametrize("trainer", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.slow
def test_two_processes_test_each_row_once(trainer: str):
    two = [
        *SETTINGS,
        TEST,
        "trainer.max_epochs=1",
        f"trainer={trainer}",
        "adapter=pissa",  # of which FSDP splits the factors, and not their first values
        "trainer.devices=2",
        "trainer.accelerator=cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lora_lab.train", *two], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected, row = by_a_plain_loop(only_run()), row_of_test(only_run())
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("where", quick(["before the test", "after the test"], ["before the test"]))
def test_a_run_that_stopped_around_its_test_has_it_once(
    where: str, monkeypatch: pytest.MonkeyPatch
):
    assert train_here(TEST, "runs_dir=alone") == 0
    owner, name = (Trainer, "test") if where == "before the test" else (finish, "_save_trained")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_, **__: interrupt())
        assert train_here(TEST, "checkpoint_every=0") == 130
    assert train_here(TEST) == 0
    assert_equal(only_run(), only_run("alone"))
    assert row_of_test(only_run()) == row_of_test(only_run("alone"))


def test_a_reproduction_compares_the_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert train_here(TEST, "trainer.max_epochs=1") == 0
    assert command(monkeypatch, "reproduce", str(only_run().path)) == 0
    assert "test/loss" in capsys.readouterr().out


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_each_run_of_a_pack_is_tested_and_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert train_here("-m", "adapter.r=1,2", TEST, "hydra/launcher=packed") == 0
    runs = [Run(path) for path in sorted(Path("runs/ours").glob("r*"))]
    losses = []
    for run in runs:
        expected, row = by_a_plain_loop(run), row_of_test(run)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert run.status["packed"] == 2
        losses.append(f"{row['test/loss']:.5g}")
    folder, one = "runs/ours", str(runs[0].path)
    shown: dict[str, str] = {}
    for arguments in (
        ("report", folder),
        ("report", one),
        ("ls", folder, "--metric=test/loss", "--sort=loss"),
        ("best", folder, "--metric=test/loss"),
        ("analyze", one),
    ):
        capsys.readouterr()
        assert command(monkeypatch, *arguments) == 0
        shown[" ".join(arguments[:2])] = capsys.readouterr().out
    assert all(loss in text for loss in losses[:1] for text in shown.values()), shown
    assert "test loss, looked at once, at the end" in shown[f"report {one}"]
    assert "test/loss" in shown[f"report {folder}"]
    assert "minimize test/loss at the end" in shown[f"best {folder}"]
    assert "best epoch" not in shown[f"best {folder}"]
    listed = [line for line in shown[f"ls {folder}"].splitlines() if "finished" in line]
    assert [next(x for x in losses if x in line) for line in listed] == sorted(losses, key=float)
    head, *rows = (Path(folder) / "report" / "cells.tex").read_text().splitlines()
    assert "test/loss" in "".join(rows)
    assert head == "% val/ at the last epoch"


def test_a_test_chooses_nothing_by_itself(capsys: pytest.CaptureFixture[str]):
    for setting in ("select=best test/loss", "early_stopping={metric: test/loss, patience: 1}"):
        assert train_here(TEST, setting) == 2
        assert "validation logs val/loss, val/accuracy, val/f1" in " ".join(
            capsys.readouterr().err.split()
        )
    save_rows("empty.jsonl", 0)
    assert train_here("data.test=empty.jsonl") == 2
    assert "data.test=empty.jsonl: empty.jsonl is empty" in capsys.readouterr().err
    assert not Path("runs").exists()
