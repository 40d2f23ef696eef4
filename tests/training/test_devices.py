"""Runs of several processes: they equal a run of one process, and none hangs when one dies.

Independent truth: the same run by one process, to rounding, and the processes in /proc.

Run: make test ARGS=tests/training/test_devices.py
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_lab.data.module import Batches
from lora_lab.run_files import file_records, read_cost
from lora_lab.runs import Run, find_runs
from tests.conftest import SMALL, Lab, command, only_run
from tests.training.test_resume import assert_equal

TWO = ("trainer.devices=2", "trainer.accelerator=cpu")
TWO_PROCESSES = {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "strategy": "ddp"}

CASES = {
    "shift": ("shift", "adapter.r=2"),
    "validation sets of odd sizes": ("shift", "data.samples=257"),
    "accuracy": ("digits", "adapter.r=2"),
    "all kinds of layers": ("digits_targets", "target=all", "adapter.r=2"),
    "biases and a layer in full": ("digits", "adapter.r=2", "also_train=[bias]"),
    "full fine-tuning": ("digits", "adapter=full"),
    "all rows at each step": ("planted_conv", "adapter.r=2"),
    "a transformer": ("bytes_lm", "adapter.r=2", "data.batch_size=16", "target=all"),
    "clipped and scheduled": (
        *("digits", "trainer.gradient_clip_val=0.1", "optimizer.schedule=cosine"),
        "optimizer.warmup=0.2",
    ),
    "cut and healed": ("shift", "adapter.r=4", "adapter.cut=[2,1]", "adapter.heal=11"),
    # ΔW is measured from the first factors, or has a core
    **{
        init: ("shift", f"adapter={init}", "adapter.r=2")
        for init in ("pissa", "milora", "corda", "lora_ga", "lora_xs")
    },
}

OF_DDP = {
    "adalora": ("digits", "adapter=adalora", "trainer.max_epochs=4"),
    "relora": ("digits", "adapter=relora", "adapter.r=2", "optimizer.lr=0.01"),
}
"""Settings that fsdp refuses."""
"""With ddp alone: fsdp is refused."""


def run(experiment: str, *overrides: str, root: str) -> Run:
    """A run by a new process, in the folder `root`."""
    quick = ("tracking=off", "figures=false", f"runs_dir={root}")
    command = [sys.executable, "-m", "lora_lab.train", f"experiment={experiment}", *quick]
    done = subprocess.run(
        [*command, *SMALL[experiment], *overrides], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return only_run(root)


def same(one: Run, two: Run, rtol: float = 1e-5) -> None:
    """Every row, spectrum and tensor of two runs, to rounding."""
    for a, b in zip(one.rows(), two.rows(), strict=True):
        assert a.keys() == b.keys()
        # A figure that rounding alone decides: the directions of what is 0.
        for key in a.keys() - {k for k in a if "intruders" in k or "amplification" in k}:
            assert b[key] == pytest.approx(a[key], rel=rtol, abs=1e-6), key
    with np.load(one.path / "spectra.npz") as a, np.load(two.path / "spectra.npz") as b:
        assert a.files == b.files
        for key in a.files:
            if key.endswith(("singular_values", "delta", "truncation/loss")):
                np.testing.assert_allclose(a[key], b[key], rtol=10 * rtol, atol=1e-5 * a[key].max())
    folders = ("adapter", "model", "cut/*", "healed/*")
    for file in (f for name in folders for f in one.path.glob(f"{name}/*.safetensors")):
        a, b = load_file(file), load_file(two.path / file.relative_to(one.path))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=10 * rtol, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "trainer"), [*product(CASES, ("ddp", "fsdp")), *product(OF_DDP, ("ddp",))]
)
def test_two_processes_are_as_one(case: str, trainer: str):
    settings = {**CASES, **OF_DDP}[case]
    two = run(*settings, f"trainer={trainer}", *TWO, root="two")
    same(run(*settings, root="one"), two)


def test_the_first_process_alone_writes(lab: Lab):
    assert lab("shift", "trainer=ddp", *TWO, tracking="offline") == 0
    two = only_run()
    assert two.finished
    assert two.status["devices"] == TWO_PROCESSES
    assert len(list(Path("runs/shift/wandb").glob("offline-run-*"))) == 1
    assert "wandb_rows_lost" not in two.status
    assert lab("shift", "runs_dir=one") == 0
    one = only_run("one")
    assert one.path.name == two.path.name  # devices are no part of what a run is
    same(one, two)
    costs = [read_cost(run.path) for run in (one, two)]
    assert costs[0]["cost/flops_per_step"] == costs[1]["cost/flops_per_step"]
    rows = [cost["cost/rows_per_second"] * cost["cost/seconds_per_step"] for cost in costs]
    assert rows == pytest.approx([32, 32])
    assert [cost["processes"] for cost in costs] == [1, 2]
    assert lab("shift", "trainer=ddp", *TWO) == 0  # finished before


@pytest.mark.slow
def test_two_processes_reproduce_a_run_bit_for_bit(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """The stored run's threads are those of its two processes."""
    assert lab("shift", "trainer=ddp", *TWO) == 0
    two = only_run()
    assert command(monkeypatch, "reproduce", str(two.path)) == 0
    new = only_run("reproduced")
    assert new.status["devices"] == TWO_PROCESSES
    for file in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert (new.path / file).read_bytes() == (two.path / file).read_bytes()


def start(*overrides: str) -> subprocess.Popen[str]:
    """Starts endless training by two processes in a new process group."""
    command = [sys.executable, "-m", "lora_lab.train", *SMALL["shift"], "tracking=off"]
    command += ["figures=false", "trainer=ddp", *TWO, "trainer.check_val_every_n_epoch=5"]
    return subprocess.Popen(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def process_ids() -> dict[str, int]:
    """The ids of the processes of this test's run, by their rank in the run."""
    by_rank = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                pair.split("=", 1)
                for pair in (directory / "environ").read_text().split("\0")
                if "=" in pair
            )
            here = (directory / "cwd").resolve() == Path.cwd()
        except OSError:  # gone, or not ours
            continue
        if here and "TORCHELASTIC_RUN_ID" in variables:
            by_rank[variables["RANK"]] = int(directory.name)
    return by_rank


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def in_training() -> bool:
    return any(run.curve("val/loss").get(5) for run in find_runs(Path("runs")))


@pytest.mark.slow
def test_a_process_that_dies_fails_the_run_and_the_multirun_goes_on():
    process = start("-m", "trainer.max_epochs=1000000,2")
    until(in_training)
    (first,) = find_runs(Path("runs"))
    os.kill(process_ids()["1"], signal.SIGKILL)
    until(lambda: first.status["state"] == "failed")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert first.status["error"] == "process 1 of 2 ended by SIGKILL"
    assert "process 1 of 2 ended by SIGKILL" in out
    states = {r.config["trainer"]["max_epochs"]: r.status["state"] for r in find_runs(Path("runs"))}
    assert states == {1000000: "failed", 2: "finished"}


@pytest.mark.slow
def test_another_command_leaves_it_alone_and_ctrl_c_ends_every_process():
    process = start("trainer.max_epochs=1000000", "checkpoint_every=0")
    until(in_training)
    other = start("trainer.max_epochs=1000000")
    out, _ = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "is being run by another process" in out
    run = only_run()
    assert run.status["state"] == "running"
    assert (run.path / "checkpoints").is_dir()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert run.status["state"] == "interrupted"
    assert not process_ids()


SLOW_TERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)


@pytest.mark.parametrize("signum", [SLOW_TERM, signal.SIGKILL])
@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(signum: signal.Signals):
    process = start("trainer.max_epochs=1000000")
    until(in_training)
    process.send_signal(signum)
    assert process.wait(timeout=60) == {"SIGTERM": 143, "SIGKILL": -9}[signum.name]
    until(lambda: not process_ids() and only_run().status["state"] == "interrupted")


@pytest.mark.slow
def test_two_processes_go_on_within_an_epoch():
    settings = ("trainer=ddp", *TWO, "data.samples=16000", "adapter.dropout=0.3")
    settings += ("trainer.max_epochs=1", "trainer.val_check_interval=100", "base.epochs=1")
    process = start(*settings, "checkpoint_every=1e-9")
    last = "runs/*/*/checkpoints/last.ckpt"
    until(lambda: any(torch.load(p)["lora_lab"]["batches"] > 100 for p in Path().glob(last)))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    until(lambda: not process_ids())
    settings += ("trainer.check_val_every_n_epoch=5",)  # as `start` has it
    one = run("shift", *settings, root="runs")
    log_text = (one.path / "log.txt").read_text()
    assert re.search(r"run resumed from epoch 0 of 1, batch \d+", log_text)
    other = run("shift", *settings, root="uninterrupted")
    assert one.status["tries"] == 2
    assert_equal(one, other)


@pytest.mark.slow
def test_a_run_that_another_command_has_finished_stays_so(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    assert lab("shift", "trainer=ddp", *TWO) == 0
    run = only_run()
    before = run.status
    with monkeypatch.context() as patch:  # as it was looked at before the other command's end
        patch.setattr(Run, "status", {"state": "none"})
        assert lab("shift", "trainer=ddp", *TWO) == 0
    assert run.status == before


def test_what_cannot_be_shared_is_said(lab: Lab, capsys: pytest.CaptureFixture[str]):
    for overrides, says in (
        (("data.batch_size=33",), "data.batch_size=33: must be a multiple of the 2 processes"),
        (("trainer=fsdp", "adapter=dora"), "adapter.dora=true: not with trainer=fsdp"),
        (("+trainer.num_nodes=2",), "`torchrun --nnodes=2 --nproc-per-node=2"),
    ):
        assert lab("shift", "trainer=ddp", *overrides, *TWO) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert not find_runs(Path("runs"))


def test_each_process_has_its_share_of_each_batch():
    batches, *parts = (
        [list(b) for b in Batches(10, 4, "epoch", (0,), rank, count)]
        for rank, count in ((0, 1), (0, 2), (1, 2))
    )
    assert batches == [a + b for a, b in zip(*parts, strict=True)]


@pytest.mark.slow
def test_what_is_made_of_a_finished_run_takes_one_process(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", "trainer=ddp", *TWO) == 0
    run = only_run()
    before = run.rows()
    assert command(monkeypatch, "analyze", str(run.path)) == 0
    arguments = ("--tolerance", "1e-4", "--devices", "1")
    assert command(monkeypatch, "reproduce", str(run.path), *arguments) == 0
    assert "devices: stored 2 × cpu (ddp); new 1 × cpu, by --devices" in capsys.readouterr().out
    again = only_run("reproduced")
    for key in ("val/loss", "merged/val/loss", "spectra/linear/sigma_1"):
        assert again.last(key) == pytest.approx(before[-1].get(key, run.last(key)), rel=1e-5)


def start_reproduction(run: Run, **settings: dict[str, object]) -> subprocess.Popen[str]:
    """Starts `lora-lab reproduce` on a run of two processes whose config gets other settings."""
    config = run.config
    for key, changes in settings.items():
        config[key] |= changes
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    run.update_status(files=file_records(run.path))
    return subprocess.Popen(
        [sys.executable, "-m", "lora_lab.cli", "reproduce", str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_reproduction_by_two_processes_is_stopped(lab: Lab, signum: signal.Signals):
    assert lab("shift", "trainer=ddp", *TWO) == 0
    process = start_reproduction(only_run(), trainer={"max_epochs": 1000000})
    until(lambda: any(r.curve("val/loss").get(2) for r in find_runs(Path("reproduced"))))
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[signum.name]
    assert "interrupted: the same command begins again" in out
    assert "Traceback" not in out
    assert only_run("reproduced").status["state"] == "interrupted"
    until(lambda: not process_ids())


@pytest.mark.slow
def test_a_reproduction_by_two_processes_that_fails(lab: Lab):
    assert lab("shift", "trainer=ddp", "optimizer=sgd", *TWO) == 0
    process = start_reproduction(only_run(), optimizer={"lr": 1e30})
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "failed: RuntimeError: DivergedError" in out
    assert "Traceback" not in out
    assert only_run("reproduced").status["state"] == "failed"
    assert only_run().finished
