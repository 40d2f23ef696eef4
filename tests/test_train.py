"""`lora-lab train` end to end, at a small size: its files, its errors, and how it goes on.

Independent truth: the same run as a plain torch loop (losses, ΔW, the step of a divergence), SVDs
of weights read back from the files, and runs repeated bit for bit.

Run: make test ARGS=tests/test_train.py
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab import adapters, train
from lora_lab.console import print_error, print_labelled
from lora_lab.data.shift import Shift
from lora_lab.exit_codes import end_on_hangup
from lora_lab.models.linear import Linear
from lora_lab.runs import Run, find_runs
from lora_lab.sweeps import multirun
from lora_lab.training import devices, run_record
from tests.conftest import SMALL, Lab, only_run


def test_a_run_writes_all_its_files(lab: Lab, capsys: pytest.CaptureFixture[str]):
    assert lab("shift", "figures=true") == 0
    run = only_run()
    assert run.status["state"] == "finished"
    names = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*.*")}
    assert names >= {
        *("config.yaml", "status.json", "metrics.jsonl", "spectra.npz", "env.json", "log.txt"),
        *("adapter/adapter.json", "adapter/adapter.safetensors"),
        *("report/table.md", "report/curves.csv", "report/facts.csv"),
        *(
            f"report/{figure}.{kind}"
            for figure in ("loss", "spectrum", "delta", "phi", "truncation")
            for kind in ("png", "pdf")
        ),
    }
    assert list(run.curve("base/val/loss")) == [2, 4]
    assert list(run.curve("val/loss")) == [0, 2, 4]
    assert list(run.curve("train/loss")) == [1, 2, 3, 4]
    assert list(run.curve("spectra/linear/sigma_1")) == [0, 2, 4]
    assert run.last("parameters/trainable") == 12 + 9
    assert run.last("parameters/base") == 12 * 9
    # 256 rows in batches of 32: 8 steps an epoch.
    assert all(row["step"] == 8 * row["epoch"] for row in run.rows() if "epoch" in row)
    printed = capsys.readouterr().out
    assert str(run.path) in printed.replace("\n", "")
    assert "21 of 108" in printed


def test_the_numbers_are_those_of_a_plain_loop(lab: Lab):
    """The same run in plain torch: same draws, same batches, same losses and ΔW."""
    assert lab("shift", "adapter.r=2", "adapter.alpha=3", "seed=5", "data.seed=7") == 0
    run = only_run()

    def data(phase: str) -> Shift:
        drawn = Shift(phase, 256, 12, 9, 1.0, 32, 7)  # pyright: ignore
        drawn.setup("fit")
        return drawn

    def loss_on(everything: Shift) -> float:
        with torch.no_grad():
            x, y = everything.train.tensors  # pyright: ignore
            return torch.nn.functional.mse_loss(forward(x), y).item()

    def fit(parameters: list[torch.Tensor], learned: Shift) -> list[float]:
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        x, y = learned.train.tensors  # pyright: ignore
        curve, loader = [], learned.train_dataloader()
        for epoch in range(4):
            loader.sampler.set_epoch(epoch)  # pyright: ignore
            means.append(0.0)
            for rows in loader.sampler:
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(forward(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                means[-1] += loss.item() / len(loader.sampler)  # pyright: ignore
            curve.append(loss_on(learned))
        return curve[1::2]

    means: list[float] = []
    torch.manual_seed(0)
    W = Linear(12, 9).linear.weight.detach().requires_grad_()
    forward = lambda x: x @ W.T  # noqa: E731
    base = fit([W], data("base"))
    np.testing.assert_allclose(list(run.curve("base/val/loss").values()), base, rtol=1e-5)

    frozen = W.detach().clone()
    model = Linear(12, 9)
    adapters.attach(model, r=2, alpha=3, init="gaussian", seed=5)
    adapter = adapters.attached(model)["linear"]
    A, B = adapter.A.detach().requires_grad_(), adapter.B.detach().requires_grad_()
    forward = lambda x: x @ (frozen + 3 / 2 * B @ A).T  # noqa: E731
    before = loss_on(data("adapt"))
    adapted = [before, *fit([A, B], data("adapt"))]
    np.testing.assert_allclose(list(run.curve("val/loss").values()), adapted, rtol=1e-4)
    assert run.last("merged/val/loss") == pytest.approx(adapted[-1], rel=1e-4)

    logged = [*run.curve("base/train/loss").values(), *run.curve("train/loss").values()]
    np.testing.assert_allclose(logged, means, rtol=1e-4)

    delta = (3 / 2 * B @ A).detach().double()
    with np.load(run.path / "spectra.npz") as arrays:
        sigma = arrays["linear/singular_values"][-1]
        np.testing.assert_allclose(arrays["linear/delta"], delta, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(sigma, torch.linalg.svdvals(delta)[:2], rtol=1e-3)
    base_model: Any = Linear(12, 9)
    base_model.load_state_dict({"linear.weight": load_base(Path("bases"))["linear.weight"]})
    adapters.load(base_model, run.path / "adapter")
    loaded = adapters.deltas(base_model)["linear"].double()
    torch.testing.assert_close(loaded, delta, rtol=1e-3, atol=1e-5)


def load_base(bases: Path) -> dict[str, torch.Tensor]:
    (path,) = bases.glob("*.safetensors")
    return load_file(path)


def test_again_shows_the_finished_run_and_overwrite_repeats_it_bit_for_bit(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    lab("shift", "adapter.dropout=0.3")
    run = only_run()
    metrics = (run.path / "metrics.jsonl").read_bytes()
    started = run.status["started"]
    capsys.readouterr()
    assert lab("shift", "adapter.dropout=0.3") == 0
    assert "Finished before, not repeated" in capsys.readouterr().out
    assert run.status["started"] == started
    assert lab("shift", "adapter.dropout=0.3", "overwrite=true") == 0
    assert run.status["started"] > started
    assert (run.path / "metrics.jsonl").read_bytes() == metrics
    assert "base found, not trained again" in (run.path / "log.txt").read_text()
    # Nor does it matter that the base was at hand.
    shutil.rmtree("bases")
    assert lab("shift", "adapter.dropout=0.3", "overwrite=true") == 0
    assert (run.path / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_a_later_multirun_freezes_no_garbage_of_an_earlier_one(lab: Lab):
    """A multirun's jobs are in one process by default."""
    assert lab("shift", "-m", "seed=0,1") == 0
    frozen = gc.get_freeze_count()
    assert lab("shift", "-m", "seed=2,3") == 0
    assert gc.get_freeze_count() <= frozen


def test_runs_of_one_cell_share_base_and_data_and_differ_in_their_adapters(lab: Lab):
    lab("shift", "seed=0")
    lab("shift", "seed=1")
    one, two = find_runs(Path("runs"))
    assert one.status["cell"] == two.status["cell"]
    assert one.curve("base/train/loss") == two.curve("base/train/loss")
    assert one.curve("val/loss")[0] == two.curve("val/loss")[0]
    assert one.curve("val/loss")[4] != two.curve("val/loss")[4]
    assert len(list(Path("bases").glob("*.safetensors"))) == 1


def test_full_fine_tuning_measures_W_minus_W0(lab: Lab):
    assert lab("shift", "adapter=full") == 0
    run = only_run()
    assert run.last("parameters/trainable") == 108
    after = load_file(run.path / "model" / "model.safetensors")["linear.weight"]
    delta = (after - load_base(Path("bases"))["linear.weight"]).double()
    with np.load(run.path / "spectra.npz") as arrays:
        sigma = arrays["linear/singular_values"]
    assert sigma.shape == (3, 9)
    np.testing.assert_allclose(sigma[0], 0)
    np.testing.assert_allclose(sigma[-1], torch.linalg.svdvals(delta), rtol=1e-5)


def test_no_adapter_evaluates_the_base(lab: Lab):
    assert lab("shift", "adapter=none") == 0
    run = only_run()
    assert list(run.curve("val/loss")) == [0]
    assert run.last("train/loss") is None
    assert run.last("parameters/trainable") == 0


def test_a_base_from_a_checkpoint(lab: Lab):
    torch.manual_seed(3)
    model = Linear(12, 9)
    save_file(model.state_dict(), "mine.safetensors")
    assert lab("shift", "base=checkpoint", "base.path=mine.safetensors") == 0
    run = only_run()
    data = Shift("adapt", 256, 12, 9, 1.0, 32, 0)
    data.setup("fit")
    x, y = data.train.tensors  # pyright: ignore
    before = torch.nn.functional.mse_loss(model(x), y).item()
    assert run.curve("val/loss")[0] == pytest.approx(before, rel=1e-6)
    assert run.last("base/val/loss") is None
    assert not list(Path("bases").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("adapter.r=0", "adapter.r=0: must be greater than 0"),
        ("adapter.r=-3", "adapter.r=-3: must be greater than 0"),
        (
            "adapter.r=2000",
            "adapter.r=2000 exceeds the rank of 'linear' (weight 9 × 12): at most 9",
        ),
        ("adapter.r=abc", "adapter.r=abc: must be a valid integer"),
        ("adapter.r=", "adapter.r=: must be a valid integer"),
        ("adapter.rr=4", "adapter.rr: there is no such key; nearest: r"),
        (
            "adapter.init=kaming",
            "adapter.init=kaming: must be one of kaiming, gaussian, orthogonal, pissa, olora, svd, "
            "milora, mica, eva, corda, lora_ga; nearest: kaiming",
        ),
        (
            "adapter.scaling=alfa",
            "must be one of alpha/r, alpha/sqrt(r), alpha, none; nearest: alpha",
        ),
        ("adapter.dropout=1.0", "adapter.dropout=1.0: must be less than 1"),
        ("adapter=full adapter.r=3", "adapter.r=3: there is no such key with adapter=full"),
        ("adapter=lorra", "adapter=lorra: there is no such adapter; nearest: lora"),
        ("experiment=shfit", "experiment=shfit: there is no such experiment; nearest: shift"),
        ("target=[linaer]", "target=linaer: there is no such target; nearest: linear"),
        ("target=linaer", "target=linaer: there is no such target; nearest: linear"),
        ("target=lin.*", "target 'lin.*' picks no weight; nearest names: linear"),
        ("target=conv", "target 'conv' picks nothing: the model has no conv weight"),
        (
            "target.linear.r=99",
            "by a target or adapter.rank_pattern, r=99 exceeds the rank of 'linear' (weight",
        ),
        ("target.linear.rr=2", "target.linear.rr=2: there is no such key; nearest: r"),
        ("target.linear.init=pisa", "target.linear.init=pisa: must be one of kaiming, gaussian"),
        ("target.conv.r=2", "target.conv: must say a kind or a match"),
        (
            "adapter.rank_pattern={fc:2}",
            "adapter.rank_pattern: 'fc' fits no site; nearest: linear",
        ),
        (
            "adapter.rank_pattern={linear:0}",
            "adapter.rank_pattern.linear=0: must be greater than 0",
        ),
        (
            "adapter.cut=[2,4] adapter.r=4",
            "adapter.cut=[4, 2]: each must be below 4, the highest rank that ΔW has at a site "
            "('linear'); nearest: 3",
        ),
        ("adapter.cut=1 adapter.r=1", "each must be below 1, the highest rank that ΔW has"),
        ("adapter.cut=3 adapter.r=4 target.linear.r=3", "adapter.cut=[3]: each must be below 3"),
        ("adapter.cut=9 adapter=loha adapter.r=3", "each must be below 9, the highest rank"),
        ("adapter.cut=6 adapter=pissa adapter.r=3", "each must be below 6, the highest rank"),
        ("adapter.cut=[2,2] adapter.r=4", "adapter.cut=[2, 2]: must be different ranks"),
        ("adapter.heal=9", "adapter.heal=9: are steps after a cut, and adapter.cut=[] has no rank"),
        ("adapter=dora adapter.cut=[2] adapter.r=4", "adapter.cut=[2]: not with adapter.dora=true"),
        ("adapter=none adapter.cut=[2]", "adapter.cut: there is no such key"),
        (
            "adapter.r=4 adapter.cut=[2] adapter.heal=9 trainer=fsdp trainer.devices=2 "
            "trainer.accelerator=cpu",
            "adapter.heal=9: not with trainer=fsdp",
        ),
        ("adapter.trains=core", "adapter.trains=core with init=gaussian: B is zero"),
        ("adapter=lora_xs adapter.init=kaiming", "take an init from the weight: pissa, olora, svd"),
        ("adapter.lr_ratio=0", "adapter.lr_ratio=0: must be greater than 0"),
        ("target=[linear,lin*]", "targets 'linear' and 'lin*' both pick 'linear'"),
        ("base=checkpoint", "base.path: must be given"),
        ("base=checkpoint base.path=no.st", "base.path=no.st: no safetensors file to be read"),
        ("base=checkpoint base.path=text", "base.path=text: no safetensors file to be read"),
        ("base=checkpoint base.path=other", "linear.weight: file None, model [9, 12]"),
        ("trainer=gpu", f"this machine has {torch.cuda.device_count()} CUDA GPUs"),
        ("trainer.devices=99", "trainer.devices=99"),
        ("trainer.precision=17", "trainer.precision=17: must be"),
        ("+trainer.max_stepz=3", "Trainer has no such argument; nearest: max_steps"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0: must be greater than 0"),
        ("optimizer=adm", "optimizer=adm: there is no such optimizer; nearest: adam"),
        ("optimizer.lr=0", "optimizer.lr=0: must be greater than 0"),
        ("+optimizer.momentun=1", "optimizer.momentun=1: Adam has no such argument"),
        ("+optimizer.betas=[2,3]", "optimizer: Invalid beta parameter"),
        ("data.batch_size=0", "data.batch_size=0: must be greater than 0"),
        ("data.batch_size=999", "data.batch_size=999 is more than the 256 training rows"),
        ("data.smaples=9", "data.smaples: there is no such key; nearest: samples"),
        ("+data.smaples=9", "data.smaples=9: Shift has no such argument; nearest: samples"),
        ("data._target_=lora_lab.data.Nope", "cannot be imported"),
        ("model._target_=lora_lab.Nope", "model._target_=lora_lab.Nope: cannot be imported"),
        ("model=mlp model.hidden=[a]", "model.hidden=['a']: must be a valid integer"),
        ("adapter.r=[", "adapter.r=["),
        ("name=a/b", "name=a/b: must be of letters, digits"),
        ("seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("seed=99999999999", "seed=99999999999: must be less than 4294967296"),
        ("data.seed=99999999999", "data.seed=99999999999: must be less than 4294967296"),
        ("data.samples=1e3", "data.samples=1000.0: must be a valid integer"),
        ("adapter.alpha=inf", "adapter.alpha=inf: must be a finite number"),
        ("optimizer.lr=inf", "must be a finite number"),
        ("runs_dir=", "runs_dir=: "),
        ("name=übung", "name=übung: cannot be read; settings are KEY=VALUE"),
        ("tracking.project=a/b", "tracking.project=a/b"),
        ("data.shift=nan", "data.shift=nan: must be a finite number"),
        ("runs_dir=text", "text is no directory that can be written to"),
        ("bases_dir=text/b", "text is no directory that can be written to"),
        ("spectra.every_n_epochs=0", "spectra.every_n_epochs=0: must be greater than 0"),
    ],
)
def test_bad_input(lab: Lab, capsys: pytest.CaptureFixture[str], overrides: str, message: str):
    Path("text").write_text("not tensors")
    save_file({"other": torch.zeros(2)}, "other")
    assert lab("shift", *overrides.split()) == 2
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert "Traceback" not in printed.out + printed.err
    assert not Path("runs").exists()
    assert not Path("bases").exists()


def test_a_loss_that_diverges_fails_the_run_and_says_where(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", "optimizer=sgd", "optimizer.lr=1e30") == 1
    run = only_run()
    assert run.status["state"] == "failed"
    assert "DivergedError: train/loss became" in run.status["error"]
    assert "in epoch 1, step " in run.status["error"]
    assert "Traceback" in run.status["traceback"]
    assert "train/loss became" in capsys.readouterr().err


def test_the_step_of_the_divergence_is_the_first(lab: Lab):
    """With clipping off, SGD at this rate overflows float32 at a step that a plain loop finds."""
    lab("shift", "optimizer=sgd", "optimizer.lr=1e7", "adapter.r=1")
    message = only_run().status["error"]
    base = load_base(Path("bases"))["linear.weight"]
    model = Linear(12, 9)
    adapters.attach(model, r=1, alpha=1, init="gaussian")
    adapter = adapters.attached(model)["linear"]
    data = Shift("adapt", 256, 12, 9, 1.0, 32, 0)
    data.setup("fit")
    optimizer = torch.optim.SGD([adapter.A, adapter.B], lr=1e7)
    with torch.no_grad():
        dict(model.named_parameters())["linear.weight"].copy_(base)
    step = 0
    for x, y in data.train_dataloader():
        step += 1
        loss = torch.nn.functional.mse_loss(model(x), y)
        if not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert f"in epoch 1, step {step} of 8" in message


def test_a_failed_run_of_a_multirun_leaves_the_others(lab: Lab, capsys: pytest.CaptureFixture[str]):
    assert lab("shift", "optimizer=sgd", "optimizer.lr=1e30,1e-3", "-m") == 1
    states = {r.config["optimizer"]["lr"]: r.status["state"] for r in find_runs(Path("runs"))}
    assert states == {1e30: "failed", 1e-3: "finished"}
    assert lab("shift", "adapter.r=0,2", "-m") == 2
    assert 2 in {r.config["adapter"].get("r") for r in find_runs(Path("runs"))}


def test_a_multirun_says_how_far_it_is_and_how_each_run_ended(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert lab("shift", "adapter.r=1", "optimizer=sgd", "optimizer.lr=1e-3") == 0
    capsys.readouterr()
    points = ("adapter.r=1,99,2", "optimizer=sgd", "optimizer.lr=1e-3,1e30")
    assert lab("shift", *points, "-m") == 1
    shown = capsys.readouterr().out
    assert "multirun: 6 runs (1 finished, 2 config error)" in shown
    assert "multirun: 2 of 4 done, 2 failed" in shown
    assert shown.count("Finished before") == 1
    rows = [line.split() for line in shown.splitlines() if " optimizer.lr=" in line]
    ended = {tuple(row[:3]) for row in rows if row[0] in ("finished", "failed")}
    assert ended == {
        *(("finished", f"adapter.r={r}", "optimizer.lr=0.001") for r in (1, 2)),
        *(("failed", f"adapter.r={r}", "optimizer.lr=1e+30") for r in (1, 2)),
    }
    assert len([row for row in rows if row[:2] == ["config", "error"]]) == 2
    assert "exceeds the rank of" in shown
    failed = next(r for r in find_runs(Path("runs")) if r.status["state"] == "failed")
    assert "DivergedError: train/loss became" in shown
    assert f"{failed.path.name}/log.txt" in "".join(shown.split())
    assert "LORA_LAB_JOBS" not in os.environ


def test_fail_fast_ends_a_multirun_at_the_first_failure(lab: Lab):
    points = ("optimizer=sgd", "optimizer.lr=1e30,1e-3", "-m")
    assert lab("shift", *points, "sweep.fail_fast=true") == 1
    assert [run.status["state"] for run in find_runs(Path("runs"))] == ["failed"]


def test_a_failed_run_is_tried_again_by_the_same_command(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "save", fail)
        assert lab("shift") == 1
    run = only_run()
    assert "OSError: the disk is gone" in run.status["error"]
    assert lab("shift") == 0
    assert run.status["state"] == "finished"
    assert "error" not in run.status


def start(*overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_lab.train", *SMALL["shift"], "tracking=offline"]
    pipe = subprocess.PIPE

    def accept_ctrl_c() -> None:
        """A shell ignores Ctrl-C on behalf of what it runs in the background, as these tests."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [*command, *overrides], stdout=pipe, stderr=pipe, text=True, preexec_fn=accept_ctrl_c
    )


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.05)


SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGKILL)]
SLOW += [pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]


@pytest.mark.parametrize("signum", [signal.SIGINT, *SLOW])
@pytest.mark.slow
def test_a_stopped_run_is_interrupted_and_runs_again(signum: signal.Signals):
    endless = ["trainer.max_epochs=100000", "trainer.check_val_every_n_epoch=5"]
    process = start(*endless)
    wait_for(lambda: find_runs(Path("runs")) and only_run().curve("val/loss").get(10), process)
    assert only_run().status["state"] == "running"
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGKILL": -9}.get(signum.name, 143)
    run = only_run()
    assert run.status["state"] == "interrupted"
    rows = run.rows()
    assert rows[-1]["step"] >= 80
    (run.path / "metrics.jsonl").write_text('{"epoch": 10, "val/loss": -1}\n')
    again = start(*endless)
    wait_for(lambda: run.curve("val/loss").get(10, -1) > 0, again)
    assert run.status["state"] == "running"
    first = run.rows()
    assert first[: len(rows)] == rows[: len(first)]
    again.kill()
    again.communicate()


def test_the_same_run_twice_at_once_waits_for_the_first(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert lab("shift") == 0
    run, settings = only_run(), [*SMALL["shift"], "tracking=off", "published=null"]
    plan = multirun.plan_jobs([settings])[0].plan
    assert plan is not None
    held, waited_for = threading.Event(), threading.Event()
    wait = run_record.wait_until_free

    def wait_until_free(run: Run) -> Run:
        waited_for.set()
        return wait(run)

    for module in (devices, run_record):
        monkeypatch.setattr(module, "wait_until_free", wait_until_free)

    def hold() -> None:
        """The lock of the run in other hands, as that of another command."""
        with FileLock(run.path / "lock"):
            held.set()
            waited_for.wait(60)

    for again in (lambda: lab("shift"), lambda: train._run_pack([plan])):
        held.clear()
        waited_for.clear()
        other = threading.Thread(target=hold)
        other.start()
        held.wait()
        assert not again()
        assert not other.is_alive()
        printed = " ".join(capsys.readouterr().out.split())
        assert f"waiting: {run.path} is being run by another process" in printed
        assert only_run().finished


def test_a_closed_terminal_is_a_sigterm_unless_nohup_has_it_ignored():
    before = {s: signal.getsignal(s) for s in (signal.SIGHUP, signal.SIGTERM)}
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    for handler, expected in ((signal.SIG_DFL, [signal.SIGTERM]), (signal.SIG_IGN, [])):
        signal.signal(signal.SIGHUP, handler)
        end_on_hangup()
        heard.clear()
        signal.raise_signal(signal.SIGHUP)
        assert heard == expected
    for number, handler in before.items():
        signal.signal(number, handler)


def test_env_and_config_say_what_was_run(lab: Lab):
    lab("shift", "adapter.r=3", "+optimizer.betas=[0.8,0.9]")
    run = only_run()
    assert run.config["adapter"]["r"] == 3
    assert run.config["optimizer"]["betas"] == [0.8, 0.9]
    env = json.loads((run.path / "env.json").read_text())
    assert env["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert env["cpus"] == os.cpu_count()


def test_published_rows_stand_beside_the_published_run_alone(lab: Lab):
    lab("shift")
    nothing = {"base": {}, "adapted": {}, "cells": {}, "source": None}
    assert only_run().config["published"] == nothing


def test_scaling_needs_no_quotes_and_scales(lab: Lab):
    assert lab("shift", "adapter.r=4", "adapter.scaling=alpha/r,alpha/sqrt(r),alpha", "-m") == 0
    scales = set()
    for run in find_runs(Path("runs")):
        about = json.loads((run.path / "adapter" / "adapter.json").read_text())
        scales.add((run.config["adapter"]["scaling"], about["sites"]["linear"]["scale"]))
    assert scales == {("alpha/r", 0.25), ("alpha/sqrt(r)", 0.5), ("alpha", 1.0)}


@pytest.mark.slow
def test_targets_by_glob(lab: Lab):
    assert lab("digits", "target=body.*") == 0
    assert lab("digits", "target=[linear]") == 0
    assert lab("digits", "target=[head*,body.fc?]") == 0
    sites = sorted(
        sorted(json.loads((run.path / "adapter" / "adapter.json").read_text())["sites"])
        for run in find_runs(Path("runs"))
    )
    assert sites == [["body.fc1"], ["body.fc1", "head"], ["body.fc1", "head"]]


def test_settings_and_patterns_of_one_target(lab: Lab):
    settings = ("target=[linear]", "target.linear.r=3", "target.linear.exclude=[head]")
    assert lab("digits", *settings, "adapter.alpha_pattern={body*:5}") == 0
    (site,) = json.loads((only_run().path / "adapter" / "adapter.json").read_text())[
        "sites"
    ].items()
    assert (site[0], site[1]["r"], site[1]["alpha"], site[1]["scale"]) == ("body.fc1", 3, 5, 5 / 3)


@pytest.mark.slow
def test_full_fine_tuning_of_blocks_measures_each(lab: Lab):
    everything = "model._target_=tests.all_layer_kinds.AllLayerKinds"
    assert lab("shift", everything, "adapter=full", "target=all") == 0
    run = only_run()
    after = load_file(run.path / "model" / "model.safetensors")
    before = load_base(Path("bases"))
    with np.load(run.path / "spectra.npz") as arrays:
        for site, name, rows in (
            ("attn.in_proj_weight_k", "attn.in_proj_weight", slice(8, 16)),
            ("lstm.weight_hh_l0_o", "lstm.weight_hh_l0", slice(24, 32)),
            ("embed", "embed.weight", slice(None)),
            ("conv", "conv.weight", slice(None)),
        ):
            delta = (after[name] - before[name])[rows].flatten(1).double()
            sigma = arrays[f"{site}/singular_values"][-1]
            np.testing.assert_allclose(sigma, torch.linalg.svdvals(delta), rtol=1e-5, atol=1e-8)


def test_the_last_epoch_is_measured_whatever_its_number(lab: Lab):
    assert lab("shift", "trainer.max_epochs=3", "base.epochs=3") == 0
    run = only_run()
    assert list(run.curve("base/val/loss")) == [2, 3]
    assert list(run.curve("val/loss")) == [0, 2, 3]
    assert list(run.curve("spectra/linear/sigma_1")) == [0, 2, 3]
    with np.load(run.path / "spectra.npz") as arrays:
        assert arrays["epochs"].tolist() == [0, 2, 3]


@pytest.mark.parametrize("change", [0.0, 1e-6])
def test_a_base_that_unmerging_does_not_give_back_fails_the_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, change: float
):
    unmerge = adapters.unmerge

    def wrong(model: torch.nn.Module) -> None:
        if change:
            unmerge(model)
            dict(model.named_parameters())["linear.weight"].data += change

    monkeypatch.setattr(adapters, "unmerge", wrong)
    assert lab("shift") == 1
    assert "is not the base's any more after merge and unmerge" in only_run().status["error"]


def test_a_batch_of_more_than_the_digits_is_a_config_error(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    assert lab("digits", "data.batch_size=1000") == 2
    assert "data.batch_size=1000 is more than the 720 training rows" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("spectra.every_n_epochs=1", "trainer.check_val_every_n_epoch=3"),
        ("trainer.check_val_every_n_epoch=1", "spectra.every_n_epochs=3"),
    ],
)
def test_a_divergence_is_of_the_training_loss_whatever_is_measured_first(
    lab: Lab, overrides: tuple[str, ...]
):
    assert lab("shift", "optimizer=sgd", "optimizer.lr=1e30", *overrides) == 1
    message = only_run().status["error"]
    assert "DivergedError: train/loss became" in message
    assert "in epoch 1, step " in message


def test_a_divergence_at_an_epochs_last_step_is_found_by_what_is_measured(lab: Lab):
    """One step an epoch: its loss is finite, the weights after it are not."""
    one_step = ["optimizer=sgd", "optimizer.lr=1e38", "data.batch_size=256", "data.shift=1e3"]
    assert lab("shift", *one_step, "trainer.check_val_every_n_epoch=1") == 1
    assert "val/loss is " in only_run().status["error"]
    assert "after epoch 1, step 1 of the run" in only_run().status["error"]
    assert lab("shift", *one_step, "spectra.every_n_epochs=1") == 1
    errors = [run.status["error"] for run in find_runs(Path("runs"))]
    message = "after epoch 1, step 1 of the run: "
    assert any(message in error and "NaN or infinity" in error for error in errors)


def test_a_base_that_is_no_number_is_said_before_any_step(lab: Lab):
    save_file({"linear.weight": torch.full((9, 12), torch.nan)}, "nan.safetensors")
    assert lab("shift", "base=checkpoint", "base.path=nan.safetensors") == 1
    assert "the base or the data holds it, no step was taken" in only_run().status["error"]


def test_a_checkpoint_is_known_by_its_content(lab: Lab, capsys: pytest.CaptureFixture[str]):
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(Linear(12, 9).state_dict(), "mine.safetensors")
        assert lab("shift", "base=checkpoint", "base.path=mine.safetensors") == 0
    one, two = find_runs(Path("runs"))
    assert one.curve("val/loss")[0] != two.curve("val/loss")[0]
    Path("mine.safetensors").rename("moved.safetensors")
    assert lab("shift", "base=checkpoint", "base.path=moved.safetensors") == 0
    assert "Finished before" in capsys.readouterr().out
    assert len(find_runs(Path("runs"))) == 2


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precisions(lab: Lab, precision: str):
    assert lab("shift", f"trainer.precision={precision}", "optimizer.lr=0.01") == 0
    run = only_run()
    assert run.last("merged/val/loss") == pytest.approx(run.last("val/loss"), rel=0.05)


def test_a_report_that_was_lost_comes_back(lab: Lab):
    lab("shift")
    shutil.rmtree(only_run().path / "report")
    assert lab("shift") == 0
    assert (only_run().path / "report" / "table.md").exists()


def test_targets_in_another_order_are_the_same_run(lab: Lab):
    for targets in ("[linear,conv]", "[conv,linear]"):
        assert lab("digits_targets", f"target={targets}", "spectra.truncation=none") == 0
    run = only_run()  # the second was finished before
    earlier = run.path.with_name(run.path.name.replace("conv+linear", "linear+conv"))
    run.path.rename(earlier)  # as earlier versions named it
    assert lab("digits_targets", "target=[conv,linear]", "spectra.truncation=none") == 0
    assert only_run().path == earlier


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    for name in ("out [v1]", "a[/b]", "x[/]y", "[bold]"):
        print_labelled("multirun", name)
        print_error("failed", name)
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == (f"multirun: {name}\n", f"failed: {name}\n")


def test_an_adapter_that_is_too_large_to_be_merged_is_stored(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """float16 ends at 65504: the trained factors are made so large that ΔW is beyond it."""
    merge = adapters.merge

    def merge_into_half(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data * 1000 if "lora" in name else parameter.data.half()
        merge(model)

    monkeypatch.setattr(adapters, "merge", merge_into_half)
    assert lab("planted_linear", "spectra.truncation=none", "spectra.against_base=false") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the adapter is stored, and cannot be merged: 'linear': it takes numbers" in shown
    run = only_run()
    assert run.check()["state"] == "finished"
    assert (run.path / "adapter" / "adapter.safetensors").exists()
    assert run.last("merged/val/loss") is None
