"""Adapters cut to lower ranks after training, and trained further.

Independent truth: training, SVD and further training in plain torch, on the same batches; and the
same run without a cut, by itself, or never interrupted.

Run: make test ARGS=tests/training/test_heal.py
"""

import json
from functools import partial
from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_lab import adapters
from lora_lab.data.shift import Shift
from lora_lab.models.linear import Linear
from lora_lab.runs import Run
from lora_lab.training.heal import HealingModule
from lora_lab.training.modules import DivergedError
from tests.conftest import Lab, command, only_run
from tests.packing.test_packing import check_same_runs, train_in_pack, train_one_by_one
from tests.training.test_resume import assert_equal, ctrl_c, kill, steps

QUICK = ("spectra.truncation=none", "spectra.against_base=false")
CUT = ("adapter.r=4", "adapter.cut=[1,2]", "adapter.heal=11", *QUICK)


def rates(lr: float, count: int) -> list[float]:
    """The learning rate of each of `count` steps: a cosine after a warm-up of a fifth of them."""
    warmup = 0.2 * count
    fall = [(1 + cos(pi * (i - warmup) / (count - warmup))) / 2 for i in range(count)]
    return [lr * (i / warmup if i < warmup else fall[i]) for i in range(count)]


# lora: ΔW = s B A. pissa: ΔW = s (B A − B₀ A₀), of rank 8 and neither factor zero at first.
# lora_plus: B learns 16 times as fast, which the cut must not exchange with A.
@pytest.mark.parametrize("adapter", ["lora", "pissa", "lora_plus"])
def test_the_numbers_are_those_of_a_plain_loop(lab: Lab, adapter: str):
    settings = ("trainer.precision=64-true", "optimizer.schedule=cosine", "optimizer.warmup=0.2")
    settings += ("adapter.alpha=6", f"adapter={adapter}", "optimizer.lr=0.02", "select=last")
    # 8 batches an epoch: training ends within the fourth, and healing within the fifth.
    assert lab("shift", *CUT, *settings, "trainer.max_steps=27") == 0
    run = only_run()

    data = Shift("adapt", 256, 12, 9, 1.0, 32, 0)
    data.setup("fit")
    x, y = (t.double() for t in data.train.tensors)  # pyright: ignore
    loader, batches = data.train_dataloader(), []
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        batches += list(loader.sampler)
    model = Linear(12, 9)
    model.load_state_dict(load_file(next(Path("bases").glob("*.safetensors"))))
    W = model.linear.weight.detach().double()
    init = "pissa" if adapter == "pissa" else "kaiming"
    adapters.attach(model, r=4, alpha=6, init=init)
    model.double()
    first = adapters.attached(model)["linear"]
    A, B = first.A.detach().clone(), first.B.detach().clone()
    subtracted = B @ A
    s, ratio = 6 / 4, 16 if adapter == "lora_plus" else 1

    def fit(A: Tensor, B: Tensor, less: Tensor | float, rows: list[Tensor]) -> tuple[Tensor, float]:
        """Trains A and B on batches of these rows; ΔW after it, and the loss on all rows."""
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        optimizer = torch.optim.Adam([{"params": [A]}, {"params": [B]}])
        for batch, lr in zip(rows, rates(0.02, len(rows)), strict=True):
            for group, factor in zip(optimizer.param_groups, (1, ratio), strict=True):
                group["lr"] = factor * lr
            optimizer.zero_grad()
            loss(s * (B @ A - less), batch).backward()
            optimizer.step()
        delta = (s * (B @ A - less)).detach()
        return delta, loss(delta, slice(None)).item()

    def loss(delta: Tensor, batch: Tensor | slice) -> Tensor:
        return torch.nn.functional.mse_loss(x[batch] @ (W + delta).T, y[batch])

    delta, trained = fit(A, B, subtracted, batches[:27])
    assert run.last("val/loss") == pytest.approx(trained, rel=1e-9)
    U, S, Vh = torch.linalg.svd(delta)
    for k in (1, 2):
        root = (S[:k] / s).sqrt()
        A, B = root[:, None] * Vh[:k], U[:, :k] * root
        assert run.last(f"cut/{k}/val/loss") == pytest.approx(
            loss(s * B @ A, slice(None)).item(), rel=1e-9
        )
        healed, value = fit(A, B, 0.0, batches[27:38])
        assert run.last(f"healed/{k}/val/loss") == pytest.approx(value, rel=1e-8)
        (last,) = [row for row in run.rows() if f"healed/{k}/val/loss" in row]
        assert (last["step"], last["epoch"]) == (38, 38 / 8)
        for folder, wanted in (("cut", s * B @ A), ("healed", healed)):
            adapters.detach(model)
            adapters.load(model, run.path / folder / str(k))
            torch.testing.assert_close(adapters.deltas(model)["linear"], wanted)
            assert adapters.attached(model)["linear"].r == k


def test_the_run_stays_what_it_is_and_others_read_the_smaller_adapters(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Biases train too; one site has a lower rank, and its factors stay as they are."""
    settings = ("adapter.rank_pattern={head: 1}", "also_train=[bias]", "adapter.r=4", *QUICK)
    assert lab("digits", *settings, "runs_dir=alone") == 0
    assert lab("digits", *settings, "adapter.cut=[2]", "adapter.heal=5") == 0
    alone, run = only_run("alone"), only_run()
    rows = [row for row in run.rows() if not any(k.startswith(("cut", "healed")) for k in row)]
    assert rows == alone.rows()
    tensors = {name: load_file(run.path / name / "adapter.safetensors") for name in FOLDERS}
    before = load_file(alone.path / "adapter" / "adapter.safetensors")
    assert all(torch.equal(tensors["adapter"][key], before[key]) for key in before)
    ranks = {key: len(t) for key, t in tensors["healed/2"].items() if key.endswith(".A")}
    assert ranks == {key: min(2, len(t)) for key, t in before.items() if key.endswith(".A")}
    assert all(torch.equal(tensors["cut/2"][key], before[key]) for key in ("head.A", "head.bias"))
    assert not torch.equal(tensors["healed/2"]["head.bias"], before["head.bias"])
    assert run.last("healed/2/val/accuracy") is not None
    size = sum(t.numel() for t in tensors["healed/2"].values())
    assert run.last("healed/2/parameters/trainable") == size
    assert {f"{name}/adapter.safetensors" for name in FOLDERS} <= {*run.status["files"]}

    healed = str(run.path / "healed/2")
    assert command(monkeypatch, "export", healed, "exported") == 0
    about = json.loads(Path("exported/adapter_config.json").read_text())
    assert {about["r"], *about["rank_pattern"].values()} == {1, 2}
    assert command(monkeypatch, "spectra", healed, "--to", "spectra") == 0
    capsys.readouterr()
    assert command(monkeypatch, "export", str(run.path / "cut/7"), "other") != 0
    assert "has no cut/7; smaller adapters in it: cut/2, healed/2" in capsys.readouterr().err
    file = run.path / "cut/2/adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut/2/adapter.safetensors is cut" in Run(run.path).status["error"]


FOLDERS = ("adapter", "cut/2", "healed/2")


@pytest.mark.parametrize("by", ["ctrl_c", pytest.param("SIGKILL", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_stopped_in_healing_it_goes_on_bit_for_bit(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, by: str
):
    settings = (*CUT, "adapter.dropout=0.3")
    stop = partial(ctrl_c, lab, monkeypatch) if by == "ctrl_c" else partial(kill, by=by)
    stop("lora_lab.training.modules:BaseModule.training_step", *settings, call=32 + 32 + 11 + 7)
    run = only_run()
    assert run.status["state"] == "interrupted"
    taken = steps(monkeypatch)
    assert lab("shift", *settings) == 0
    assert taken == ["healed/2/"] * 11 + ["healed/1/"] * 11
    assert lab("shift", *settings, "runs_dir=alone") == 0
    assert_equal(run, only_run("alone"))


def test_in_a_pack_each_run_gives_what_it_gives_by_itself():
    points = [["adapter.r=2"], ["adapter.r=4", "adapter.cut=[2,1]", "adapter.heal=11", "seed=1"]]
    settings = ["trainer.precision=64-true", *QUICK]
    runs = train_in_pack("shift", points, *settings)
    check_same_runs(runs, train_one_by_one("shift", points, *settings), 1e-10)
    assert runs[1].last("healed/2/val/loss") is not None


def test_a_heal_that_diverges_is_said_and_the_others_have_numbers(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real = HealingModule.on_train_start

    def start(module: HealingModule) -> None:
        if module.prefix == "healed/2/":
            raise DivergedError("healed/2/train/loss became nan")
        real(module)

    monkeypatch.setattr(HealingModule, "on_train_start", start)
    assert lab("shift", *CUT) == 0
    run = only_run()
    assert "healed/2/train/loss became nan" in caplog.text
    assert run.last("healed/2/val/loss") is None
    assert run.last("healed/1/val/loss") is not None
    assert not (run.path / "healed/2").exists()


FORMS = ("loha", "lokr", "vera", "adalora", "lora_xs", "lora_fa", "mica", "eva", "lora_ga")


@pytest.mark.parametrize(
    "adapter", [pytest.param(a, marks=[pytest.mark.slow] if a != "loha" else []) for a in FORMS]
)
def test_each_form_is_cut_as_its_truncation_curve_says(lab: Lab, adapter: str):
    """The curve is computed from the SVD of ΔW, without the files that the cut is made from.

    LoHa's ΔW at r = 3 has rank 9, so it can be cut to 4.
    """
    ranks = (1, 4) if adapter == "loha" else (1, 2)
    settings = (f"adapter={adapter}", "adapter.r=3", f"adapter.cut={[*ranks]}", "adapter.heal=3")
    assert lab("digits", *settings, "spectra.truncation=model", "spectra.against_base=false") == 0
    run = only_run()
    with np.load(run.path / "spectra.npz") as arrays:
        curve = dict(zip(arrays["truncation/ranks"], arrays["truncation/loss"], strict=True))
    for k in ranks:
        assert run.last(f"cut/{k}/val/loss") == pytest.approx(curve[k], rel=1e-4)
        assert run.last(f"healed/{k}/val/loss") is not None
