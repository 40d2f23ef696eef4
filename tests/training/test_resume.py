"""Interrupted runs go on from their checkpoint and end bit for bit as if never interrupted.

Independent truth: the files of the same run, or sweep, that was never interrupted.

Run: make test ARGS=tests/training/test_resume.py
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_lab import adapters
from lora_lab.runs import Run, find_runs
from lora_lab.training.callbacks import checkpoint
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.modules import BaseModule
from tests import interrupted_train
from tests.conftest import SMALL, Lab, only_run, quick
from tests.tracking.test_tracking import as_metrics_row, use_server, wandb_content
from tests.wandb_server import WandbServer

EACH_EPOCH = "checkpoint_every=0"


def contents(run: Run) -> dict[str, bytes]:
    """A run's files, by name, without those that hold a time or a path."""
    wanted = [run.path / "metrics.jsonl", run.path / "spectra.npz"]
    for files in ("advice.yaml", "adapter/*", "model/*", "report/*.csv", "cut/*/*", "healed/*/*"):
        wanted += sorted(set(run.path.glob(files)) - {run.path / "report/cost.csv"})
    content = {}
    for path in wanted:
        if path.suffix == ".npz":  # a zip, which dates its entries
            with np.load(path) as arrays:
                for name, array in arrays.items():
                    content[f"spectra.npz/{name}"] = repr((array.dtype, array.shape)).encode()
                    content[f"spectra.npz/{name}"] += array.tobytes()
        else:
            content[path.relative_to(run.path).as_posix()] = path.read_bytes()
    return content


def assert_equal(run: Run, alone: Run) -> None:
    one, other = contents(run), contents(alone)
    assert list(one) == list(other)
    assert [name for name in one if one[name] != other[name]] == []


def steps(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[str]:
    """Counts training steps from here on, by their prefixes; Ctrl-C comes at the `stop`-th."""
    taken: list[str] = []
    real = BaseModule.training_step

    def step(module: BaseModule, *args):
        taken.append(module.prefix)
        if len(taken) == stop:
            raise KeyboardInterrupt
        return real(module, *args)

    monkeypatch.setattr(BaseModule, "training_step", step)
    return taken


RUNS = {
    "dropout": ("shift", "adapter.dropout=0.3"),
    "schedule": ("shift", "optimizer.schedule=cosine", "optimizer.warmup=0.3"),
    "clip": ("shift", "trainer.gradient_clip_val=0.1", "adapter.r=3"),
    "full": ("digits", "adapter=full", "trainer.max_epochs=4"),
    "galore": (
        *("digits", "adapter=full", "optimizer=galore", "optimizer.r=4", "optimizer.every=20"),
        "trainer.max_epochs=4",
    ),
    "dora": ("digits", "adapter=dora", "adapter.dropout=0.2", "trainer.max_epochs=4"),
    "pissa": ("digits", "adapter=pissa", "adapter.r=2", "trainer.max_epochs=4"),
    "lora_ga": ("digits", "adapter=lora_ga", "adapter.r=2", "trainer.max_epochs=4"),
    "lora_fa": ("digits", "adapter=lora_fa", "trainer.max_epochs=4"),
    "adalora": (
        *("digits", "adapter=adalora", "adapter.allocation.final=0.2", "trainer.max_epochs=4"),
        "trainer.gradient_clip_val=0.5",
    ),
    "relora": (
        *("digits", "adapter=relora", "adapter.r=2", "trainer.max_epochs=4"),
        *("adapter.restarts.every=20", "adapter.restarts.warmup=3"),
    ),
    "lora_plus": ("digits", "adapter=lora_plus", "optimizer=adamw", "trainer.max_epochs=4"),
    "momentum": ("shift", "optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.01"),
    "each third step": ("shift", "spectra.every_n_steps=3", "trainer.check_val_every_n_epoch=1"),
    "first step": ("shift", "spectra.first_step=true", "trainer.max_epochs=3"),
    "accumulated": ("shift", "trainer.accumulate_grad_batches=3", "trainer.max_epochs=5"),
    "bf16": ("shift", "trainer.precision=bf16-true", "optimizer.lr=0.01"),
    "transformer": ("bytes_lm", "adapter.dropout=0.1", "trainer.max_epochs=4"),
}
"""Settings whose runs must go on bit for bit."""

QUICK = ("schedule", "full", "dora", "adalora", "relora")


@pytest.mark.parametrize("name", quick(RUNS, QUICK))
def test_a_run_goes_on_bit_for_bit(lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str):
    settings = (*RUNS[name], "runs_dir=alone")
    with monkeypatch.context() as patch:
        taken = steps(patch)
        assert lab(*settings) == 0
    alone = only_run("alone")
    count = taken.count("")
    epoch = count // alone.config["trainer"]["max_epochs"]
    with monkeypatch.context() as patch:
        steps(patch, stop=2 * epoch + epoch // 2 + 1)
        assert lab(*RUNS[name], EACH_EPOCH) == 130
    run = only_run()
    assert run.path.name == alone.path.name
    assert run.status["state"] == "interrupted"
    assert (run.path / "checkpoints" / "last.ckpt").exists()
    taken = steps(monkeypatch)
    assert lab(*RUNS[name]) == 0
    assert taken == [""] * (count - 2 * epoch)
    assert_equal(run, alone)
    assert not (run.path / "checkpoints").exists()


EACH_STEP = "checkpoint_every=1e-9"

WITHIN = {
    "each batch a step": (
        *("shift", "data.samples=640", "adapter.dropout=0.3", "optimizer.schedule=cosine"),
        *("trainer.val_check_interval=0.2", "trainer.log_every_n_steps=4"),
    ),
    "accumulated": (
        *("shift", "data.samples=640", "adapter.dropout=0.3", "trainer.accumulate_grad_batches=3"),
        *("trainer.val_check_interval=2", "trainer.log_every_n_steps=2", "spectra.every_n_steps=1"),
        "spectra.first_step=true",
    ),
    "full": ("digits", "adapter=full", "data.batch_size=64", "trainer.val_check_interval=5"),
    "all rows at each step": ("planted_conv", "data.steps=20", "adapter.r=2"),
}
"""Settings of runs that must go on bit for bit within an epoch, of some 20 batches."""


@pytest.mark.parametrize("name", quick(WITHIN, ("accumulated",)))
def test_a_run_goes_on_within_an_epoch(lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str):
    settings = (*WITHIN[name], "trainer.max_epochs=1")
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))  # checkpoints may take any time
    with monkeypatch.context() as patch:
        taken = steps(patch)
        assert lab(*settings, "runs_dir=alone") == 0
    count, done = taken.count(""), 0
    batches_per_step = 3 if name == "accumulated" else 1
    for stop in (5, 12):  # 4 batches are taken in the first try, then 11; not all are whole steps
        with monkeypatch.context() as patch:
            steps(patch, stop=stop)
            assert lab(*settings, EACH_STEP) == 130
        done += (stop - 1) // batches_per_step * batches_per_step
    last = only_run().path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["lora_lab"]["batches_of_epoch"] == done
    taken = steps(monkeypatch)
    assert lab(*settings) == 0
    assert taken == [""] * (count - done)
    assert (
        f"run resumed from epoch 0 of 1, batch {done}" in (last.parents[1] / "log.txt").read_text()
    )
    assert_equal(only_run(), only_run("alone"))


@pytest.mark.slow
def test_a_base_goes_on_within_an_epoch(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    with monkeypatch.context() as patch:
        steps(patch, stop=20)
        assert lab("shift", EACH_STEP) == 130
    taken = steps(monkeypatch)
    assert lab("shift") == 0
    assert len(taken) == 32 - 19 + 32
    assert lab("shift", "runs_dir=alone", "bases_dir=alone/bases") == 0
    assert_equal(only_run(), only_run("alone"))
    bases = [next(Path(where).glob("*.safetensors")) for where in ("bases", "alone/bases")]
    assert bases[0].read_bytes() == bases[1].read_bytes()


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        steps(patch, stop=32 + 20)
        assert lab("shift", EACH_EPOCH) == 130
    last = only_run().path / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert content["lora_lab"].pop("batches_of_epoch") == 0  # it knew of epochs' ends alone
    del content["lora_lab"]["epoch_totals"]
    base = load_file(next(Path("bases").glob("*.safetensors")))
    assert content["lora_lab"]["fits"]["base"] != adapters.weights_hash(base)
    content["lora_lab"]["fits"]["base"] = adapters.weights_hash(base)
    torch.save(content, last)
    taken = steps(monkeypatch)
    assert lab("shift") == 0
    assert len(taken) == 16
    assert lab("shift", "runs_dir=alone") == 0
    assert_equal(only_run(), only_run("alone"))


def kill(what: str, *settings: str, call: int = 1, when: str = "before", by: str = "SIGKILL"):
    """A run of `shift` in a process that gets a signal at a call, and has ended."""
    quick = ["tracking=off", "figures=false", *SMALL["shift"], EACH_EPOCH, *settings]
    command = [sys.executable, interrupted_train.__file__, what, str(call), when, by]
    process = subprocess.run([*command, *quick], capture_output=True, text=True, timeout=120)
    assert process.returncode == {"SIGKILL": -9, "SIGTERM": 143}[by], process.stderr


def ctrl_c(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    *settings: str,
    call: int = 1,
    when: str = "before",
):
    """A run of `shift` in here, with Ctrl-C at a call."""

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*interrupted_train.acting_at_call(what, call, when, stop))
        assert lab("shift", EACH_EPOCH, *settings) == 130


STEP = "lora_lab.training.modules:BaseModule.training_step"
SAVE = "lightning.pytorch:Trainer.save_checkpoint"
# 4 epochs of 8 steps each, first of the base, then of the adapter; three checkpoints and, at the
# end, a fourth of each.
MOMENTS = {
    "in the base's third epoch": (STEP, {"call": 20, "by": "SIGKILL"}, 16 + 32),
    "between the base's last checkpoint and its name": (SAVE, {"call": 4, "when": "after"}, 40),
    "before the base is kept": ("lora_lab.training.bases:save", {}, 32),
    "in the first epoch": (STEP, {"call": 32 + 5}, 32),
    "in the third epoch": (STEP, {"call": 32 + 20, "by": "SIGKILL"}, 16),
    "in the third epoch, asked to": (STEP, {"call": 32 + 20, "by": "SIGTERM"}, 16),
    "between the rows and their checkpoint": (SAVE, {"call": 4 + 2}, 24),
    "between a checkpoint and its name": (SAVE, {"call": 6, "when": "after", "by": "SIGKILL"}, 24),
    "after the last epoch": (
        "lora_lab.training.callbacks.spectra:SpectraCallback.on_train_end",
        {},
        8,
    ),
    "after the last checkpoint": ("lora_lab.training.finish:_save_trained", {}, 0),
    "in the analysis": ("lora_lab.analysis.findings:analyze", {"by": "SIGKILL"}, 0),
    "in the report": ("lora_lab.report:write_run", {}, 0),
}
"""What is about to be called, by which signal (else Ctrl-C), and how many steps are then left."""


HERE = ("in the first epoch", "between the rows and their checkpoint", "after the last checkpoint")


@pytest.mark.parametrize("moment", quick(MOMENTS, HERE))
def test_whenever_it_is_stopped(lab: Lab, monkeypatch: pytest.MonkeyPatch, moment: str):
    what, how, left = MOMENTS[moment]
    stop = kill if "by" in how else partial(ctrl_c, lab, monkeypatch)
    stop(what, "adapter.dropout=0.3", **how)
    run = only_run()
    assert run.status["state"] == ("finished" if moment == "in the report" else "interrupted")
    taken = steps(monkeypatch)
    assert lab("shift", "adapter.dropout=0.3") == 0
    assert len(taken) == left
    assert lab("shift", "adapter.dropout=0.3", "runs_dir=alone", "bases_dir=alone/bases") == 0
    assert_equal(run, only_run("alone"))
    bases = [next(Path(where).glob("*.safetensors")) for where in ("bases", "alone/bases")]
    assert bases[0].read_bytes() == bases[1].read_bytes()
    left_over = [*run.path.iterdir(), *bases[0].parent.iterdir()]
    assert not [path for path in left_over if path.name.endswith((".part", "checkpoints"))]


@pytest.mark.slow
def test_interrupted_again_and_again_it_says_so(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for call in (32 + 10, 10, 4):
        ctrl_c(lab, monkeypatch, STEP, call=call)
    kill("lora_lab.tracking.tracking:Tracking.replay", call=2)  # 1: the base's rows
    run = only_run()
    last = run.path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["lora_lab"]["epochs"] == 2
    capsys.readouterr()
    assert lab("shift") == 0
    assert "run resumed from epoch 2 of 4" in capsys.readouterr().out
    assert run.status["tries"] == 5
    assert run.status["seconds"] > run.status["spent"] > 0
    log = (run.path / "log.txt").read_text()
    assert [log.count(f"run resumed from epoch {n} of 4") for n in (1, 2)] == [1, 2]
    assert log.count("base trained in") == 1
    lab("shift", "runs_dir=alone")
    assert_equal(run, only_run("alone"))


def cut(run: Run) -> None:
    path = run.path / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-300])


def flip(run: Run) -> None:
    path = run.path / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    at = content.index(b"data/0", content.index(b"data.pkl")) + 200
    content[at] ^= 1
    path.write_bytes(content)


def garble(run: Run) -> None:
    (run.path / "checkpoints" / "last.ckpt").write_bytes(b"none")


def change(name: str) -> Callable[[Run], None]:
    def other(run: Run) -> None:
        path = run.path / "checkpoints" / "last.ckpt"
        content = torch.load(path, weights_only=True)
        content["lora_lab"]["fits"][name] = "other"
        torch.save(content, path)

    return other


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(cut, "cannot go on from", marks=pytest.mark.slow),
        (flip, "cannot go on from"),
        pytest.param(garble, "cannot go on from", marks=pytest.mark.slow),
        (change("base"), "it is of another base"),
        pytest.param(change("config"), "it is of another config", marks=pytest.mark.slow),
        pytest.param(
            change("version of torch"), "it is of another version of torch", marks=pytest.mark.slow
        ),
    ],
)
def test_a_checkpoint_that_is_no_good_is_said(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Run], None], says: str
):
    with monkeypatch.context() as patch:
        steps(patch, stop=32 + 20)
        assert lab("shift", EACH_EPOCH) == 130
    run = only_run()
    damage(run)
    taken = steps(monkeypatch)
    assert lab("shift") == 0
    log = (run.path / "log.txt").read_text()
    assert says in log
    assert "beginning again" in log
    assert len(taken) == 32
    lab("shift", "runs_dir=alone")
    assert_equal(run, only_run("alone"))


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path):
    """Also for a run of a pack, whose checkpoint Lightning does not write."""
    (tmp_path / "last.part").symlink_to("/dev/full")
    of_run = Checkpoint(tmp_path, "", 0, SimpleNamespace())  # pyright: ignore[reportArgumentType]
    with pytest.raises(OSError, match="No space left"):
        of_run.save({"weights": torch.ones(100_000)})


def test_a_failed_run_begins_anew(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    real = BaseModule.training_step
    with monkeypatch.context() as patch:

        def fail(module: BaseModule, *args):
            if module.current_epoch == 2 and not module.prefix:
                raise OSError("the disk is gone")
            return real(module, *args)

        patch.setattr(BaseModule, "training_step", fail)
        assert lab("shift", EACH_EPOCH) == 1
    taken = steps(monkeypatch)
    assert lab("shift") == 0
    assert len(taken) == 32
    assert "tries" not in only_run().status
    assert "disk is gone" not in (only_run().path / "log.txt").read_text()


@pytest.mark.slow
def test_a_repeated_run_is_kept_until_it_has_been(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    assert lab("shift") == 0
    run = only_run()
    before = contents(run)
    with monkeypatch.context() as patch:
        steps(patch, stop=20)
        assert lab("shift", "overwrite=true", EACH_EPOCH) == 130
    assert [one.path for one in find_runs(Path("runs"))] == [run.path]
    assert contents(Run(run.path / "previous")) == before
    assert Run(run.path / "previous").finished
    with monkeypatch.context() as patch:
        taken = steps(patch)
        assert lab("shift") == 0
        assert len(taken) == 16
    assert contents(run) == before
    assert not (run.path / "previous").exists()
    taken = steps(monkeypatch)
    assert lab("shift", "overwrite=true") == 0
    assert len(taken) == 32


@pytest.mark.slow
def test_when_checkpoints_are_written_is_no_part_of_a_run(lab: Lab):
    assert lab("shift", "checkpoint_every=7") == 0
    assert lab("shift", "checkpoint_every=0") == 0
    assert len(find_runs(Path("runs"))) == 1
    assert len(list(Path("bases").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("interval", "cost", "written"),
    quick(
        [(0, 9, 4), (1, 0, 4), (2, 0, 2), (3, 0, 2), (1, 0.2, 2), (60, 0, 1)],
        [(2, 0, 2), (1, 0.2, 2)],
    ),
)
def test_checkpoints_come_in_time_and_cost_little(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, interval: float, cost: float, written: int
):
    """An epoch takes a second here, and a checkpoint `cost`: 4 epochs, 20 times its cost apart.

    The last is of the end of training, whatever it costs.
    """
    lab("shift", "seed=1")  # the base
    now, saved = 0.0, 0
    save, end = pl.Trainer.save_checkpoint, BaseModule.on_train_epoch_end

    def slow(*args, **named) -> None:
        nonlocal now, saved
        now, saved = now + cost, saved + 1
        save(*args, **named)

    def one_second(module: BaseModule) -> None:
        nonlocal now
        now += 1
        end(module)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", slow)
    monkeypatch.setattr(BaseModule, "on_train_epoch_end", one_second)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now))
    assert lab("shift", f"checkpoint_every={interval}") == 0
    assert saved == written


def test_an_adapters_checkpoint_is_without_its_base(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    for kind in ("lora", "full"):
        with monkeypatch.context() as patch:
            steps(patch, stop=32 + 20 if kind == "lora" else 20)
            assert lab("shift", f"adapter={kind}", EACH_EPOCH) == 130
    kept = {}
    for run in find_runs(Path("runs")):
        content = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)
        kept[run.config["adapter"]["method"]] = set(content["state_dict"])
    weight = "model.linear.weight"
    assert kept["full"] == {weight}
    assert kept["lora"] == {f"model.linear.lora.default.weight.{part}" for part in "AB"}


@pytest.mark.slow
def test_offline_wandb_has_every_row_once(lab: Lab):
    kill(STEP, "tracking=offline", call=32 + 20)
    run = only_run()
    first = run.status["wandb"]
    assert lab("shift", tracking="offline") == 0
    assert "wandb_rows_lost" not in run.status
    assert [path.name for path in Path("runs/shift/wandb").glob("*run-*")] == [
        Path(run.status["wandb"]).name
    ]
    assert run.status["wandb"].rpartition("-")[2] == first.rpartition("-")[2]
    history = wandb_content(run)["history"]
    rows = [as_metrics_row(row) for row in history if "trainer/global_step" in row]
    assert rows == run.rows()
    histograms = [row for row in history if "spectra/linear/singular_values/_type" in row]
    assert [row["epoch"] for row in histograms] == [0, 2, 4]


@pytest.mark.slow
def test_online_the_server_has_every_row_once(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    with WandbServer() as server:
        use_server(monkeypatch, server)
        kill(STEP, "tracking=online", call=32 + 20)
        assert lab("shift", tracking="online") == 0
        (served,) = server.runs.values()
    assert served.complete
    assert served.exitcode == 0
    rows = [as_metrics_row(row) for row in served.history if "trainer/global_step" in row]
    assert rows == only_run().rows()


def sweep(settings: list[str], runs_dir: str) -> subprocess.Popen[bytes]:
    quick = ["tracking=off", "figures=false", *SMALL["shift"], EACH_EPOCH, f"runs_dir={runs_dir}"]
    return subprocess.Popen(
        [sys.executable, "-m", "lora_lab.train", "-m", *quick, *settings],
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a process group, to be killed as one
    )


def kill_and_continue(settings: list[str], kills: int, count: int) -> list[Run]:
    """A sweep that is killed -9 that often in mid-run and continued to its end."""
    draws = random.Random(0)
    done: dict[Path, dict] = {}
    tried = 0
    for _ in range(kills):
        process = sweep(settings, "runs")
        wanted = len(done) + draws.randint(1, max(1, count // (2 * kills)))

        def moment(wanted: int = wanted) -> bool:
            states = [(run, run.status["state"]) for run in find_runs(Path("runs"))]
            finished = sum(state == "finished" for _, state in states)
            running = [run for run, state in states if state == "running"]
            return finished >= wanted and any(run.curve("train/loss") for run in running)

        end = time.monotonic() + 120
        while not moment():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        time.sleep(draws.random() / 10)  # anywhere in the run
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        for run in find_runs(Path("runs")):
            if run.finished:
                done.setdefault(run.path, run.status)
        tried += sum(run.status["state"] == "interrupted" for run in find_runs(Path("runs")))
    assert sweep(settings, "runs").wait(timeout=300) == 0
    runs = find_runs(Path("runs"))
    assert tried
    assert [run.status["state"] for run in runs] == ["finished"] * count
    assert {path: Run(path).status for path in done} == done  # none that was finished ran again
    assert sweep(settings, "alone").wait(timeout=300) == 0
    alone = find_runs(Path("alone"))
    assert [run.path.name for run in runs] == [run.path.name for run in alone]
    for run, other in zip(runs, alone, strict=True):
        assert_equal(run, other)
    return runs


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on():
    settings = ["adapter.r=1,2", "seed=0,1", "adapter.dropout=0.3", "trainer.max_epochs=40"]
    runs = kill_and_continue(settings, kills=1, count=4)
    assert any("resumed from epoch" in (run.path / "log.txt").read_text() for run in runs)


@pytest.mark.slow
def test_a_sweep_of_24_runs_killed_three_times():
    settings = ["adapter.r=1,2,3,4,6,8", "seed=0,1,2,3", "trainer.max_epochs=40"]
    runs = kill_and_continue(settings, kills=3, count=24)
    command = [sys.executable, "-m", "lora_lab.cli", "report", "runs/shift"]
    subprocess.run(command, check=True, capture_output=True)
    with Path("runs/shift/report/metrics.csv").open() as file:
        reported = [row for row in csv.DictReader(file) if row["metric"] == "val/loss"]
    losses: dict[int, list[float]] = {}
    for run in runs:
        rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        loss = [row["val/loss"] for row in rows if "val/loss" in row][-1]
        losses.setdefault(run.config["adapter"]["r"], []).append(loss)
    assert {r: len(values) for r, values in losses.items()} == dict.fromkeys((1, 2, 3, 4, 6, 8), 4)
    for row in reported:
        values = losses.pop(int(row["adapter.r"]))
        assert (int(row["n"]), float(row["mean"])) == (
            4,
            pytest.approx(np.mean(values), rel=1e-12),
        )
        assert float(row["std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert not losses
    for name in ("r2-*-seed3-*", "r8-*-seed0-*"):  # and as it is without any sweep
        (run,) = (run for run in runs if run.path.match(name))
        point = (f"adapter.r={run.config['adapter']['r']}", f"seed={run.config['seed']}")
        command = [sys.executable, "-m", "lora_lab.train", *SMALL["shift"], "tracking=off"]
        command += ["trainer.max_epochs=40", EACH_EPOCH, *point, "runs_dir=single"]
        subprocess.run([*command, "bases_dir=single/bases"], check=True, capture_output=True)
        (single,) = (other for other in find_runs(Path("single")) if other.path.match(name))
        assert_equal(run, single)
