"""Runs that are trained in one pass: each must be the run that it is alone, whatever happens."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lora_lab import compose, experiment, multirun, packing, train
from lora_lab.adapters.packed import Pack
from lora_lab.launcher.packs import packs
from lora_lab.plan import Plan, plan
from lora_lab.runs import Run, find_runs
from tests import killed
from tests.conftest import SMALL, Lab
from tests.test_launchers import alike as alike
from tests.test_resume import assert_equal
from tests.test_sweep import RATE, Sweep, file, rates
from tests.test_sweep import run_sweep as run_sweep
from tests.test_tracking import as_ours, held

pytestmark = pytest.mark.usefixtures("alike")
Points = Sequence[Sequence[str]]
PACKED = ["-m", "hydra/launcher=packed", "hydra.launcher.n_jobs=1"]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the package says is kept; Lightning says what it must."""
    train.quiet()
    caplog.set_level(logging.INFO, "lora_lab")
    yield


def plans(name: str, points: Points, *overrides: str) -> list[Plan]:
    """A small experiment's plans."""
    fixed = [f"experiment={name}", "tracking=off", "figures=false", *SMALL[name]]
    made = []
    for _, cfg in compose.every([[*fixed, *overrides, *point] for point in points]):
        if isinstance(cfg, Exception):
            raise cfg
        made.append(plan(cfg))
    return made


def together(name: str, points: Points, *overrides: str) -> list[Run]:
    """The runs, trained in a pack, of which none fails."""
    made = plans(name, points, *overrides)
    assert experiment.run_pack(made, Console(quiet=True)) == [None] * len(made)
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
        [["optimizer.momentum=0.9"], ["optimizer.momentum=0.5", "optimizer.lr=0.1"], ["adapter.r=1"]],
        ["optimizer=sgd"],
    ),
    "lora_plus": ("digits", [["adapter=lora_plus"], [], ["adapter=lora_plus", "seed=1"]], []),
    "clip by norm": ("digits", NUMBERS, ["trainer.gradient_clip_val=0.1", "optimizer=sgd", "optimizer.lr=1"]),
    "clip by value": (
        "digits",
        NUMBERS,
        ["trainer.gradient_clip_val=0.001", "+trainer.gradient_clip_algorithm=value", "optimizer=sgd", "optimizer.lr=1"],
    ),
    "dora": ("digits", r(1, 2, 4), ["adapter=dora"]),
    "pissa": ("digits", STARTS, []),
    "lora_fa": ("digits", r(1, 2, 4), ["adapter=lora_fa"]),
    "lora_xs": ("digits", CORES, ["adapter=lora_xs"]),
    "every steps": ("shift", r(1, 2), ["spectra.every_n_steps=3", "trainer.check_val_every_n_epoch=3"]),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_each_run_is_what_it_is_alone(name: str, precision: str, caplog):
    small, points, overrides = EVERY[name]
    overrides = [*overrides, f"trainer.precision={precision}"]
    runs = together(small, points, *overrides)
    assert f"packed: {len(points)} runs" in caplog.text
    all_same(runs, alone(small, points, *overrides), 1e-10 if precision == "64-true" else 1e-5)
