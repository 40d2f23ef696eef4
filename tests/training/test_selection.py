"""The best validation's weights as a run's result, and training that ends early.

Independent truth: the rows of the same run without either, and a training of as many steps.

Run: make test ARGS=tests/training/test_selection.py
"""

import json
from math import nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab import adapters
from lora_lab.config.schema import EarlyStopping, Optimizer
from lora_lab.runs import Run, find_runs
from lora_lab.training import finish
from lora_lab.training.callbacks.selection import Selection
from lora_lab.training.lora_module import LoRAModule
from tests.conftest import Lab

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01, "schedule": "constant", "warmup": 0.0}


def module() -> LoRAModule:
    model = nn.Sequential(nn.Linear(4, 3))
    adapters.attach(model, r=2, alpha=2)
    return LoRAModule(model, "classification", 3, Optimizer.model_validate(ADAM))


# metric, min_delta, patience, values of a metric by validation: the best one's index, and after
# how many validations training ends
CASES = {
    "loss": ("val/loss", 0.0, 2, [3.0, 2.0, 1.0, 1.0, 1.5, 0.0], 2, 5),
    "accuracy": ("val/accuracy", 0.0, 1, [0.1, 0.4, 0.4, 0.9], 1, 3),
    "too little better": ("val/loss", 0.5, 2, [3.0, 2.8, 2.6, 1.0], 0, 3),
    "NaN": ("val/matthews", 0.0, 2, [nan, 0.1, nan, nan], 1, 4),
    "never": ("val/loss", 0.0, 3, [3.0, 2.0, 2.5, 1.0], 3, None),
}


@pytest.mark.parametrize("stop_at", [None, 2], ids=["at once", "resumed"])
@pytest.mark.parametrize("case", CASES)
def test_which_is_best_and_when_it_ends(case: str, stop_at: int | None):
    metric, min_delta, patience, values, best, end = CASES[case]
    trained, weight = module(), []
    stopping = EarlyStopping(metric=metric, patience=patience, min_delta=min_delta)
    select = "last" if min_delta else f"best {metric}"
    selection, ended = Selection(select, stopping), None
    for i, value in enumerate(values):
        adapter = adapters.attached(trained.model)["0"]
        nn.init.constant_(adapter.B, i + 1)
        weight.append(adapter.B.detach().clone())
        if i == stop_at:  # goes on from what torch.save wrote
            torch.save(selection.state_dict(), "state")
            selection = Selection(select, stopping)
            selection.load_state_dict(torch.load("state", weights_only=True))
        selection.observe(trained, {metric: value}, step=10.0 * i, epoch=i / 2)
        if selection.ends_training:
            ended = i + 1
            break
    assert ended == end
    row = {f"best/{metric}": values[best], "best/step": 10.0 * best, "best/epoch": best / 2}
    assert selection.best_row() == row
    if not min_delta:
        trained.model.load_state_dict(selection.weights, strict=False)
        assert torch.equal(adapters.attached(trained.model)["0"].B, weight[best])


RUN = {
    "lora": ("adapter=lora_fa", "optimizer=sgd", "optimizer.lr=40"),
    "full": ("adapter=full", "optimizer=sgd", "optimizer.lr=8"),
}
"""Rates that are too high: the first epoch is the best."""

EPOCHS = ("trainer.max_epochs=4", "trainer.check_val_every_n_epoch=1")


def by_root(root: str) -> Run:
    (run,) = find_runs(Path(root))
    return run


@pytest.mark.parametrize("adapter", RUN)
def test_the_selected_weights_are_the_result(lab: Lab, adapter: str):
    settings = (*RUN[adapter], *EPOCHS)
    assert lab("shift", *settings, "runs_dir=last") == 0
    assert lab("shift", *settings, "select=best val/loss", "runs_dir=best") == 0
    last, best = by_root("last"), by_root("best")
    losses = {row["step"]: row["val/loss"] for row in last.rows() if "val/loss" in row}
    step = min((s for s in losses if s), key=losses.__getitem__)
    assert 0 < step < max(losses)  # neither the base nor the last
    assert (best.last("best/step"), best.last("best/val/loss")) == (step, losses[step])
    assert best.last("val/loss") == losses[step]
    assert last.last("val/loss") == losses[max(losses)]
    assert last.last("best/step") is None
    # The last weights are those of the run without a selection; the others those of a shorter one.
    folder, file = ("adapter", "adapter.safetensors") if adapter == "lora" else ("model",) * 2
    file = file if adapter == "lora" else "model.safetensors"
    epochs = f"trainer.max_epochs={step // 8}"
    assert lab("shift", *settings, epochs, "runs_dir=short") == 0
    short = load_file(by_root("short").path / folder / file)
    kept = load_file(best.path / folder / file)
    assert all(torch.equal(kept[key], short[key]) for key in short)
    before = load_file(last.path / folder / file)
    kept = load_file(best.path / f"{folder}_last" / file)
    assert all(torch.equal(kept[key], before[key]) for key in before)
    if adapter == "lora":
        assert best.last("merged/val/loss") == pytest.approx(losses[step], rel=1e-5)


def test_training_ends_early_and_says_so(lab: Lab):
    stopping = "early_stopping={metric: val/loss, patience: 1}"
    assert lab("shift", *RUN["lora"], *EPOCHS, "runs_dir=all") == 0
    assert lab("shift", *RUN["lora"], *EPOCHS, stopping, "runs_dir=some") == 0
    rows = [row["val/loss"] for row in by_root("all").rows() if "val/loss" in row][1:]
    misses, end, best = 0, 0, float("inf")
    while misses < 1 and end < len(rows):
        misses = 0 if rows[end] < best else misses + 1
        best, end = min(best, rows[end]), end + 1
    assert 1 < end < len(rows)
    some = [row["val/loss"] for row in by_root("some").rows() if "val/loss" in row][1:]
    assert some == rows[:end]
    assert by_root("some").last("best/val/loss") == best
    assert json.loads((by_root("some").path / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_training_that_has_ended_early_is_not_gone_on_with(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    settings = (*RUN["lora"], *EPOCHS, "early_stopping={metric: val/loss, patience: 1}")
    assert lab("shift", *settings, "runs_dir=alone") == 0
    with monkeypatch.context() as patch:
        patch.setattr(finish, "_save_trained", lambda *_: interrupt())
        assert lab("shift", *settings, "checkpoint_every=0") == 130
    assert by_root("runs").status["state"] == "interrupted"
    assert lab("shift", *settings) == 0
    assert by_root("runs").rows() == by_root("alone").rows()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "select=best val/acuracy",
            "validation logs val/loss, val/accuracy; nearest: val/accuracy",
        ),
        (
            "early_stopping={metric: val/f1, patience: 2}",
            "early_stopping.metric=val/f1: validation",
        ),
    ],
)
def test_a_metric_that_is_not_logged_is_an_error(
    lab: Lab, setting: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert lab("digits", setting) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_labels_that_are_no_classes_cannot_be_smoothed(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", "label_smoothing=0.1") == 2
    assert "label_smoothing=0.1: the task has no classes" in capsys.readouterr().err
