"""Runs that are trained in one pass: each must be the run that it is alone, whatever happens."""

import logging
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lora_lab import train
from lora_lab.adapters.pack import Pack
from lora_lab.config import compose
from lora_lab.packing.recorded_step import RecordedStep
from lora_lab.packing.runs import run_pack
from lora_lab.runs import Run, find_runs
from lora_lab.sweeps import multirun
from lora_lab.sweeps.packs import group_into_packs
from lora_lab.training import experiment
from lora_lab.training.plan import Plan, plan
from tests import interrupted_train
from tests.conftest import SMALL, Lab
from tests.sweeps.test_launchers import LOCAL, processes_here, start_endless, wait_for
from tests.sweeps.test_launchers import same_environment as same_environment
from tests.sweeps.test_sweep import RATE, RunSweep, loss_by_rate, sweep_content
from tests.sweeps.test_sweep import run_sweep as run_sweep
from tests.tracking.test_tracking import as_ours, held
from tests.training.test_resume import assert_equal, quick

pytestmark = pytest.mark.usefixtures("same_environment")
Points = Sequence[Sequence[str]]
PACKED = ["-m", "hydra/launcher=packed", "hydra.launcher.n_jobs=1"]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    """What the package says is kept; Lightning says what it must."""
    train.silence_lightning()
    caplog.set_level(logging.INFO, "lora_lab")


def plans(name: str, points: Points, *overrides: str) -> list[Plan]:
    """A small experiment's plans."""
    fixed = [f"experiment={name}", "tracking=off", "figures=false", *SMALL[name]]
    made = []
    for _, cfg in compose.compose_points([[*fixed, *overrides, *point] for point in points]):
        if isinstance(cfg, Exception):
            raise cfg
        made.append(plan(cfg))
    return made


def together(name: str, points: Points, *overrides: str) -> list[Run]:
    """The runs, trained in a pack, of which none fails."""
    made = plans(name, points, *overrides)
    assert run_pack(made, Console(quiet=True)) == [None] * len(made)
    return [Run(one.path) for one in made]


def alone(name: str, points: Points, *overrides: str, root: str = "alone") -> list[Run]:
    """The same runs, one after the other."""
    made = plans(name, points, f"runs_dir={root}", *overrides)
    return [experiment.run(one, Console(quiet=True)) for one in made]


def apart(one: Any, other: Any) -> float:
    """The distance of two arrays, relative."""
    one, other = np.asarray(one, float), np.asarray(other, float)
    assert one.shape == other.shape
    assert (np.isnan(one) == np.isnan(other)).all()
    one, other = np.nan_to_num(one), np.nan_to_num(other)
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-30))


LOSSES = ("train/loss", "val/loss", "merged/val/loss", "base/train/loss", "base/val/loss")


def same(run: Run, other: Run, within: float) -> None:
    """Row by row, file by file: losses `within` of each other, what is derived 1000 times that."""
    assert run.finished
    assert other.finished
    rows, others = run.rows(), other.rows()
    assert [list(row) for row in rows] == [list(row) for row in others]
    for i, (row, wanted) in enumerate(zip(rows, others, strict=True)):
        for key, value in wanted.items():
            far = apart(row[key], value)
            most = within if key in LOSSES else 1000 * within
            tiny = max(abs(row[key]), abs(value)) < most
            assert far <= most or (tiny and key not in LOSSES), (i, key, row[key], value)
        for key in ("step", "epoch"):
            assert row.get(key) == wanted.get(key)
    ours, theirs = (load_file(r.path / "adapter" / "adapter.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert apart(ours[key], value) <= 1000 * within, key
    about = [(r.path / "adapter" / "adapter.json").read_bytes() for r in (run, other)]
    assert about[0] == about[1]
    with np.load(run.path / "spectra.npz") as ours, np.load(other.path / "spectra.npz") as theirs:
        assert list(ours) == list(theirs)
        for key in theirs:
            assert ours[key].shape == theirs[key].shape, key
            assert ours[key].dtype == theirs[key].dtype, key
            if key.endswith("singular_values"):
                assert apart(ours[key], theirs[key]) <= 1000 * within, key
    names = [{p.relative_to(r.path).as_posix() for p in r.path.rglob("*")} for r in (run, other)]
    assert names[0] == names[1]
    identity = ("cell", "seed", "threads")
    assert [run.status[k] for k in identity] == [other.status[k] for k in identity]
    assert run.config == {**other.config, "runs_dir": run.config["runs_dir"]}


def all_same(runs: Sequence[Run], others: Sequence[Run], within: float) -> None:
    assert len(runs) == len(others)
    for run, other in zip(runs, others, strict=True):
        assert run.status.get("packed", len(runs)) == len(runs)
        assert run.path.name == other.path.name
        same(run, other, within)


def r(*ranks: int, seeds: int = 1) -> list[list[str]]:
    return [[f"adapter.r={rank}", f"seed={seed}"] for rank in ranks for seed in range(seeds)]


NUMBERS = [
    ["adapter.r=2"],
    ["adapter.r=4", "optimizer.lr=0.02", "adapter.alpha=1"],
    ["adapter.r=1", "seed=3", "adapter.scaling=alpha"],
    ["adapter.r=4", "adapter.init=gaussian", "adapter.scaling=alpha/sqrt\\(r\\)"],
    ["adapter.r=4", "adapter.init=orthogonal", "seed=1"],
]
RATES = [
    ["optimizer.lr=0.01", "optimizer.schedule=cosine"],
    ["optimizer.lr=0.02", "optimizer.schedule=linear", "optimizer.warmup=0.3", "adapter.r=2"],
    ["optimizer.lr=0.02", "optimizer.schedule=constant", "optimizer.warmup=0.3"],
    ["optimizer.lr=0.005", "optimizer.schedule=constant", "optimizer.warmup=0", "adapter.r=2"],
]
MOMENTS = [
    ["adapter.r=2"],
    ["adapter.r=2", "+optimizer.betas=[0.5,0.9]", "+optimizer.eps=1e-3"],
    ["adapter.r=1", "seed=1"],
]
DECAY = [
    ["optimizer.weight_decay=0.5"],
    ["adapter.r=2", "optimizer.weight_decay=0.5"],
    ["optimizer.weight_decay=0"],
    ["optimizer.weight_decay=0.1", "adapter=lora_plus"],
]
STARTS = [
    ["adapter=pissa", "adapter.r=2"],
    ["adapter=olora", "adapter.r=3", "adapter.alpha=2"],
    ["adapter=pissa", "adapter.r=2", "seed=1"],
]
CORES = [
    ["adapter.r=2"],
    ["adapter.r=4"],
    ["adapter.r=4", "adapter.alpha=2", "optimizer.lr=0.1"],
]
EVERY: dict[str, tuple[str, Points, list[str]]] = {
    "shift": ("shift", r(1, 2, 4, seeds=2), []),
    "numbers": ("digits", NUMBERS, []),
    "conv": ("planted_conv", r(1, 2, 3), []),
    "targets": ("digits_targets", r(1, 2, 4), ["target=[embedding,conv,linear]"]),
    "embedding": ("planted_embedding", r(1, 2, 4, seeds=2), []),
    "attention": ("bytes_lm", r(1, 2, 4), ["target=[attention]"]),
    "language model": ("bytes_lm", r(1, 4), ["target=all"]),
    "rates": ("digits", RATES, []),
    "decay": ("digits", DECAY, ["optimizer=adamw"]),
    "moments": ("digits", MOMENTS, []),
    "momentum": (
        "digits",
        [
            ["optimizer.momentum=0.9"],
            ["optimizer.momentum=0.5", "optimizer.lr=0.1"],
            ["adapter.r=1"],
        ],
        ["optimizer=sgd"],
    ),
    "lora_plus": ("digits", [["adapter=lora_plus"], [], ["adapter=lora_plus", "seed=1"]], []),
    "clip by norm": (
        "digits",
        NUMBERS,
        ["trainer.gradient_clip_val=0.1", "optimizer=sgd", "optimizer.lr=1"],
    ),
    "clip by value": (
        "digits",
        NUMBERS,
        [
            "trainer.gradient_clip_val=0.001",
            "+trainer.gradient_clip_algorithm=value",
            "optimizer=sgd",
            "optimizer.lr=1",
        ],
    ),
    "dora": ("digits", r(1, 2, 4), ["adapter=dora"]),
    "pissa": ("digits", STARTS, []),
    "lora_fa": ("digits", r(1, 2, 4), ["adapter=lora_fa"]),
    "lora_xs": ("digits", CORES, ["adapter=lora_xs"]),
    "every steps": (
        "shift",
        r(1, 2),
        ["spectra.every_n_steps=3", "trainer.check_val_every_n_epoch=3"],
    ),
}


WHOLE = ("shift", "attention")
"""Whose analysis is made, too."""
LESS = ["spectra.truncation=none", "spectra.against_base=false"]
SINGLE = [
    pytest.param(name, "32-true", marks=[] if name in ("shift", "numbers") else pytest.mark.slow)
    for name in EVERY
]


@pytest.mark.parametrize(("name", "precision"), [*((n, "64-true") for n in EVERY), *SINGLE])
def test_each_run_is_what_it_is_alone(name: str, precision: str, caplog: pytest.LogCaptureFixture):
    small, points, overrides = EVERY[name]
    overrides = [*overrides, f"trainer.precision={precision}", *(LESS if name not in WHOLE else [])]
    runs = together(small, points, *overrides)
    assert f"packed: {len(points)} runs" in caplog.text
    all_same(runs, alone(small, points, *overrides), 1e-10 if precision == "64-true" else 1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_half_precision(precision: str, caplog: pytest.LogCaptureFixture):
    """As far as half precision goes: the loss is that of the run alone within its rounding."""
    settings = [f"trainer.precision={precision}", *LESS]
    runs = together("digits", r(1, 2, 4), *settings)
    assert "packed: 3 runs" in caplog.text
    for run, other in zip(runs, alone("digits", r(1, 2, 4), *settings), strict=True):
        assert [list(row) for row in run.rows()] == [list(row) for row in other.rows()]
        assert run.last("val/loss") == pytest.approx(other.last("val/loss"), rel=0.03)


@pytest.mark.parametrize("name", ["clip by norm", "clip by value"])
def test_a_clipped_run_is_clipped(name: str):
    """So that the tests of clipping are of something: without it the runs are others."""
    small, points, overrides = EVERY[name]
    clipped = together(small, points[:2], *overrides, *LESS, "optimizer.lr=0.1")
    free = together(
        small, points[:2], *overrides[-2:-1], *LESS, "optimizer.lr=0.1", "runs_dir=free"
    )
    for one, other in zip(clipped, free, strict=True):
        assert apart(one.last("val/loss"), other.last("val/loss")) > 1e-5


def test_every_run_has_its_own_in_wandb():
    points = r(1, 2, seeds=2)
    runs = together("shift", points, "tracking=offline")
    assert len({run.status["wandb"] for run in runs}) == 4
    for run in runs:
        content = held(run)
        assert content["config"]["adapter"] == run.config["adapter"]
        assert content["config"]["seed"] == run.config["seed"]
        assert content["run"].display_name == run.path.name
        assert content["run"].run_group == run.status["cell"]
        assert content["exit"] == 0
        rows = [row for row in content["history"] if "trainer/global_step" in row]
        assert [as_ours(row) for row in rows] == run.rows()
        assert content["summary"]["val/loss"] == run.last("val/loss")
        assert "wandb_rows_lost" not in run.status
        assert {a.type for a in content["artifacts"]} == {"adapter", "run_table"}
        base = [row for row in run.rows() if "base/val/loss" in row]
        assert [row["epoch"] for row in base] == [2, 4]
    assert len({run.last("val/loss") for run in runs}) == 4


DIVERGES = {
    "at once": ["optimizer.lr=1e30"],
    "adam": ["optimizer.lr=1e25"],
    "later": ["optimizer.lr=0.5", "adapter.alpha=60", "adapter.scaling=alpha"],
}
NEAR = (("at once", 0), ("adam", 1), ("later", 1))


@pytest.mark.parametrize(
    ("how", "place"),
    [
        pytest.param(how, place, marks=[] if (how, place) in NEAR else pytest.mark.slow)
        for how in DIVERGES
        for place in range(3)
    ],
)
def test_a_run_that_diverges_fails_alone(how: str, place: int):
    settings = ["optimizer=adam" if how == "adam" else "optimizer=sgd", *LESS]
    points = [["adapter.r=2"], ["adapter.r=3", "optimizer.lr=0.003"]]
    points.insert(place, ["adapter.r=2", "seed=5", *DIVERGES[how]])
    made = plans("shift", points, *settings, "tracking=offline")
    errors = run_pack(made, Console(quiet=True))
    runs = [Run(one.path) for one in made]
    (bad,) = plans("shift", [points[place]], *settings, "runs_dir=alone")
    with pytest.raises(type(errors[place])) as raised:  # pyright: ignore
        experiment.run(bad, Console(quiet=True))
    assert str(errors[place]) == str(raised.value)
    assert runs[place].status["state"] == "failed"
    assert runs[place].status["error"] == Run(bad.path).status["error"]
    assert str(raised.value) in (runs[place].path / "log.txt").read_text()
    assert held(runs[place])["exit"] == 1
    mine, theirs = runs[place].rows(), Run(bad.path).rows()
    assert [list(row) for row in mine] == [list(row) for row in theirs]
    del points[place], runs[place], errors[place]
    assert errors == [None, None]
    for run, other in zip(runs, alone("shift", points, *settings), strict=True):
        assert held(run)["exit"] == 0
        same_rows(run, other, 1e-5)


def same_rows(run: Run, other: Run, within: float) -> None:
    assert [list(row) for row in run.rows()] == [list(row) for row in other.rows()]
    for row, wanted in zip(run.rows(), other.rows(), strict=True):
        for key in LOSSES:
            if key in wanted:
                assert apart(row[key], wanted[key]) <= within, (key, row, wanted)


def test_where_all_diverge_all_fail():
    points = [["adapter.r=1", "optimizer.lr=1e30"], ["adapter.r=2", "optimizer.lr=1e29"]]
    made = plans("shift", points, "optimizer=sgd")
    errors = run_pack(made, Console(quiet=True))
    assert [type(error).__name__ for error in errors] == ["DivergedError"] * 2
    assert [Run(one.path).status["state"] for one in made] == ["failed"] * 2
    for one, error in zip(made, errors, strict=True):
        assert f"(now {one.cfg.optimizer.lr:g})" in str(error)


def test_a_model_that_vmap_refuses_is_trained_run_by_run(caplog: pytest.LogCaptureFixture):
    settings = ["model._target_=tests.unpackable.BranchesOnOutput", *LESS]
    runs = together("shift", r(1, 2), *settings)
    assert "not packed: the model cannot be computed for many runs" in caplog.text
    assert ".item()" in caplog.text
    assert not any("packed" in run.status for run in runs)
    for run, other in zip(runs, alone("shift", r(1, 2), *settings), strict=True):
        same(run, other, 0)


def packs_of(capsys: pytest.CaptureFixture[str], *points: str, **how: Any) -> tuple[list, str]:
    """How the jobs of a command go together, and what is said."""
    fixed = ["experiment=shift", "tracking=off", "figures=false", *SMALL["shift"], "-m"]
    jobs = multirun.plan_jobs(compose.sweep_points([*fixed, *points]))
    assert not [job.error for job in jobs if job.error]
    capsys.readouterr()
    found = group_into_packs(jobs, range(len(jobs)), how.get("at_once", 1), how.get("most"))
    assert sorted(i for pack in found for i in pack) == list(range(len(jobs)))
    return sorted(map(sorted, found)), capsys.readouterr().out


OWN = {
    "adapter.r": "1,2",
    "adapter.alpha": "1,2",
    "adapter.scaling": "alpha,alpha/r",
    "adapter.init": "kaiming,gaussian,orthogonal",
    "adapter.dropout": "0,0.1",
    "adapter.lr_ratio": "1,16",
    "optimizer.lr": "0.1,0.2",
    "optimizer.schedule": "linear,cosine",
    "optimizer.warmup": "0,0.1",
    "optimizer.fused": "true,false",
    "seed": "0,1",
    "adapter": "lora,gaussian,rslora,lora_plus,orthogonal",
}
"""What may be different within a pack."""
SHARED = {
    "target": "[linear],all",
    "data.batch_size": "32,64",
    "data.seed": "0,1",
    "adapter.trains": "both,zero",
    "adapter.dora": "true,false",
    "adapter.init": "kaiming,pissa",
    "optimizer": "adam,sgd",
    "trainer.max_epochs": "3,4",
    "trainer.gradient_clip_val": "null,1",
    "trainer.precision": "32-true,64-true",
    "base.epochs": "3,4",
    "base.seed": "0,1",
    "spectra.every_n_epochs": "1,2",
    "data.in_features": "11,12",
}
"""And what not."""


@pytest.mark.parametrize("key", OWN)
def test_what_may_be_different_in_a_pack(key: str, capsys: pytest.CaptureFixture[str]):
    found, said = packs_of(capsys, f"{key}={OWN[key]}")
    n = OWN[key].count(",") + 1
    assert found == [list(range(n))]
    assert f"packed: {n} runs, together {n}" in said


@pytest.mark.parametrize("key", SHARED)
def test_what_is_one_in_a_pack(key: str, capsys: pytest.CaptureFixture[str]):
    found, said = packs_of(capsys, f"{key}={SHARED[key]}", "seed=0,1")
    assert found == [[0, 1], [2, 3]]
    assert "packed: 4 runs, together 2, 2" in said
    found, said = packs_of(capsys, f"{key}={SHARED[key]}")
    assert found == [[0], [1]]
    assert "alone: 2 of the runs: no other has base, data and targets" in said


ALONE = {
    "adapter=full": "adapter=full trains no adapter",
    "adapter=none": "adapter=none trains no adapter",
    "spectra.first_step=true": "spectra.first_step asks for the dense gradients",
    "optimizer._target_=torch.optim.Adafactor ~optimizer.fused": "torch.optim.Adafactor",
    "trainer.precision=16-mixed": "16-mixed scales the gradients of all runs by one number",
    "+trainer.accumulate_grad_batches=2": "accumulate_grad_batches is more than 1",
}


@pytest.mark.parametrize("setting", ALONE)
def test_what_cannot_be_packed_is_alone_and_says_why(
    setting: str, capsys: pytest.CaptureFixture[str]
):
    found, said = packs_of(capsys, *setting.split(), "seed=0,1,2")
    assert found == [[0], [1], [2]]
    assert "packed:" not in said
    assert "alone: 3 of the runs: " in said
    assert ALONE[setting] in said


def test_packs_are_split_and_each_has_its_share_of_every_rank(capsys: pytest.CaptureFixture[str]):
    points = ("adapter.r=1,2,4", "seed=0,1,2,3")
    found, _ = packs_of(capsys, *points, most=5)
    assert sorted(map(len, found)) == [4, 4, 4]
    assert packs_of(capsys, *points, most=12)[0] == [list(range(12))]
    assert packs_of(capsys, *points, most=1)[0] == [[i] for i in range(12)]
    found, said = packs_of(capsys, *points, at_once=2)
    assert list(map(len, found)) == [6, 6]
    assert "packed: 12 runs, together 6, 6" in said
    for pack in found:
        assert sorted(i // 4 for i in pack) == [0, 0, 1, 1, 2, 2]


def stopped(
    monkeypatch: pytest.MonkeyPatch, made: Sequence[Plan], call: int, what: str = ""
) -> None:
    """A pack that Ctrl-C ends before a training step."""

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        what = what or "lora_lab.packing.module:PackedModule.training_step"
        patch.setattr(*interrupted_train.acting_at_call(what, call, "before", stop))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run_pack(made, Console(quiet=True))
    for one in made:
        assert Run(one.path).status["state"] == "interrupted"


GOES_ON = {
    "adam": ["adapter.dropout=0"],
    "dropout": ["adapter.dropout=0.3"],
    "momentum": ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.01"],
    "schedule": ["optimizer=adamw", "optimizer.schedule=cosine", "optimizer.warmup=0.3"],
    "dora": ["adapter=dora"],
    "pissa": ["adapter=pissa"],
    "lora_plus": ["adapter=lora_plus"],
}
MIXED = [["adapter.r=2", "optimizer.lr=0.02"], ["adapter.r=1"], ["adapter.r=2", "seed=1"]]
EPOCH = 8  # steps


@pytest.mark.parametrize("how", quick(GOES_ON, ("dropout", "schedule", "lora_plus")))
def test_a_pack_goes_on_bit_for_bit(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*GOES_ON[how], *LESS, "checkpoint_every=0"]
    made = plans("shift", MIXED, *settings)
    whole = together("shift", MIXED, *settings, "runs_dir=whole")
    stopped(monkeypatch, made, 2 * EPOCH + 3)
    for one in made:
        kept = torch.load(one.path / "checkpoints" / "last.ckpt", "cpu", weights_only=True)
        state = kept["optimizer_states"][0]["state"].values()
        held = [*kept["state_dict"].values(), *(t for of in state for t in of.values())]
        tensors = [t for t in held if isinstance(t, torch.Tensor)]
        # Laid out as alone, and with no other run's beside them in the memory that is written.
        assert all(t.is_contiguous() for t in tensors)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    caplog.clear()
    runs = together("shift", MIXED, *settings)
    assert "run resumed from epoch 2 of 4" in caplog.text
    for run, other in zip(runs, whole, strict=True):
        assert run.status["tries"] == 2
        assert not (run.path / "checkpoints").exists()
        assert_equal(run, other)


@pytest.mark.parametrize("how", quick(sorted(GOES_ON.keys() - {"dropout"}), ("schedule", "pissa")))
def test_a_run_of_a_pack_goes_on_alone_and_a_run_alone_in_a_pack(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*GOES_ON[how], *LESS, "checkpoint_every=0", "trainer.precision=64-true"]
    wanted = alone("shift", MIXED, *settings, root="wanted")
    made = plans("shift", MIXED, *settings)
    stopped(monkeypatch, made, 2 * EPOCH + 3)
    caplog.clear()
    for one, other in zip(made, wanted, strict=True):
        run = experiment.run(one, Console(quiet=True))
        assert run.status["tries"] == 2
        same(run, other, 1e-10)
    assert caplog.text.count("run resumed from epoch 2 of 4") == 3
    made = plans("shift", MIXED, *settings, "runs_dir=back")
    for one in made:
        step = "lora_lab.training.modules:BaseModule.training_step"
        with monkeypatch.context() as patch:
            patch.setattr(
                *interrupted_train.acting_at_call(step, 2 * EPOCH + 3, "before", interrupt)
            )
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                experiment.run(one, Console(quiet=True))
    caplog.clear()
    for run, other in zip(
        together("shift", MIXED, *settings, "runs_dir=back"), wanted, strict=True
    ):
        assert run.status["packed"] == 3
        assert run.status["tries"] == 2
        same(run, other, 1e-10)
    assert "run resumed from epoch 2 of 4" in caplog.text


def interrupt() -> None:
    raise KeyboardInterrupt


def test_runs_that_are_at_different_epochs_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*LESS, "checkpoint_every=0", "trainer.precision=64-true"]
    points = r(1, 2, 3, seeds=2)
    wanted = alone("shift", points, *settings, root="wanted")
    made = plans("shift", points, *settings)
    stopped(monkeypatch, made[:2], EPOCH + 3)
    stopped(monkeypatch, made[2:4], 3 * EPOCH + 3)
    caplog.clear()
    runs = together("shift", points, *settings)
    assert [run.status.get("tries", 1) for run in runs] == [2, 2, 2, 2, 1, 1]
    assert all(run.status["packed"] == 2 for run in runs)
    for n in (1, 3):
        assert f"run resumed from epoch {n} of 4" in caplog.text
    for run, other in zip(runs, wanted, strict=True):
        same(run, other, 1e-10)


def test_what_is_finished_is_not_repeated_and_what_is_busy_is_told():
    made = plans("shift", r(1, 2, 3))
    first = experiment.run(made[1], Console(quiet=True)).status
    errors = run_pack(made, Console(quiet=True))
    assert [type(error).__name__ for error in errors] == [
        "NoneType",
        "RunFinishedError",
        "NoneType",
    ]
    assert Run(made[1].path).status == first
    assert [Run(one.path).status.get("packed") for one in made] == [2, None, 2]
    twice = plans("shift", [["adapter.r=1", "seed=9"]] * 2)
    errors = run_pack(twice, Console(quiet=True))
    assert [type(error).__name__ for error in errors] == ["NoneType", "RunBusyError"]


def test_out_of_memory_it_goes_on_with_fewer_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*LESS, "trainer.precision=64-true"]
    points = [*r(1, 2, seeds=2), ["adapter.r=2", "optimizer.lr=0.02", "adapter=lora_plus"]]
    real, full = Pack.forward, []

    def forward(pack: Pack, *inputs: torch.Tensor) -> torch.Tensor:
        if len(pack.runs) > 2 and pack.training and torch.is_grad_enabled():
            full.append(len(pack.runs))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pack, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "forward", forward)
        runs = together("shift", points, *settings)
    assert full == [5, 3]
    assert "out of memory: going on with 3 runs at once" in caplog.text
    assert "out of memory: going on with 2 runs at once" in caplog.text
    all_same(runs, alone("shift", points, *settings), 1e-10)


def test_out_of_memory_in_the_middle(monkeypatch: pytest.MonkeyPatch):
    """What the optimizer knew of each run stays with it."""
    settings = [*LESS, "trainer.precision=64-true", "optimizer.schedule=cosine"]
    points = [*r(1, 2, seeds=2), ["adapter.r=2", "optimizer.lr=0.02", "adapter=lora_plus"]]
    real, calls = RecordedStep.__call__, []

    def step(self: RecordedStep, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(self.pack.runs) > 2:
            calls.append(self.checked)
            if len(calls) == EPOCH + 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "__call__", step)
        runs = together("shift", points, *settings)
    assert calls[: EPOCH + 6] == [False, False, *[True] * (EPOCH + 2), False, False]
    assert len(calls) > EPOCH + 6
    all_same(runs, alone("shift", points, *settings), 1e-10)


@pytest.mark.parametrize("small", ["digits", pytest.param("bytes_lm", marks=pytest.mark.slow)])
def test_several_passes_give_the_same(
    small: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*LESS, "trainer.precision=64-true"]
    points = r(1, 2, 4, seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.packing.module.MAX_SAVED_BYTES_ON_CPU", 1)
        runs = together(small, points, *settings, "trainer.accelerator=cpu")
    assert "packed: 6 runs, 1 at once" in caplog.text
    once = together(small, points, *settings, "trainer.accelerator=cpu", "runs_dir=once")
    assert "packed: 6 runs, 6 at once" in caplog.text
    for run, other in zip(runs, once, strict=True):
        same(run, other, 1e-10)


@pytest.mark.parametrize("name", ["shift", "digits", "planted_embedding", "planted_conv"])
def test_nothing_is_dropped_where_the_loss_is_measured(name: str):
    """The last loss of a run that drops is that of its merged model, which cannot."""
    for run in together(name, [["adapter.dropout=0.5"], ["adapter.dropout=0.3"]], *LESS):
        assert run.last("val/loss") == pytest.approx(run.last("merged/val/loss"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shift", "digits", "planted_embedding", "planted_conv"])
def test_dropout_is_what_it_is_alone_in_the_mean(name: str):
    points = [["adapter.dropout=0.3", f"seed={seed}"] for seed in range(20)]
    packed = [run.last("val/loss") for run in together(name, points, *LESS)]
    single = [run.last("val/loss") for run in alone(name, points, *LESS)]
    apart = np.array(packed, float) - np.array(single, float)
    assert apart.any()
    assert abs(apart.mean()) < 3 * apart.std(ddof=1) / math.sqrt(len(apart))
    # And it matters: without it the loss is another.
    without = [run.last("val/loss") for run in together(name, [[p[1]] for p in points], *LESS)]
    moved = np.array(packed, float) - np.array(without, float)
    assert abs(moved.mean()) > 3 * moved.std(ddof=1) / math.sqrt(len(moved))


def by_name(root: str = "runs") -> dict[str, Run]:
    return {run.path.name: run for run in find_runs(Path(root))}


def as_basic(lab: Lab, launcher: list[str], capsys: pytest.CaptureFixture[str], told: str) -> None:
    """A multirun by the launcher gives what basic gives, and a second does nothing."""
    points = ("adapter.r=1,2", "seed=0,1", "adapter=lora,lora_plus")
    capsys.readouterr()
    assert lab("shift", *points, *launcher) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert "multirun: 8 runs" in shown
    assert "8 of 8 done" in shown
    assert lab("shift", *points, "-m", "runs_dir=one") == 0
    runs, others = by_name(), by_name("one")
    assert runs.keys() == others.keys()
    assert len(runs) == 8
    for name, run in runs.items():
        assert run.status["packed"] >= 2
        assert (run.path / "report" / "table.md").exists()
        same(run, others[name], 1e-5)
    assert not list(Path("runs").glob(".sweeps/*"))
    before = [run.status for run in runs.values()]
    capsys.readouterr()
    assert lab("shift", *points, *launcher) == 0
    assert "multirun: 8 runs (8 finished)" in capsys.readouterr().out
    assert [run.status for run in by_name().values()] == before


def test_packed_gives_what_basic_gives(lab: Lab, capsys: pytest.CaptureFixture[str]):
    as_basic(lab, PACKED, capsys, "packed: 8 runs, together 8")


@pytest.mark.slow
def test_joblib_packs_where_it_is_asked_to(lab: Lab, capsys: pytest.CaptureFixture[str]):
    launcher = ["-m", "hydra/launcher=joblib", "hydra.launcher.pack=true"]
    launcher += ["hydra.launcher.n_jobs=2", "hydra.launcher.max_runs=3"]
    as_basic(lab, launcher, capsys, "packed: 8 runs, together 3, 3, 2")


@pytest.mark.slow
def test_submitit_packs_where_it_is_asked_to(lab: Lab, capsys: pytest.CaptureFixture[str]):
    as_basic(lab, [*LOCAL, "hydra.launcher.pack=true"], capsys, "packed: 8 runs, together 8")


def test_by_the_command_each_ends_by_itself(lab: Lab, capsys: pytest.CaptureFixture[str]):
    """Some finish, one diverges, one cannot be; what cannot be packed is alone."""
    points = ("optimizer=sgd", "optimizer.lr=1e-3,1e30,2e-3", "adapter.r=1,99")
    assert lab("shift", *points, *PACKED) == 1
    shown = capsys.readouterr().out
    assert "packed: 3 runs, together 3" in shown
    assert "multirun: 6 runs (3 config error)" in shown
    assert "2 of 3 done, 1 failed" in shown
    rows = [line.split()[0] for line in shown.splitlines() if " adapter.r=" in line]
    assert sorted(rows) == [*["config"] * 3, "failed", "finished", "finished"]
    assert "DivergedError: train/loss became" in shown
    # The same command again repeats what failed, alone.
    before = {name: run.status for name, run in by_name().items() if run.finished}
    assert lab("shift", *points, *PACKED) == 1
    assert {name: run.status for name, run in by_name().items() if run.finished} == before
    assert "packed:" not in capsys.readouterr().out


def test_a_pack_whose_process_is_killed_goes_on(lab: Lab, capsys: pytest.CaptureFixture[str]):
    target = "model._target_=tests.process_models.KillsItself"
    settings = (target, "adapter.r=1,2", "seed=0,1", "checkpoint_every=0", *LESS, *PACKED)
    assert lab("shift", *settings, "runs_dir=whole") == 0
    Path("kill").touch()
    assert lab("shift", *settings) == 1
    shown = capsys.readouterr().out
    assert "its process ended by SIGKILL (out of memory?)" in shown
    assert "0 of 4 done, 4 interrupted" in shown
    assert {run.status["state"] for run in by_name().values()} == {"interrupted"}
    assert lab("shift", *settings) == 0
    whole = by_name("whole")
    for name, run in by_name().items():
        assert run.status["tries"] == 2
        assert "resumed from epoch" in (run.path / "log.txt").read_text()
        assert_equal(run, whole[name])


@pytest.mark.slow
def test_ctrl_c_ends_a_pack():
    process = start_endless(*PACKED, "hydra.launcher.max_runs=2")
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    wait_for(lambda: not processes_here())
    assert [run.status["state"] for run in find_runs(Path("runs"))] == ["interrupted"] * 2


@pytest.mark.parametrize("method", ["grid", pytest.param("random", marks=pytest.mark.slow)])
def test_a_sweep_file_packs(method: str, run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]):
    values = {"values": [0.01, 0.1]} if method == "grid" else RATE
    cap = None if method == "grid" else 4
    content = sweep_content(method, cap, optimizer__lr=values, adapter__r={"values": [1, 2]})
    assert run_sweep(content, *PACKED[1:]) == 0
    assert "packed: 4 runs, together 4" in capsys.readouterr().out
    assert all(run.status["packed"] == 4 for run in by_name().values())
    assert run_sweep(content, "runs_dir=basic") == 0
    assert loss_by_rate().keys() == loss_by_rate("basic").keys()
    for name, run in by_name("basic").items():
        same_rows(by_name()[name], run, 1e-5)
