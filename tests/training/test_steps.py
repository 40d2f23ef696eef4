"""Training counted in optimizer steps: its length, validation, rates and rows between epochs.

Independent truth: steps counted by hand; an epoch of `shift` has 8 batches of 32 rows.

Run: make test ARGS=tests/training/test_steps.py
"""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress, TaskID

from lora_lab.training.callbacks import progress
from tests.conftest import Lab, only_run, quick

EVERY_EPOCH = "trainer.check_val_every_n_epoch=1"

# settings, and the steps and epochs of each validation
CASES = {
    "within an epoch": (("trainer.max_steps=5",), {0: 0, 5: 0.625}),
    "longer than max_epochs": (
        ("trainer.max_steps=20", "trainer.max_epochs=1", EVERY_EPOCH),
        {0: 0, 8: 1, 16: 2, 20: 2.5},
    ),
    "the last epoch too": (("trainer.max_epochs=3",), {0: 0, 16: 2, 24: 3}),
    "across epochs": (
        ("trainer.val_check_interval=3", "trainer.max_epochs=2"),
        {0: 0, 3: 0.375, 6: 0.75, 9: 1.125, 12: 1.5, 15: 1.875, 16: 2},
    ),
    "a share of an epoch": (
        ("trainer.val_check_interval=0.5", "trainer.max_epochs=1"),
        {0: 0, 4: 0.5, 8: 1},
    ),
    # 8 batches by 3: steps after batches 3, 6 and 8 of each epoch
    "accumulated": (
        (
            *("trainer.val_check_interval=2", "trainer.max_epochs=2"),
            "trainer.accumulate_grad_batches=3",
        ),
        {0: 0, 2: 0.75, 4: 1.375, 6: 2},
    ),
    "accumulated to a number of steps": (
        ("trainer.max_steps=4", "trainer.accumulate_grad_batches=3"),
        {0: 0, 4: 1.375},
    ),
}


@pytest.mark.parametrize("case", quick(CASES, ("across epochs", "accumulated")))
def test_when_it_is_validated(lab: Lab, case: str):
    settings, expected = CASES[case]
    schedule = ("optimizer.schedule=linear", "optimizer.warmup=2", "trainer.log_every_n_steps=1")
    assert lab("shift", *settings, *schedule) == 0
    run = only_run()
    found = {r["step"]: r["epoch"] for r in run.rows() if "val/loss" in r}
    assert found == expected
    assert run.last("val/loss") == pytest.approx(run.last("merged/val/loss"), rel=1e-5)
    # The rate falls from its highest at step 3 toward 0, which it would reach after the last step.
    last = max(expected)
    rates = {row["step"]: row["lr"] for row in run.rows() if "lr" in row}
    by_hand = [0, 0.5, *(1 - i / (last - 2) for i in range(last - 2))]
    assert list(rates) == list(range(1, last + 1))
    assert list(rates.values()) == pytest.approx([0.05 * factor for factor in by_hand])
    assert len(list(Path("bases").glob("*.safetensors"))) == 1
    assert max(row["epoch"] for row in run.rows() if "base/val/loss" in row) == 4


def test_losses_between_epochs_are_means_since_the_row_before(lab: Lab):
    assert lab("shift", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "runs_dir=one") == 0
    assert (
        lab("shift", "trainer.max_epochs=2", "trainer.log_every_n_steps=3", "runs_dir=three") == 0
    )
    rows, thirds = only_run("one").rows(), only_run("three").rows()
    losses = [row["train/loss_step"] for row in rows if "lr" in row]
    means = {row["step"]: row["train/loss_step"] for row in thirds if "lr" in row}
    assert means == {s: pytest.approx(sum(losses[s - 3 : s]) / 3) for s in (3, 6, 9, 12, 15)}
    epochs = [row["train/loss"] for row in rows if "train/loss" in row]
    assert epochs == pytest.approx([sum(losses[:8]) / 8, sum(losses[8:]) / 8], rel=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        *("trainer.max_steps=0", "trainer.val_check_interval=2.5", "trainer.val_check_interval=0"),
        *("trainer.log_every_n_steps=0", "trainer.accumulate_grad_batches=0"),
    ],
)
def test_numbers_that_mean_nothing(lab: Lab, setting: str, capsys: pytest.CaptureFixture[str]):
    assert lab("shift", setting) == 2
    assert f"config error: {setting}: must be " in capsys.readouterr().err


def test_one_base_for_all_lengths(lab: Lab):
    for i, settings in enumerate((("trainer.max_steps=2",), ("trainer.val_check_interval=5",))):
        assert lab("shift", *settings, f"runs_dir=runs{i}") == 0
    assert len(list(Path("bases").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("settings", "places"),
    [((), ["epoch 0/4", "epoch 4/4"]), (("trainer.max_steps=20",), ["step 16/20", "step 20/20"])],
)
def test_the_bar_and_the_lines_say_how_far_it_is(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], places: list[str]
):
    shown = []
    update = Progress.update

    def noted(bar: Progress, task: TaskID, **fields: Any) -> None:
        shown.extend([fields] if "place" in fields else [])  # others are of the analysis
        update(bar, task, **fields)

    monkeypatch.setattr(Progress, "update", noted)
    monkeypatch.setattr(progress, "QUIET", 0)
    assert lab("shift", *settings) == 0
    text = (only_run().path / "log.txt").read_text()
    assert all(f"lora {place}  val/loss" in text for place in places)
    assert re.search(r"lora \w+ 8?1?/.*  train/loss [\d.]+  [\d,]+ rows/s", text)
    assert shown[-1]["place"] == places[-1]
    assert shown[-1]["completed"] == float(places[-1].partition("/")[2])
    assert re.fullmatch(r"[\d,]+ rows/s", shown[-1]["speed"])
