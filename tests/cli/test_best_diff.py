"""`lora-lab best` and `lora-lab diff`, and the command that repeats a run.

Independent truth: `statistics.mean` and `stdev` of the last values of copied runs, differences that
the test makes by hand, and the identity of the config that a printed command composes.
Run: make test ARGS=tests/cli/test_best_diff.py
"""

import json
import shlex
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import hydra
import pytest

from lora_lab.config import compose
from lora_lab.config.checks import parse_config
from lora_lab.config.schema import Config
from lora_lab.report import best_by_experiment, difference_tables
from lora_lab.report.epochs import goal_of
from lora_lab.report.tables import format_mean_std
from lora_lab.runs import Run, find_runs
from tests.conftest import Lab, command, only_run
from tests.copied_runs import copy_run


@pytest.fixture
def runs(lab: Lab) -> list[Run]:
    assert lab("digits", "runs_dir=first", "adapter.r=3") == 0
    keys = ("adapter.r", "optimizer.lr", "seed")
    points = product((1, 2, 4), (0.1, 0.01), (0, 1, 2))
    only = only_run("first")
    return copy_run(only, (dict(zip(keys, p, strict=True)) for p in points), Path("runs"))


@pytest.mark.parametrize(
    ("metric", "given", "pick"),
    [
        ("val/loss", None, min),
        ("val/accuracy", None, max),
        ("val/loss", "maximize", max),
        ("parameters/trainable", "minimize", min),
    ],
)
def test_best_against_a_plain_computation(runs: list[Run], metric: str, given: str | None, pick):
    (best_cells,) = best_by_experiment(runs, metric, given)
    cells: dict[str, list[float]] = {}
    for run in runs:
        value = run.last(metric)
        assert value is not None
        cells.setdefault(run.status["cell"], []).append(value)
    order = [mean(cells[cell.name]) for cell in best_cells.cells]
    assert order == sorted(map(mean, cells.values()), reverse=pick is max)
    assert best_cells.best_result.metrics[metric] == pick(
        value for values in cells.values() for value in values
    )
    head, first, *_ = best_cells.rows(3)
    epochs = ["best epoch"] if metric.startswith("val/") else []
    assert head == ["r", "lr", "n", metric, "min", "max", *epochs]
    assert first[2] == "3"
    values = cells[best_cells.cells[0].name]
    assert first[3] == format_mean_std(mean(values), stdev(values))
    assert len(best_cells.rows(3)) == 4


def test_best_says_how_to_repeat_its_run(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "best") == 0
    shown = capsys.readouterr().out
    (best_cells,) = best_by_experiment(runs, "val/loss")
    assert str(best_cells.best_result.run.path) in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("command ")]
    assert (
        identity_by(line.split(maxsplit=1)[1])
        == parse_config(dict(best_cells.best_result.config)).identity()
    )
    swept = {key: best_cells.best_result.settings[key] for key in ("adapter.r", "optimizer.lr")}
    swept["seed"] = best_cells.best_result.config["seed"]
    for key, value in swept.items():
        assert f"{key}={value}" in shlex.split(line), "what was swept, though it be the default"


def identity_by(command: str) -> str:
    """The identity of the run that a command makes."""
    program, train, *overrides = shlex.split(command)
    assert (program, train) == ("lora-lab", "train")
    return composed(overrides).identity()


def composed(overrides: list[str]) -> Config:
    with hydra.initialize_config_module("lora_lab.conf", version_base="1.3"):
        return compose.compose_config(compose.hydra_arguments(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=full"],
        ["adapter=dora", "adapter.scaling=alpha/sqrt(r)", "seed=3", "data.seed=2"],
        ["target=all", "optimizer=sgd", "optimizer.schedule=cosine"],
        ["target=[linear,all]", "target.all.exclude=[head]", "target.linear.r=2"],
        ["adapter.rank_pattern={*.fc1:2}", "+trainer.limit_train_batches=3"],
        ["model=cnn", "target=conv"],
    ],
)
def test_a_command_makes_its_config_again(overrides: list[str]):
    cfg = composed(["experiment=digits", *overrides])
    again = compose.train_command(cfg.to_dict())
    assert again is not None
    assert identity_by(again) == cfg.identity()


def test_a_metric_that_nobody_logged_names_the_nearest(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "best", "--metric", "val/acuracy") == 2
    assert "nearest: val/accuracy" in capsys.readouterr().err
    assert command(monkeypatch, "best", "--metric", "bytes/adapter") == 2
    assert "--goal" in capsys.readouterr().err


def test_goals():
    assert (
        goal_of("val/loss") == goal_of("merged/val/loss") == goal_of("val/perplexity") == "minimize"
    )
    assert goal_of("val/accuracy") == "maximize"
    assert goal_of("spectra/head/effective_rank") is None


def test_diff_of_runs_that_differ_in_two_keys(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(r: int, lr: float) -> Run:
        want = (r, lr, 0)
        keys = (
            (x.config["adapter"]["r"], x.config["optimizer"]["lr"], x.config["seed"]) for x in runs
        )
        return next(x for x, key in zip(runs, keys, strict=True) if key == want)

    one, other = run(1, 0.1), run(4, 0.01)
    environment = json.loads((other.path / "env.json").read_text())
    environment["packages"]["torch"] = "0.0.1"
    (other.path / "env.json").write_text(json.dumps(environment))
    tables = difference_tables(one, other)
    assert tables["config"][1:] == [["adapter.r", "1", "4"], ["optimizer.lr", "0.1", "0.01"]]
    ((_, *torch),) = [row for row in tables["environment"][1:] if row[0] == "packages.torch"]
    assert torch[1] == "0.0.1"
    a, b = one.last("val/loss"), other.last("val/loss")
    assert a is not None
    assert b is not None
    (loss,) = [row for row in tables["results"] if row[0] == "val/loss"]
    assert [float(x.rstrip("%")) for x in loss[1:]] == [
        pytest.approx(want, rel=1e-2) for want in (a, b, b - a, 100 * (b - a) / a)
    ]
    names = [row[0] for row in tables["results"]]
    assert "base/val/loss" not in names, "it is the same"
    assert command(monkeypatch, "diff", str(one.path), str(other.path)) == 0
    assert "adapter.r" in capsys.readouterr().out
    same = difference_tables(one, one)
    assert {len(rows) for rows in same.values()} == {1}


def test_the_best_is_given_for_each_of_several_experiments(lab: Lab):
    assert lab("shift") == 0
    assert lab("digits") == 0
    best_cells = best_by_experiment(find_runs(Path("runs")), "val/loss")
    assert {one.experiment for one in best_cells} == {"shift", "digits"}
