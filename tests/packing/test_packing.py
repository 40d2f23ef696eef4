"""Runs trained together as a pack: each gives what it gives by itself, whatever happens.

Independent truth: the same runs trained one after another outside of a pack, compared row by row
and file by file; for going on after an interruption, a pack that is not interrupted, bit for bit;
for W&B, the files that its client wrote; for multiruns, Hydra's basic launcher.

Run: make test ARGS="tests/packing/test_packing.py -k shift" (all of it takes many minutes)
"""

import itertools
import json
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

from lora_lab.adapters.pack import Pack
from lora_lab.config import compose
from lora_lab.console import silence_lightning
from lora_lab.packing.recorded_step import RecordedStep
from lora_lab.packing.runs import run_pack
from lora_lab.runs import Run, find_runs
from lora_lab.sweeps import multirun
from lora_lab.sweeps.packs import group_into_packs
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import experiment, finish
from lora_lab.training.callbacks import checkpoint
from lora_lab.training.plan import Plan, plan
from tests import interrupted_train
from tests.conftest import SMALL, Lab, quick
from tests.sweeps.test_launchers import LOCAL, processes_here, start_endless, wait_for
from tests.sweeps.test_launchers import same_environment as same_environment
from tests.sweeps.test_sweep import RATE, RunSweep, loss_by_rate, sweep_content
from tests.sweeps.test_sweep import run_sweep as run_sweep
from tests.tracking.test_tracking import as_metrics_row, wandb_content
from tests.training.test_resume import assert_equal

pytestmark = pytest.mark.usefixtures("same_environment")
Points = Sequence[Sequence[str]]
PACKED = ["-m", "hydra/launcher=packed", "hydra.launcher.n_jobs=1"]


@pytest.fixture(autouse=True)
def package_log(caplog: pytest.LogCaptureFixture) -> None:
    """Collects what the package logs, and silences Lightning's warnings."""
    silence_lightning()
    caplog.set_level(logging.INFO, "lora_lab")


def plans_of(name: str, points: Points, *overrides: str) -> list[Plan]:
    """The plans of an experiment in a small size, one for each of `points`."""
    fixed = [f"experiment={name}", "tracking=off", "figures=false", *SMALL[name]]
    run_plans = []
    for _, cfg in compose.compose_points([[*fixed, *overrides, *point] for point in points]):
        if isinstance(cfg, Exception):
            raise cfg
        run_plans.append(plan(cfg))
    return run_plans


def train_in_pack(name: str, points: Points, *overrides: str) -> list[Run]:
    """The runs of an experiment, trained in one pack; none may fail."""
    run_plans = plans_of(name, points, *overrides)
    assert run_pack(run_plans, Console(quiet=True)) == [None] * len(run_plans)
    return [Run(run_plan.path) for run_plan in run_plans]


def train_one_by_one(name: str, points: Points, *overrides: str, root: str = "alone") -> list[Run]:
    """The same runs, trained one after another outside of a pack."""
    run_plans = plans_of(name, points, f"runs_dir={root}", *overrides)
    return [experiment.run(run_plan, Console(quiet=True)) for run_plan in run_plans]


def relative_distance(one: Any, other: Any) -> float:
    """|one − other| / |other|, of numbers or arrays that are NaN in the same places."""
    one, other = np.asarray(one, float), np.asarray(other, float)
    assert one.shape == other.shape
    assert (np.isnan(one) == np.isnan(other)).all()
    one, other = np.nan_to_num(one), np.nan_to_num(other)
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-30))


LOSSES = ("train/loss", "val/loss", "merged/val/loss", "base/train/loss", "base/val/loss")


def check_same_run(run: Run, other: Run, within: float) -> None:
    """Compares two finished runs, row by row and file by file.

    Losses may be `within` of each other, relative; what is derived from weights 1000 times that.
    """
    assert run.finished
    assert other.finished
    rows, others = run.rows(), other.rows()
    assert [list(row) for row in rows] == [list(row) for row in others]
    for i, (row, expected) in enumerate(zip(rows, others, strict=True)):
        for key, value in expected.items():
            distance = relative_distance(row[key], value)
            tolerance = within if key in LOSSES else 1000 * within
            is_tiny = max(abs(row[key]), abs(value)) < tolerance
            is_close = distance <= tolerance or (is_tiny and key not in LOSSES)
            assert is_close, (i, key, row[key], value)
        for key in ("step", "epoch"):
            assert row.get(key) == expected.get(key)
    ours, theirs = (load_file(r.path / "adapter" / "adapter.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert relative_distance(ours[key], value) <= 1000 * within, key
    about = [json.loads((r.path / "adapter" / "adapter.json").read_text()) for r in (run, other)]
    for description in about:
        del description["sha256"]  # of the tensors, which are compared above
    assert about[0] == about[1]
    with np.load(run.path / "spectra.npz") as ours, np.load(other.path / "spectra.npz") as theirs:
        assert list(ours) == list(theirs)
        for key in theirs:
            assert ours[key].shape == theirs[key].shape, key
            assert ours[key].dtype == theirs[key].dtype, key
            if key.endswith("singular_values"):
                assert relative_distance(ours[key], theirs[key]) <= 1000 * within, key
    names = [{p.relative_to(r.path).as_posix() for p in r.path.rglob("*")} for r in (run, other)]
    assert names[0] == names[1]
    identity = ("cell", "seed", "threads")
    assert [run.status[k] for k in identity] == [other.status[k] for k in identity]
    assert run.config == {**other.config, "runs_dir": run.config["runs_dir"]}


def check_same_runs(runs: Sequence[Run], others: Sequence[Run], within: float) -> None:
    assert len(runs) == len(others)
    for run, other in zip(runs, others, strict=True):
        assert run.status.get("packed", len(runs)) == len(runs)
        assert run.path.name == other.path.name
        check_same_run(run, other, within)


def ranks_and_seeds(*ranks: int, seeds: int = 1) -> list[list[str]]:
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
    ["adapter=lora_ga", "adapter.r=2", "adapter.calibration=2"],
]
CORES = [
    ["adapter.r=2"],
    ["adapter.r=4"],
    ["adapter.r=4", "adapter.alpha=2", "optimizer.lr=0.1"],
]
STOPPED = [[f"optimizer.lr={lr}", f"adapter.r={r}"] for lr, r in ((1, 2), (40, 1), (7, 2), (12, 1))]
"""The last of 32 steps, an epoch's end, within an epoch (the 28th), another epoch's end."""
STOPS = [
    *("adapter=lora_fa", "optimizer=sgd", "trainer.val_check_interval=4"),
    *("select=best val/loss", "early_stopping={metric: val/loss, patience: 1}"),
]
VARIANTS: dict[str, tuple[str, Points, list[str]]] = {
    "shift": ("shift", ranks_and_seeds(1, 2, 4, seeds=2), []),
    "numbers": ("digits", NUMBERS, []),
    "conv": ("planted_conv", ranks_and_seeds(1, 2, 3), []),
    "targets": ("digits_targets", ranks_and_seeds(1, 2, 4), ["target=[embedding,conv,linear]"]),
    "embedding": ("planted_embedding", ranks_and_seeds(1, 2, 4, seeds=2), []),
    "attention": ("bytes_lm", ranks_and_seeds(1, 2, 4), ["target=[attention]"]),
    "language model": ("bytes_lm", ranks_and_seeds(1, 4), ["target=all"]),
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
    "ends within an epoch": (
        "shift",
        ranks_and_seeds(1, 2),
        [
            *("trainer.max_steps=13", "trainer.val_check_interval=4"),
            "trainer.log_every_n_steps=3",
        ],
    ),
    "each ends when it gets no better": ("shift", STOPPED, STOPS),
    "accumulated": (
        "shift",
        [*RATES[:2], ["adapter.r=2", "optimizer.lr=0.02", "seed=1"]],
        ["trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.05"],
    ),
    "dora": ("digits", ranks_and_seeds(1, 2, 4), ["adapter=dora"]),
    "pissa": ("digits", STARTS, []),
    "eva": (
        "digits",
        [
            *(["adapter=eva", "adapter.r=2"], ["adapter.r=3"]),
            ["adapter=eva", "adapter.r=2", "adapter.rho=3"],  # ranks of 1 and 3
        ],
        [],
    ),
    "lora_fa": ("digits", ranks_and_seeds(1, 2, 4), ["adapter=lora_fa"]),
    "lora_xs": ("digits", CORES, ["adapter=lora_xs"]),
    "spectra by step": (
        "shift",
        ranks_and_seeds(1, 2),
        ["spectra.every_n_steps=3", "trainer.check_val_every_n_epoch=3"],
    ),
}


WITH_ANALYSIS = ("shift", "attention")
"""Variants that are tested with the analysis after the last step; the others go without it."""
NO_ANALYSIS = ["spectra.truncation=none", "spectra.against_base=false"]
SLOW = ("momentum", "moments", "rates", "clip by value", "lora_plus", "lora_fa", "language model")
SLOW += ("targets", "numbers", "decay", "embedding", "lora_xs", "pissa", "eva")
"""Variants of which a quick test has one of the same kind."""
QUICK = [(name, "64-true") for name in VARIANTS if name not in SLOW]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(VARIANTS, ("64-true", "32-true"))
    ],
)
def test_each_run_gives_what_it_gives_by_itself(
    name: str, precision: str, caplog: pytest.LogCaptureFixture
):
    small, points, overrides = VARIANTS[name]
    overrides = [
        *overrides,
        f"trainer.precision={precision}",
        *(NO_ANALYSIS if name not in WITH_ANALYSIS else []),
    ]
    runs = train_in_pack(small, points, *overrides)
    assert f"packed: {len(points)} runs" in caplog.text
    check_same_runs(
        runs, train_one_by_one(small, points, *overrides), 1e-10 if precision == "64-true" else 1e-5
    )


@pytest.mark.parametrize("precision", quick(["bf16-true", "bf16-mixed"], ["bf16-true"]))
def test_in_half_precision(precision: str, caplog: pytest.LogCaptureFixture):
    """The loss is that of the run by itself within the rounding of half precision."""
    settings = [f"trainer.precision={precision}", *NO_ANALYSIS]
    runs = train_in_pack("digits", ranks_and_seeds(1, 2, 4), *settings)
    assert "packed: 3 runs" in caplog.text
    for run, other in zip(
        runs, train_one_by_one("digits", ranks_and_seeds(1, 2, 4), *settings), strict=True
    ):
        assert [list(row) for row in run.rows()] == [list(row) for row in other.rows()]
        assert run.last("val/loss") == pytest.approx(other.last("val/loss"), rel=0.03)


@pytest.mark.parametrize(
    "name", ["clip by norm", pytest.param("clip by value", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_clipping_changes_the_runs(name: str):
    """Otherwise the variants above that clip would test nothing."""
    small, points, overrides = VARIANTS[name]
    clipped = train_in_pack(small, points[:2], *overrides, *NO_ANALYSIS, "optimizer.lr=0.1")
    free = train_in_pack(
        small, points[:2], *overrides[-2:-1], *NO_ANALYSIS, "optimizer.lr=0.1", "runs_dir=free"
    )
    for one, other in zip(clipped, free, strict=True):
        assert relative_distance(one.last("val/loss"), other.last("val/loss")) > 1e-5


def test_each_run_is_a_run_in_wandb():
    points = ranks_and_seeds(1, 2, seeds=2)
    runs = train_in_pack("shift", points, "tracking=offline")
    assert len({run.status["wandb"] for run in runs}) == 4
    for run in runs:
        content = wandb_content(run)
        assert content["config"]["adapter"] == run.config["adapter"]
        assert content["config"]["seed"] == run.config["seed"]
        assert content["run"].display_name == run.path.name
        assert content["run"].run_group == run.status["cell"]
        assert content["exit"] == 0
        rows = [row for row in content["history"] if "trainer/global_step" in row]
        assert [as_metrics_row(row) for row in rows] == run.rows()
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
WITHOUT_SLOW = (("later", 1),)


@pytest.mark.parametrize(
    ("how", "place"),
    [
        pytest.param(how, place, marks=[] if (how, place) in WITHOUT_SLOW else pytest.mark.slow)
        for how in DIVERGES
        for place in range(3)
    ],
)
def test_a_run_that_diverges_fails_and_the_others_go_on(how: str, place: int):
    settings = ["optimizer=adam" if how == "adam" else "optimizer=sgd", *NO_ANALYSIS]
    points = [["adapter.r=2"], ["adapter.r=3", "optimizer.lr=0.003"]]
    points.insert(place, ["adapter.r=2", "seed=5", *DIVERGES[how]])
    run_plans = plans_of("shift", points, *settings, "tracking=offline")
    errors = run_pack(run_plans, Console(quiet=True))
    runs = [Run(run_plan.path) for run_plan in run_plans]
    (diverging,) = plans_of("shift", [points[place]], *settings, "runs_dir=alone")
    with pytest.raises(type(errors[place])) as raised:  # pyright: ignore
        experiment.run(diverging, Console(quiet=True))
    assert str(errors[place]) == str(raised.value)
    assert runs[place].status["state"] == "failed"
    assert runs[place].status["error"] == Run(diverging.path).status["error"]
    assert str(raised.value) in (runs[place].path / "log.txt").read_text()
    assert wandb_content(runs[place])["exit"] == 1
    packed_rows, single_rows = runs[place].rows(), Run(diverging.path).rows()
    assert [list(row) for row in packed_rows] == [list(row) for row in single_rows]
    del points[place], runs[place], errors[place]
    assert errors == [None, None]
    for run, other in zip(runs, train_one_by_one("shift", points, *settings), strict=True):
        assert wandb_content(run)["exit"] == 0
        check_same_losses(run, other, 1e-5)


def check_same_losses(run: Run, other: Run, within: float) -> None:
    assert [list(row) for row in run.rows()] == [list(row) for row in other.rows()]
    for row, expected in zip(run.rows(), other.rows(), strict=True):
        for key in LOSSES:
            if key in expected:
                assert relative_distance(row[key], expected[key]) <= within, (key, row, expected)


def test_a_run_whose_loggers_cannot_begin_fails_by_itself(monkeypatch: pytest.MonkeyPatch):
    run_plans = plans_of("shift", ranks_and_seeds(1, 2, 4))

    class FailsForTheFirst(Tracking):
        def __init__(self, cfg: Any, run: Run, directory: Path):
            if directory == run_plans[0].path:
                raise OSError("no space left")
            super().__init__(cfg, run, directory)

    monkeypatch.setattr("lora_lab.training.experiment.Tracking", FailsForTheFirst)
    errors = run_pack(run_plans, Console(quiet=True))
    assert [str(error) for error in errors[:1]] == ["no space left"]
    assert errors[1:] == [None] * (len(run_plans) - 1)
    states = [Run(run_plan.path).status["state"] for run_plan in run_plans]
    assert states == ["failed"] + ["finished"] * (len(run_plans) - 1)


def test_where_all_diverge_all_fail():
    points = [["adapter.r=1", "optimizer.lr=1e30"], ["adapter.r=2", "optimizer.lr=1e29"]]
    run_plans = plans_of("shift", points, "optimizer=sgd")
    errors = run_pack(run_plans, Console(quiet=True))
    assert [type(error).__name__ for error in errors] == ["DivergedError"] * 2
    assert [Run(run_plan.path).status["state"] for run_plan in run_plans] == ["failed"] * 2
    for run_plan, error in zip(run_plans, errors, strict=True):
        assert f"(now {run_plan.cfg.optimizer.lr:g})" in str(error)


def test_a_model_that_vmap_refuses_is_trained_run_by_run(caplog: pytest.LogCaptureFixture):
    settings = ["model._target_=tests.unpackable.BranchesOnOutput", *NO_ANALYSIS]
    runs = train_in_pack("shift", ranks_and_seeds(1, 2), *settings)
    assert "not packed: the model cannot be computed for many runs" in caplog.text
    assert ".item()" in caplog.text
    assert not any("packed" in run.status for run in runs)
    for run, other in zip(
        runs, train_one_by_one("shift", ranks_and_seeds(1, 2), *settings), strict=True
    ):
        check_same_run(run, other, 0)


def test_runs_whose_sites_are_told_by_data_are_trained_run_by_run_where_these_differ(
    caplog: pytest.LogCaptureFixture,
):
    points = [["adapter=eva", "adapter.r=1", f"adapter.rho={rho}"] for rho in (2, 1)]
    runs = train_in_pack("digits", points, *NO_ANALYSIS)
    assert "not packed" in caplog.text
    assert "their adapters sit on different sites" in caplog.text
    others = train_one_by_one("digits", points, *NO_ANALYSIS)
    for run, other in zip(runs, others, strict=True):
        check_same_run(run, other, 0)


def packs_of_command(
    capsys: pytest.CaptureFixture[str], *points: str, **how: Any
) -> tuple[list, str]:
    """The packs that the jobs of a command are sorted into, and what is printed."""
    fixed = ["experiment=shift", "tracking=off", "figures=false", *SMALL["shift"], "-m"]
    jobs = multirun.plan_jobs(compose.sweep_points([*fixed, *points]))
    assert not [job.error for job in jobs if job.error]
    capsys.readouterr()
    processes, max_runs = how.get("processes", 1), how.get("max_runs")
    packs = group_into_packs(jobs, range(len(jobs)), processes, max_runs)
    assert sorted(i for pack in packs for i in pack) == list(range(len(jobs)))
    return sorted(map(sorted, packs)), capsys.readouterr().out


MAY_DIFFER = {
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
"""Settings that may differ between the runs of a pack."""
MUST_AGREE = {
    "target": "[linear],all",
    "data.batch_size": "32,64",
    "data.seed": "0,1",
    "adapter.trains": "both,zero",
    "adapter.dora": "true,false",
    "adapter": "loha,lokr",
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
"""Settings that all runs of a pack have in common."""


def test_a_few_runs_share_a_process_on_a_machine_of_many_cores(capsys: pytest.CaptureFixture[str]):
    for seeds, sizes in (("0,1,2", [3]), (",".join(map(str, range(9))), [5, 4])):
        packs, printed = packs_of_command(capsys, f"seed={seeds}", processes=64)
        assert sorted(map(len, packs), reverse=True) == sizes
        assert "alone" not in printed


@pytest.mark.parametrize("key", MAY_DIFFER)
def test_settings_that_may_differ_in_a_pack(key: str, capsys: pytest.CaptureFixture[str]):
    packs, printed = packs_of_command(capsys, f"{key}={MAY_DIFFER[key]}")
    n = MAY_DIFFER[key].count(",") + 1
    assert packs == [list(range(n))]
    assert f"packed: {n} runs, together {n}" in printed


@pytest.mark.parametrize("key", MUST_AGREE)
def test_settings_that_separate_packs(key: str, capsys: pytest.CaptureFixture[str]):
    packs, printed = packs_of_command(capsys, f"{key}={MUST_AGREE[key]}", "seed=0,1")
    assert packs == [[0, 1], [2, 3]]
    assert "packed: 4 runs, together 2, 2" in printed
    packs, printed = packs_of_command(capsys, f"{key}={MUST_AGREE[key]}")
    assert packs == [[0], [1]]
    assert "alone: 2 of the runs: no other has the same base, data, targets and training" in printed


def test_ranks_that_make_a_matrix_whole_separate_packs(capsys: pytest.CaptureFixture[str]):
    """Of 9 × 12, D is 3 × 4: for r = 1 it is B A, for r = 2 and 3 whole."""
    packs, _ = packs_of_command(capsys, "adapter=lokr", "adapter.r=1,2,3")
    assert packs == [[0], [1, 2]]


RUN_ALONE = {
    "adapter=full": "adapter=full trains no adapter",
    "adapter=none": "adapter=none trains no adapter",
    "adapter=adalora": "adapter=adalora prunes triplets by the numbers and gradients of one run",
    "adapter=relora": "adapter=relora has factors that grow, which a pack does not stack",
    "spectra.first_step=true": "spectra.first_step asks for the dense gradients",
    "optimizer._target_=torch.optim.Adafactor ~optimizer.fused": "torch.optim.Adafactor",
    "trainer.precision=16-mixed": "16-mixed scales the gradients of all runs by one number",
}


@pytest.mark.parametrize("setting", RUN_ALONE)
def test_what_cannot_be_packed_runs_alone_and_the_reason_is_printed(
    setting: str, capsys: pytest.CaptureFixture[str]
):
    packs, printed = packs_of_command(capsys, *setting.split(), "seed=0,1,2")
    assert packs == [[0], [1], [2]]
    assert "packed:" not in printed
    assert "alone: 3 of the runs: " in printed
    assert RUN_ALONE[setting] in printed


def test_packs_are_split_and_each_has_its_share_of_every_rank(capsys: pytest.CaptureFixture[str]):
    points = ("adapter.r=1,2,4", "seed=0,1,2,3")
    packs, _ = packs_of_command(capsys, *points, max_runs=5)
    assert sorted(map(len, packs)) == [4, 4, 4]
    assert packs_of_command(capsys, *points, max_runs=12)[0] == [list(range(12))]
    assert packs_of_command(capsys, *points, max_runs=1)[0] == [[i] for i in range(12)]
    packs, printed = packs_of_command(capsys, *points, processes=2)
    assert list(map(len, packs)) == [6, 6]
    assert "packed: 12 runs, together 6, 6" in printed
    for pack in packs:
        assert sorted(i // 4 for i in pack) == [0, 0, 1, 1, 2, 2]


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_pack(monkeypatch: pytest.MonkeyPatch, run_plans: Sequence[Plan], call: int) -> None:
    """Trains a pack that Ctrl-C ends before its `call`-th training step."""

    with monkeypatch.context() as patch:
        step = "lora_lab.packing.module:PackedModule.training_step"
        patch.setattr(*interrupted_train.acting_at_call(step, call, "before", interrupt))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run_pack(run_plans, Console(quiet=True))
    for run_plan in run_plans:
        assert Run(run_plan.path).status["state"] == "interrupted"


RESUMED = {
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


@pytest.mark.parametrize("how", quick(RESUMED, ("schedule",)))
def test_an_interrupted_pack_goes_on_bit_for_bit(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*RESUMED[how], *NO_ANALYSIS, "checkpoint_every=0"]
    run_plans = plans_of("shift", MIXED, *settings)
    uninterrupted = train_in_pack("shift", MIXED, *settings, "runs_dir=uninterrupted")
    interrupt_pack(monkeypatch, run_plans, 2 * EPOCH + 3)
    for run_plan in run_plans:
        checkpoint = torch.load(
            run_plan.path / "checkpoints" / "last.ckpt", "cpu", weights_only=True
        )
        state = checkpoint["optimizer_states"][0]["state"].values()
        values = [*checkpoint["state_dict"].values(), *(v for part in state for v in part.values())]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        # In the memory layout of a run by itself, and without the other runs of its stack.
        assert all(t.is_contiguous() for t in tensors)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    caplog.clear()
    runs = train_in_pack("shift", MIXED, *settings)
    assert "run resumed from epoch 2 of 4" in caplog.text
    for run, other in zip(runs, uninterrupted, strict=True):
        assert run.status["tries"] == 2
        assert not (run.path / "checkpoints").exists()
        assert_equal(run, other)


@pytest.mark.slow
def test_a_run_that_has_ended_early_is_not_trained_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The pack is interrupted after two runs have ended, and again when all have.

    With dropout, whose masks in a pack are other draws than those of a run by itself.
    """
    settings = [*STOPS, *NO_ANALYSIS, "checkpoint_every=0", "adapter.dropout=0.3"]
    expected = train_in_pack("shift", STOPPED, *settings, "runs_dir=expected")
    ends = [max(row["step"] for row in run.rows() if "val/loss" in row) for run in expected]
    assert ends == [32, 8, 20, 12]
    run_plans = plans_of("shift", STOPPED, *settings)
    interrupt_pack(monkeypatch, run_plans, 2 * EPOCH + 3)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "_save_trained", lambda *_: interrupt())
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run_pack(run_plans, Console(quiet=True))
    for run, other in zip(train_in_pack("shift", STOPPED, *settings), expected, strict=True):
        assert_equal(run, other)


@pytest.mark.parametrize("how", quick(["dropout", "each run by itself"], ["dropout"]))
def test_a_pack_goes_on_within_an_epoch(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*NO_ANALYSIS, "checkpoint_every=1e-9", "trainer.precision=64-true"]
    settings += ["trainer.max_epochs=1", "data.samples=768", "trainer.accumulate_grad_batches=3"]
    settings += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=2"]
    settings += ["adapter.dropout=0.3"] if how == "dropout" else []
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))  # checkpoints may take any time
    uninterrupted = train_in_pack("shift", MIXED, *settings, "runs_dir=uninterrupted")
    run_plans = plans_of("shift", MIXED, *settings)
    interrupt_pack(monkeypatch, run_plans, 12)  # 11 batches are taken, 9 of them in whole steps
    caplog.clear()
    if how == "dropout":
        runs = train_in_pack("shift", MIXED, *settings)
    else:
        runs = [experiment.run(run_plan, Console(quiet=True)) for run_plan in run_plans]
    assert "run resumed from epoch 0 of 1, batch 9" in caplog.text
    for run, other in zip(runs, uninterrupted, strict=True):
        assert run.status["tries"] == 2
        if how == "dropout":
            assert_equal(run, other)
        else:
            check_same_run(run, other, 1e-10)


@pytest.mark.parametrize("how", quick(sorted(RESUMED.keys() - {"dropout"}), ("pissa",)))
@pytest.mark.slow
def test_a_run_may_leave_a_pack_or_join_one_between_tries(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*RESUMED[how], *NO_ANALYSIS, "checkpoint_every=0", "trainer.precision=64-true"]
    expected = train_one_by_one("shift", MIXED, *settings, root="expected")
    run_plans = plans_of("shift", MIXED, *settings)
    interrupt_pack(monkeypatch, run_plans, 2 * EPOCH + 3)
    caplog.clear()
    for run_plan, other in zip(run_plans, expected, strict=True):
        run = experiment.run(run_plan, Console(quiet=True))
        assert run.status["tries"] == 2
        check_same_run(run, other, 1e-10)
    assert caplog.text.count("run resumed from epoch 2 of 4") == 3
    run_plans = plans_of("shift", MIXED, *settings, "runs_dir=back")
    for run_plan in run_plans:
        step = "lora_lab.training.modules:BaseModule.training_step"
        with monkeypatch.context() as patch:
            patch.setattr(
                *interrupted_train.acting_at_call(step, 2 * EPOCH + 3, "before", interrupt)
            )
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                experiment.run(run_plan, Console(quiet=True))
    caplog.clear()
    for run, other in zip(
        train_in_pack("shift", MIXED, *settings, "runs_dir=back"), expected, strict=True
    ):
        assert run.status["packed"] == 3
        assert run.status["tries"] == 2
        check_same_run(run, other, 1e-10)
    assert "run resumed from epoch 2 of 4" in caplog.text


@pytest.mark.slow
def test_runs_that_are_at_different_epochs_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*NO_ANALYSIS, "checkpoint_every=0", "trainer.precision=64-true"]
    points = ranks_and_seeds(1, 2, 3, seeds=2)
    expected = train_one_by_one("shift", points, *settings, root="expected")
    run_plans = plans_of("shift", points, *settings)
    interrupt_pack(monkeypatch, run_plans[:2], EPOCH + 3)
    interrupt_pack(monkeypatch, run_plans[2:4], 3 * EPOCH + 3)
    caplog.clear()
    runs = train_in_pack("shift", points, *settings)
    assert [run.status.get("tries", 1) for run in runs] == [2, 2, 2, 2, 1, 1]
    assert all(run.status["packed"] == 2 for run in runs)
    for n in (1, 3):
        assert f"run resumed from epoch {n} of 4" in caplog.text
    for run, other in zip(runs, expected, strict=True):
        check_same_run(run, other, 1e-10)


def test_finished_runs_are_not_repeated_and_busy_ones_are_errors():
    run_plans = plans_of("shift", ranks_and_seeds(1, 2, 3))
    first = experiment.run(run_plans[1], Console(quiet=True)).status
    errors = run_pack(run_plans, Console(quiet=True))
    assert [type(error).__name__ for error in errors] == [
        "NoneType",
        "RunFinishedError",
        "NoneType",
    ]
    assert Run(run_plans[1].path).status == first
    assert [Run(run_plan.path).status.get("packed") for run_plan in run_plans] == [2, None, 2]
    twice = plans_of("shift", [["adapter.r=1", "seed=9"]] * 2)
    errors = run_pack(twice, Console(quiet=True))
    assert [type(error).__name__ for error in errors] == ["NoneType", "RunBusyError"]


def test_out_of_memory_it_goes_on_with_fewer_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    overrides = [*NO_ANALYSIS, "trainer.precision=64-true"]
    points = [
        *ranks_and_seeds(1, 2, seeds=2),
        ["adapter.r=2", "optimizer.lr=0.02", "adapter=lora_plus"],
    ]
    original_forward, refused = Pack.forward, []

    def forward(pack: Pack, *inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
        if len(pack.runs) > 2 and pack.training and torch.is_grad_enabled():
            refused.append(len(pack.runs))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original_forward(pack, *inputs, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "forward", forward)
        runs = train_in_pack("shift", points, *overrides)
    assert refused == [5, 3]
    assert "out of memory: going on with 3 runs at once" in caplog.text
    assert "out of memory: going on with 2 runs at once" in caplog.text
    check_same_runs(runs, train_one_by_one("shift", points, *overrides), 1e-10)


@pytest.mark.slow
def test_out_of_memory_in_the_middle_of_training(monkeypatch: pytest.MonkeyPatch):
    """The optimizer's state of each run survives the change to smaller passes."""
    settings = [*NO_ANALYSIS, "trainer.precision=64-true", "optimizer.schedule=cosine"]
    points = [
        *ranks_and_seeds(1, 2, seeds=2),
        ["adapter.r=2", "optimizer.lr=0.02", "adapter=lora_plus"],
    ]
    original_call, calls = RecordedStep.__call__, []

    def step(self: RecordedStep, *batch: torch.Tensor, add: bool) -> torch.Tensor:
        if len(self.pack.runs) > 2:
            calls.append(any(r.is_trusted for group in self.records.values() for r in group))
            if len(calls) == EPOCH + 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original_call(self, *batch, add=add)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "__call__", step)
        runs = train_in_pack("shift", points, *settings)
    assert calls[: EPOCH + 6] == [False, False, *[True] * (EPOCH + 2), False, False]
    assert len(calls) > EPOCH + 6
    check_same_runs(runs, train_one_by_one("shift", points, *settings), 1e-10)


@pytest.mark.parametrize("small", ["digits", pytest.param("bytes_lm", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_several_passes_give_the_same(
    small: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = [*NO_ANALYSIS, "trainer.precision=64-true"]
    points = ranks_and_seeds(1, 2, 4, seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.packing.check.MAX_SAVED_BYTES_ON_CPU", 1)
        runs = train_in_pack(small, points, *settings, "trainer.accelerator=cpu")
    assert "packed: 6 runs, 1 at once" in caplog.text
    once = train_in_pack(small, points, *settings, "trainer.accelerator=cpu", "runs_dir=once")
    assert "packed: 6 runs, 6 at once" in caplog.text
    for run, other in zip(runs, once, strict=True):
        check_same_run(run, other, 1e-10)


@pytest.mark.parametrize("name", ["shift", "digits", "planted_embedding", "planted_conv"])
def test_dropout_is_off_where_the_loss_is_measured(name: str):
    """The last loss of a run with dropout is that of its merged model, which has none."""
    for run in train_in_pack(
        name, [["adapter.dropout=0.5"], ["adapter.dropout=0.3"]], *NO_ANALYSIS
    ):
        assert run.last("val/loss") == pytest.approx(run.last("merged/val/loss"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shift", "digits", "planted_embedding", "planted_conv"])
def test_dropout_has_the_same_effect_in_the_mean(name: str):
    points = [["adapter.dropout=0.3", f"seed={seed}"] for seed in range(20)]
    packed = [run.last("val/loss") for run in train_in_pack(name, points, *NO_ANALYSIS)]
    single = [run.last("val/loss") for run in train_one_by_one(name, points, *NO_ANALYSIS)]
    difference = np.array(packed, float) - np.array(single, float)
    assert difference.any()
    assert abs(difference.mean()) < 3 * difference.std(ddof=1) / math.sqrt(len(difference))
    # The effect is not nothing: without dropout the loss is another.
    without = [
        run.last("val/loss") for run in train_in_pack(name, [[p[1]] for p in points], *NO_ANALYSIS)
    ]
    moved = np.array(packed, float) - np.array(without, float)
    assert abs(moved.mean()) > 3 * moved.std(ddof=1) / math.sqrt(len(moved))


def runs_by_name(root: str = "runs") -> dict[str, Run]:
    return {run.path.name: run for run in find_runs(Path(root))}


def check_against_basic_launcher(
    lab: Lab, launcher: list[str], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """A multirun by the launcher gives what basic gives, and does nothing when repeated."""
    points = ("adapter.r=1,2", "seed=0,1", "adapter=lora,lora_plus")
    capsys.readouterr()
    assert lab("shift", *points, *launcher) == 0
    shown = capsys.readouterr().out
    assert line in shown
    assert "multirun: 8 runs" in shown
    assert "8 of 8 done" in shown
    assert lab("shift", *points, "-m", "runs_dir=one") == 0
    runs, others = runs_by_name(), runs_by_name("one")
    assert runs.keys() == others.keys()
    assert len(runs) == 8
    for name, run in runs.items():
        assert run.status["packed"] >= 2
        assert (run.path / "report" / "table.md").exists()
        check_same_run(run, others[name], 1e-5)
    assert not list(Path("runs").glob(".sweeps/*"))
    before = [run.status for run in runs.values()]
    capsys.readouterr()
    assert lab("shift", *points, *launcher) == 0
    assert "multirun: 8 runs (8 finished)" in capsys.readouterr().out
    assert [run.status for run in runs_by_name().values()] == before


def test_packed_gives_what_basic_gives(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_against_basic_launcher(lab, PACKED, capsys, "packed: 8 runs, together 8")


@pytest.mark.slow
def test_joblib_packs_where_it_is_asked_to(lab: Lab, capsys: pytest.CaptureFixture[str]):
    launcher = ["-m", "hydra/launcher=joblib", "hydra.launcher.pack=true"]
    launcher += ["hydra.launcher.n_jobs=2", "hydra.launcher.max_runs=3"]
    check_against_basic_launcher(lab, launcher, capsys, "packed: 8 runs, together 3, 3, 2")


@pytest.mark.slow
def test_submitit_packs_where_it_is_asked_to(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_against_basic_launcher(
        lab, [*LOCAL, "hydra.launcher.pack=true"], capsys, "packed: 8 runs, together 8"
    )


def test_each_run_of_a_packed_multirun_ends_in_its_own_way(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    """Two finish, one diverges, and three have an error in their configs."""
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
    before = {name: run.status for name, run in runs_by_name().items() if run.finished}
    assert lab("shift", *points, *PACKED) == 1
    assert {name: run.status for name, run in runs_by_name().items() if run.finished} == before
    assert "packed:" not in capsys.readouterr().out


def test_a_pack_whose_process_is_killed_goes_on(lab: Lab, capsys: pytest.CaptureFixture[str]):
    target = "model._target_=tests.process_models.KillsItself"
    settings = (target, "adapter.r=1,2", "seed=0,1", "checkpoint_every=0", *NO_ANALYSIS, *PACKED)
    assert lab("shift", *settings, "runs_dir=uninterrupted") == 0
    Path("kill").touch()
    assert lab("shift", *settings) == 1
    shown = capsys.readouterr().out
    assert "its process ended by SIGKILL (out of memory?)" in shown
    assert "0 of 4 done, 4 interrupted" in shown
    assert {run.status["state"] for run in runs_by_name().values()} == {"interrupted"}
    assert lab("shift", *settings) == 0
    uninterrupted = runs_by_name("uninterrupted")
    for name, run in runs_by_name().items():
        assert run.status["tries"] == 2
        assert "resumed from epoch" in (run.path / "log.txt").read_text()
        assert_equal(run, uninterrupted[name])


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
    assert all(run.status["packed"] == 4 for run in runs_by_name().values())
    assert run_sweep(content, "runs_dir=basic") == 0
    assert loss_by_rate().keys() == loss_by_rate("basic").keys()
    for name, run in runs_by_name("basic").items():
        check_same_losses(runs_by_name()[name], run, 1e-5)
