"""What a run forgets of what its base knew.

Independent truth: a plain loop in torch over the base phase's validation rows with W + ΔW, merged
by hand; the same run by itself. That a stopped run goes on bit for bit is in test_resume.py, whose
runs measure what they forget.

Run: make test ARGS=tests/training/test_forgetting.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, relu

from lora_lab import adapters
from lora_lab.data.digits import Digits
from lora_lab.models.mlp import MLP
from lora_lab.runs import Run
from tests.conftest import Lab, only_run
from tests.packing.test_packing import check_same_runs, train_in_pack, train_one_by_one

QUICK = ("spectra.against_base=false", "spectra.truncation=none")
CURVE = ("spectra.against_base=false", "spectra.truncation=model")
FC1 = "target.linear.match=*fc1"
EACH_EPOCH = "trainer.check_val_every_n_epoch=1"


def forgotten(run: Run, folder: str = "adapter") -> tuple[float, float]:
    """The loss and the accuracy on the digits 0 to 4, by a plain loop over the merged weights."""
    weights = load_file(next(Path("bases").glob("*.safetensors")))
    if (run.path / folder / "adapter.safetensors").exists():
        model = MLP(64, 10, [16])
        model.load_state_dict(weights)
        adapters.load(model, run.path / folder)
        for site, delta in adapters.deltas(model).items():
            weights[f"{site}.weight"] = weights[f"{site}.weight"] + delta
        for key, value in adapters.also_trained(model).items():
            weights[key] = value.value.detach()
    elif (run.path / "model").exists():
        weights = load_file(run.path / "model" / "model.safetensors")
    return of_weights(weights)


def of_weights(weights: dict[str, torch.Tensor]) -> tuple[float, float]:
    data = Digits("base", 64, 0)
    data.setup("fit")
    x, y = data.val.tensors
    hidden = relu(x @ weights["body.fc1.weight"].T + weights["body.fc1.bias"])
    logits = hidden @ weights["head.weight"].T + weights["head.bias"]
    accuracy = (logits.argmax(1) == y).float().mean().item()
    return cross_entropy(logits.double(), y).item(), accuracy


# name → settings
RUNS = {
    "lora": ("adapter.r=3", "adapter.cut=[1]", "adapter.heal=5", *CURVE),
    "pissa, a head in full": ("adapter=pissa", "adapter.r=2", "also_train=[head]", FC1, *QUICK),
    "full": ("adapter=full", *CURVE),
    "none": ("adapter=none",),
    "the best": ("adapter.r=2", "optimizer.lr=0.3", "select=best val/loss", *QUICK),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_is_that_of_a_plain_loop_over_the_merged_weights(lab: Lab, name: str):
    settings = RUNS[name]
    assert lab("digits", *settings, EACH_EPOCH, "data.batch_size=64", "data.seed=0") == 0
    run = only_run()
    before = of_weights(load_file(next(Path("bases").glob("*.safetensors"))))
    rows = [row for row in run.rows() if "forget/loss" in row]
    assert rows[0]["step"] == 0
    assert (rows[0]["forget/loss"], rows[0]["forget/accuracy"]) == pytest.approx(before, rel=1e-5)
    after = forgotten(run)
    assert (run.last("forget/loss"), run.last("forget/accuracy")) == pytest.approx(after, rel=1e-5)
    assert run.last("forget/increase") == pytest.approx(after[0] - before[0], rel=1e-3, abs=1e-6)
    assert (run.last("forget/increase") == 0) == (name == "none")
    if name == "lora":
        assert run.last("merged/forget/loss") == pytest.approx(after[0], rel=1e-5)
        for folder in ("cut/1", "healed/1"):
            values = [run.last(f"{folder}/forget/{metric}") for metric in ("loss", "accuracy")]
            assert values == pytest.approx(forgotten(run, folder), rel=1e-5)
    if CURVE[1] in settings:
        with np.load(run.path / "spectra.npz") as arrays:
            ranks, losses = (arrays[f"truncation/{key}"] for key in ("ranks", "forget_loss"))
            curve = dict(zip(ranks, losses, strict=True))
        assert curve[max(curve)] == pytest.approx(after[0], rel=1e-4)
        if name == "lora":  # of a full fine-tuning, nothing cuts what the biases have learned
            assert curve[0] == pytest.approx(before[0], rel=1e-5)
            assert curve[1] == pytest.approx(forgotten(run, "cut/1")[0], rel=1e-5)


@pytest.mark.slow
def test_measuring_it_moves_no_number_of_the_training(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    settings = ("adapter.dropout=0.3", *QUICK)
    assert lab("digits", *settings) == 0
    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.training.plan.known_data", lambda *_: None)
        assert lab("digits", *settings, "runs_dir=without") == 0
    run, without = only_run(), only_run("without")
    rows = [{k: v for k, v in row.items() if "forget" not in k} for row in run.rows()]
    assert [row for row in rows if set(row) != {"step"}] == without.rows()
    files = [r.path / "adapter" / "adapter.safetensors" for r in (run, without)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_in_a_pack_each_run_forgets_what_it_forgets_by_itself():
    points = [["adapter.r=2"], ["adapter.r=4", "seed=1", "adapter.cut=[1]"]]
    settings = ["trainer.precision=64-true", *CURVE, EACH_EPOCH]
    runs = train_in_pack("digits", points, *settings)
    check_same_runs(runs, train_one_by_one("digits", points, *settings), 1e-10)
    assert [len(run.curve("forget/accuracy")) for run in runs] == [3, 3]
    curves = [np.load(r.path / "spectra.npz")["truncation/forget_loss"] for r in runs]
    assert [len(curve) for curve in curves] == [3, 5]
