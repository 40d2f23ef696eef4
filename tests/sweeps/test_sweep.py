"""Sweep files: checked, run here with no account, continued, and run by W&B's agent.

Independent truth: scipy's distributions for what is drawn; the product of the file's values for a
grid; the parabola of one gradient step on a quadratic for bayes; an uninterrupted sweep for one
that was stopped; W&B's client against a loopback server.

Run: make test ARGS=tests/sweeps/test_sweep.py
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from scipy import stats

from lora_lab.cli import sweep
from lora_lab.config.compose import hydra_arguments
from lora_lab.config.schema import ConfigError
from lora_lab.runs import Run, find_runs
from lora_lab.sweeps import search
from lora_lab.sweeps.search_space import parse_parameter
from lora_lab.sweeps.sweep_file import read_sweep
from lora_lab.training import experiment, finish
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.conftest import SMALL, Lab, command, only_run, quick
from tests.wandb_server import WandbServer

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
GRIDS = [path for path in SWEEPS if yaml.safe_load(path.read_text())["method"] == "grid"]
QUICK = ["tracking=off", "figures=false", "spectra.truncation=none", "spectra.against_base=false"]

RunSweep = Callable[..., int]


@pytest.fixture
def run_sweep(monkeypatch: pytest.MonkeyPatch) -> RunSweep:
    """run_sweep(content or path, "seed=0") runs `lora-lab sweep`, small: its exit code."""

    def run(content: dict[str, Any] | Path, *arguments: str, small: str = "shift") -> int:
        if isinstance(content, dict):
            Path("sweep.yaml").write_text(yaml.safe_dump(content))
            content = Path("sweep.yaml")
        return command(monkeypatch, "sweep", str(content), *of_size(content, small), *arguments)

    return run


def of_size(path: Path, small: str = "shift") -> list[str]:
    """Overrides that make its runs small, except for keys that the file sets."""
    parameters = yaml.safe_load(path.read_text())["parameters"]
    return [*QUICK, *(o for o in SMALL[small] if o.partition("=")[0] not in parameters)]


def sweep_content(
    method: str = "grid", cap: int | None = None, **parameters: Any
) -> dict[str, Any]:
    """A sweep file over `shift`; a parameter's dots are written as underscores twice."""
    content: dict[str, Any] = {"method": method, "metric": {"name": "val/loss"}}
    if cap is not None:
        content["run_cap"] = cap
    by_key = {key.replace("__", "."): value for key, value in parameters.items()}
    return {**content, "parameters": {"experiment": {"value": "shift"}, **by_key}}


RATE = {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0}


def loss_by_rate(root: str = "runs") -> dict[float, float | None]:
    """The validation loss of each finished run, by its learning rate."""
    runs = [run for run in find_runs(Path(root)) if run.finished]
    return {run.config["optimizer"]["lr"]: run.last("val/loss") for run in runs}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_all_points_of_our_sweep_files_can_be_run(path: Path):
    content = yaml.safe_load(path.read_text())
    assert content["command"][-1] == "${args_no_hyphens}"
    for start in ("lora-lab sweep", "wandb sweep"):
        assert f"{start} sweeps/{path.name}" in path.read_text()
    read = read_sweep(path, [])
    if content["method"] != "grid":
        points = [read.overrides_at(values) for values in read.extreme_points()]
        points += [read.overrides_at(values) for values in search.random_points(read.space, 5, 0)]
    else:
        listed = [
            [f"{key}={value}" for value in spec.get("values", [spec.get("value")])]
            for key, spec in content["parameters"].items()
        ]
        points = [hydra_arguments(list(point)) for point in product(*listed)]
        without = [{o for o in point if not o.startswith("tracking")} for point in points]
        ours = [set(read.overrides_at(values)) for values in read.grid_points()]
        assert sorted(map(sorted, ours)) == sorted(map(sorted, without))
        # A seed changes no plan.
        points = [point for point in points if not {"seed=1", "seed=2"} & {*point}]
    for point in points:
        run = plan(composed(*point))
        assert run.sites or run.cfg.adapter.method == "none"


@pytest.mark.parametrize(
    "path",
    quick(GRIDS, [p for p in GRIDS if p.stem in ("conv_rank", "rank_vs_full", "target_layers")]),
    ids=lambda path: path.stem,
)
def test_our_grid_files_run(run_sweep: RunSweep, path: Path):
    name = yaml.safe_load(path.read_text())["parameters"]["experiment"]["value"]
    fewer = ["adapter.r=2,full"] if path.stem == "rank_vs_full" else []
    assert run_sweep(path, "seed=0", "--count", "2", *fewer, small=name) == 0
    runs = find_runs(Path("runs"))
    assert [run.status["state"] for run in runs] == ["finished"] * 2
    if fewer:
        assert {run.config["adapter"]["method"] for run in runs} == {"lora", "full"}


def test_a_grid_is_in_the_order_of_its_names_and_its_commands_can_be_pasted(
    run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    content = sweep_content(
        seed={"values": [0, 1]},
        adapter__scaling={"values": ["alpha/sqrt(r)", "alpha"]},
        target={"value": "*near"},
        tracking={"value": "online"},
    )
    assert run_sweep(content, "--dry-run") == 0
    commands = capsys.readouterr().out.splitlines()
    swept = [(o[-2], o[-1]) for o in map(shlex.split, commands)]
    scalings = (r"adapter.scaling=alpha/sqrt\(r\)", "adapter.scaling=alpha")
    assert swept == [*product(scalings, ("seed=0", "seed=1"))]
    assert "online" not in commands[0]  # no agent, no account
    assert not Path("runs").exists()
    assert command(monkeypatch, *shlex.split(commands[1])[1:]) == 0
    assert only_run().config["adapter"]["scaling"] == "alpha/sqrt(r)"
    assert only_run().config["seed"] == 1
    assert only_run().config["target"].keys() == {"*near"}


def test_a_grid_goes_on_after_a_failure_and_reports_it(
    run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fail_run(monkeypatch, RuntimeError("on purpose"), at=2)
    content = sweep_content(seed={"values": [0, 1, 2]})
    assert run_sweep(content) == 1
    out = capsys.readouterr().out
    assert "multirun: 3 runs" in out
    assert "multirun: 2 of 3 done, 1 failed" in out
    assert "on purpose (traceback: runs/shift/" in out
    before = {run.path: run.status for run in find_runs(Path("runs"))}
    assert run_sweep(content) == 0
    for run in find_runs(Path("runs")):
        same = run.status == before[run.path]
        assert same == (before[run.path]["state"] == "finished")
        assert run.finished


def fail_run(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
    """The run of that number, from 1, ends with `error` when it is in the middle."""
    real, real_keep, begun = experiment.run, finish._save_trained, []

    def run(*arguments: Any) -> Run:
        begun.append(1)
        return real(*arguments)

    def keep(*arguments: Any) -> None:
        if len(begun) == at:
            raise error
        real_keep(*arguments)

    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(finish, "_save_trained", keep)


@pytest.mark.parametrize("method", ["bayes", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_gives_the_same_runs(
    run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch, method: str
):
    monkeypatch.setattr(search, "STARTUP_TRIALS", 3)
    content = sweep_content(method, 5, optimizer__lr=RATE, adapter__r={"values": [1, 2]})
    assert run_sweep(content, "runs_dir=uninterrupted") == 0
    assert len(loss_by_rate("uninterrupted")) == 5
    with monkeypatch.context() as patch:
        fail_run(patch, KeyboardInterrupt(), at=4)
        assert run_sweep(content) == 130
    assert len(loss_by_rate()) == 3
    started = {run.path: run.status["started"] for run in find_runs(Path("runs")) if run.finished}
    assert run_sweep(content) == 0
    assert loss_by_rate() == loss_by_rate("uninterrupted")
    assert all(Run(path).status["started"] == at for path, at in started.items())
    assert run_sweep(content, "--count", "6") == 0
    assert len(loss_by_rate()) == 6
    assert loss_by_rate().items() > loss_by_rate("uninterrupted").items()


def test_another_seed_draws_other_points(run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]):
    content = sweep_content("random", 3, optimizer__lr=RATE)
    drawn = []
    for seed in ("0", "0", "1"):
        assert run_sweep(content, "--dry-run", "--seed", seed) == 0
        drawn.append(capsys.readouterr().out.splitlines())
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    assert len(set(drawn[0])) == 3


@pytest.mark.slow
def test_dry_run_of_bayes_shows_the_startup_points(
    run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(search, "STARTUP_TRIALS", 2)
    content = sweep_content("bayes", 3, optimizer__lr=RATE)
    assert run_sweep(content, "--dry-run") == 0
    *commands, more = capsys.readouterr().out.splitlines()
    assert len(commands) == 2
    assert more == "# 1 more, which depend on the results of these"
    assert run_sweep(content) == 0
    shown = [float(c.rpartition("optimizer.lr=")[2]) for c in commands]
    assert set(shown) < loss_by_rate().keys()


@pytest.mark.slow
def test_a_failed_trial_is_tried_again_at_the_same_point(
    run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    content = sweep_content("bayes", 3, optimizer__lr=RATE)
    with monkeypatch.context() as patch:
        fail_run(patch, RuntimeError("on purpose"), at=2)
        assert run_sweep(content) == 1
    assert "2 of 3 done, 1 failed" in capsys.readouterr().out
    (failed,) = [run for run in find_runs(Path("runs")) if not run.finished]
    assert run_sweep(content) == 0
    assert failed.finished
    assert len(loss_by_rate()) == 3
    best = min((loss, rate) for rate, loss in loss_by_rate().items() if loss is not None)
    printed = capsys.readouterr().out
    assert f"best val/loss {best[0]:.6g}: runs/shift/" in printed
    assert run_sweep(content, "overwrite=true") == 0
    assert "multirun: 3 runs\n" in capsys.readouterr().out  # none is known any more


def test_a_bayes_sweep_runs_once_at_a_time(run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]):
    content = sweep_content("bayes", 1, optimizer__lr=RATE)
    assert run_sweep(content) == 0
    (lock,) = Path("runs/.sweeps").glob("sweep-*/lock")
    with FileLock(lock):
        assert run_sweep(content) == 2
    assert "another process is running this sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_bayes_finds_the_best_learning_rate_of_a_quadratic(run_sweep: RunSweep):
    """One step of gradient descent on a quadratic: the loss is a parabola in the rate."""
    rate = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e4}
    content = sweep_content("bayes", 30, optimizer__lr=rate)
    content["parameters"]["experiment"] = {"value": "planted_linear"}
    one = ["adapter=full", "optimizer=sgd", "data.steps=1", "trainer.max_epochs=1"]
    assert run_sweep(content, *one, small="planted_linear") == 0
    points = [(rate, loss) for rate, loss in loss_by_rate().items() if loss is not None]
    before = find_runs(Path("runs"))[0].curve("val/loss")[0]
    # Through the loss before, and those of the two rates that moved it most without leaving.
    (x, y), (u, v) = sorted(points, key=lambda pair: abs(math.log(pair[1] / before)))[-2:]
    a = ((y - before) / x - (v - before) / u) / (x - u)
    best = -((y - before) / x - a * x) / (2 * a)
    assert min(points, key=lambda pair: pair[1])[0] == pytest.approx(best, rel=0.25)


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(run_sweep: RunSweep):
    content = sweep_content("bayes", 14, optimizer__lr=RATE)
    assert run_sweep(content, "runs_dir=uninterrupted") == 0
    lab = [str(Path(sys.executable).with_name("lora-lab")), "sweep", "sweep.yaml"]
    for done in (3, 12):
        process = subprocess.Popen([*lab, *of_size(Path("sweep.yaml"))], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while len(loss_by_rate()) < done and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run_sweep(content) == 0
    assert loss_by_rate() == loss_by_rate("uninterrupted")


BAD = {
    "methd": (
        lambda c: c | {"methd": 1},
        "methd: there is no such key; nearest: method",
    ),
    "method": (lambda c: c | {"method": "gird"}, "method=gird: there is no such method; nearest"),
    "no parameters": (lambda c: c | {"parameters": {}}, "parameters: must be given"),
    "program": (lambda c: c | {"program": "fit.py"}, "program=fit.py: this runs lora_lab.train"),
    "run_cap": (lambda c: c | {"run_cap": 0}, "run_cap=0: must be a whole number"),
    "no cap": (
        lambda c: c | {"method": "random"},
        "run_cap: must be given with random, or --count",
    ),
    "metric": (
        lambda c: c | {"metric": {"name": "val/lss"}},
        "metric.name=val/lss: a run of shift with adapter=lora does not log it; nearest: val/loss",
    ),
    "no metric": (
        lambda c: {k: v for k, v in c.items() if k != "metric"} | {"method": "bayes"},
        "metric: must be given, bayes needs it",
    ),
    "of another task": (
        lambda c: c | {"metric": {"name": "val/accuracy", "goal": "maximize"}},
        "metric.name=val/accuracy: a run of shift with adapter=lora does not log it",
    ),
    "goal of loss": (
        lambda c: c | {"metric": {"name": "val/loss", "goal": "maximize"}},
        "metric.goal=maximize: val/loss is better the other way",
    ),
    "goal of accuracy": (
        lambda c: c | {"metric": {"name": "val/accuracy"}},
        "metric.goal=minimize: val/accuracy is better the other way",
    ),
    "goal": (
        lambda c: c | {"metric": {"name": "val/loss", "goal": "minimise"}},
        "metric.goal=minimise: must be minimize or maximize; nearest: minimize",
    ),
    "target": (
        lambda c: c | {"metric": {"name": "val/loss", "target": 1}},
        "metric.target: is not supported here",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file(run_sweep: RunSweep, capsys: pytest.CaptureFixture[str], case: str):
    change, message = BAD[case]
    refused(run_sweep, capsys, change(sweep_content(adapter__r={"values": [1, 2]})), message)


def refused(
    run_sweep: RunSweep, capsys: pytest.CaptureFixture[str], content: dict[str, Any], message: str
) -> None:
    assert run_sweep(content) == 2
    printed = capsys.readouterr()
    assert f"lora-lab sweep: sweep.yaml: {message}" in printed.err
    assert not Path("runs").exists()
    assert "multirun" not in printed.out


@pytest.mark.parametrize(
    ("key", "spec", "message"),
    [
        ("adapter.rr", {"values": [1]}, "adapter.rr: there is no such key; nearest: r"),
        ("adapter.r", {"values": [1, 10]}, "adapter.r=10 exceeds the rank of 'linear'"),
        ("adapter.r", {"values": [1, 0, -1]}, "adapter.r=0: must be greater than 0, or full (at 1"),
        ("adapter.r", {"values": 2}, "values=2: must be a list of values"),
        ("adapter.r", {"values": []}, "values=[]: must be a list of values"),
        ("adapter.r", {"vals": [1]}, "must say value, values, or min and max; nearest: values"),
        ("adapter.r", {"value": 1, "min": 2}, "min: constant has no such key"),
        ("adapter.r", 3, "3: must say value, values, or min and max"),
        ("adapter", {"parameters": {"r": {"value": 1}}}, "nested parameters reach a program"),
        ("adapter", {"value": {"r": 1}}, "a dict is no setting"),
        ("adapter.rank_pattern", {"value": None}, 'null: reaches a program as "None"'),
        ("adapter.init", {"values": ["olora,pissa"]}, "olora,pissa: would be read as a list"),
        ("optimizer.lr", {"min": 0.1, "max": 0.2}, "a grid takes value, values, int_uniform"),
        ("+trainer.x", {"value": 1}, "W&B takes letters, digits and _ . - in a name"),
        ("optimizer.lr", {"distribution": "log_unifrom"}, "there is no such distribution; nearest"),
    ],
)
def test_a_bad_parameter(
    run_sweep: RunSweep, capsys: pytest.CaptureFixture[str], key: str, spec: Any, message: str
):
    content = sweep_content()
    content["parameters"][key] = spec
    assert run_sweep(content) == 2
    err = capsys.readouterr().err
    assert err.startswith("lora-lab sweep: sweep.yaml: parameters")
    assert message in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"min": 1.0, "max": 0.1}, "min=1.0: must be at most max=0.1"),
        ({"min": -0.5, "max": 0.1}, "optimizer.lr=-0.5: must be greater than 0"),
        ({"min": "1e-4", "max": 0.1}, "min=1e-4: must be a number, and in YAML 1e-4 is text"),
        ({**RATE, "min": 0}, "min=0: must be more than 0 with log_uniform_values"),
        ({**RATE, "q": 0.1}, "q: log_uniform_values has no such key"),
        ({"min": 0.1}, "max: must be given, uniform needs it"),
        ({"distribution": "beta"}, "distribution=beta: is not supported here"),
        ({"distribution": "normal", "sigma": 0}, "sigma=0: must be more than 0"),
        ({"min": float("nan"), "max": 0.1}, "min=nan: must be a finite number"),
        ({"min": 0.1, "max": float("inf")}, "max=inf: must be a finite number"),
        ({"values": [0.1, float("nan")]}, "optimizer.lr=nan: must be a finite number"),
        (
            {"distribution": "log_uniform", "min": 1, "max": 46},
            "log_uniform takes exponents of e: its values go from e^1 to e^46, and end at a million"
            ", e^14; log_uniform_values takes the values themselves",
        ),
        ({"distribution": "log_uniform", "min": -1000, "max": 1}, "from e^-1000 to e^1"),
        ({"distribution": "inv_log_uniform", "min": -20, "max": 0}, "from e^0 to e^20"),
        ({"distribution": "log_normal", "mu": 900}, "log_normal takes exponents of e"),
        ({"values": [0.1, 0.2], "probabilities": [0.5, 0.6]}, "must be 2 shares that add up to 1"),
    ],
)
def test_a_bad_distribution(
    run_sweep: RunSweep, capsys: pytest.CaptureFixture[str], spec: dict[str, Any], message: str
):
    assert run_sweep(sweep_content("random", 3, optimizer__lr=spec)) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_sweep_of_more_runs_than_can_be_checked_is_counted_and_refused(
    run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]
):
    seeds = sweep_content(seed={"min": 0, "max": 10**9})
    refused(run_sweep, capsys, seeds, "the sweep: asks for 1000000001 runs; one command has 100000")
    refused(run_sweep, capsys, seeds | {"run_cap": 10**6}, "the sweep: asks for 1000000 runs")


def test_a_wrong_launcher_is_said_before_anything_else(
    run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]
):
    content = sweep_content(adapter__r={"values": [1, 2]})
    assert run_sweep(content, "hydra/launcher=pcked") == 2
    printed = capsys.readouterr()
    assert "hydra/launcher=pcked: there is no such hydra/launcher; nearest: packed" in printed.err
    assert not printed.out


def test_early_terminate_is_ignored_with_a_message(
    run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]
):
    content = sweep_content(seed={"value": 3}) | {
        "early_terminate": {"type": "hyperband", "min_iter": 3}
    }
    assert run_sweep(content, "--dry-run") == 0
    warning, dry = capsys.readouterr().out.splitlines()
    assert "all runs go to their end" in warning
    assert dry.startswith("lora-lab train ")


E10 = stats.loguniform(math.exp(-3), math.exp(2))
DISTRIBUTIONS = {
    "uniform": ({"min": -1.0, "max": 3.0}, stats.uniform(-1, 4)),
    "log_uniform": ({"distribution": "log_uniform", "min": -3, "max": 2}, E10),
    "inv_log_uniform": ({"distribution": "inv_log_uniform", "min": -2, "max": 3}, E10),
    "values": (RATE, stats.loguniform(0.001, 1)),
    "inverse": (RATE | {"distribution": "inv_log_uniform_values"}, stats.loguniform(0.001, 1)),
    "normal": ({"distribution": "normal", "mu": 2, "sigma": 3}, stats.norm(2, 3)),
    "log_normal": ({"distribution": "log_normal", "mu": 1}, stats.lognorm(1, scale=math.e)),
}


def drawn(spec: dict[str, Any], count: int = 300) -> list[Any]:
    return [values["x"] for values in search.random_points({"x": parse_parameter(spec)}, count, 0)]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_are_wandbs(name: str):
    spec, truth = DISTRIBUTIONS[name]
    values = drawn(spec)
    assert stats.kstest(values, truth.cdf).pvalue > 0.01
    low, high = parse_parameter(spec).extremes
    assert low <= min(values) < max(values) <= high


def test_stepped_values_are_the_nearest_multiples_of_q():
    values = drawn({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25})
    shares = [values.count(x) / len(values) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert sum(shares) == 1
    assert shares == pytest.approx([0.125, 0.25, 0.25, 0.25, 0.125], abs=0.08)
    assert {type(x) for x in drawn({"distribution": "q_normal", "sigma": 4}, 9)} == {int}
    fifths = parse_parameter({"distribution": "q_uniform", "min": 0.1, "max": 0.7, "q": 0.2})
    assert fifths.grid_values == [0.1, 0.3, 0.5]  # W&B leaves out the last
    assert parse_parameter({"min": 1, "max": 4}).grid_values == range(1, 5)


def test_lists_are_drawn_evenly_or_by_their_probabilities():
    even = drawn({"values": [1, "a", True]})
    assert [even.count(x) / 300 for x in ("1", "a", "True")] == pytest.approx([1 / 3] * 3, abs=0.1)
    odd = drawn({"values": [1, 2, 3], "probabilities": [0.7, 0.3, 0]})
    assert [odd.count(x) / 300 for x in "123"] == pytest.approx([0.7, 0.3, 0], abs=0.1)
    integers = drawn({"min": 1, "max": 3})
    assert [integers.count(x) / 300 for x in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.1)


def test_a_parameter_that_names_no_form_is_refused():
    with pytest.raises(ConfigError, match="must say value"):
        parse_parameter({})


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits", ["adapter=adalora"]),
        ("digits", ["adapter=full"]),
        ("digits", ["adapter=none"]),
        ("bytes_lm", []),
        ("shift", []),
    ],
)
def test_metrics_that_a_sweep_accepts_are_logged(lab: Lab, name: str, overrides: list[str]):
    assert lab(name, *overrides) == 0
    small = SMALL[name]
    names = sweep.logged_metrics(plan(composed(f"experiment={name}", *small, *overrides)))
    logged_keys = {key for row in only_run().rows() for key in row}
    assert names <= logged_keys
    assert {n for n in logged_keys if n.startswith(("val/", "train/", "merged/"))} <= names


@pytest.mark.slow
def test_wandb_sweep_and_agent_run_a_grid_file():
    """The real client: each run arrives with its config, history, spectra, state and sweep."""
    path = next(path for path in SWEEPS if path.stem == "rank_vs_full")
    content = yaml.safe_load(path.read_text())
    fewer = {"adapter.r": {"values": [2, "full"]}, "seed": {"value": 0}}
    small = dict(o.split("=") for o in [*SMALL["digits"], *QUICK[1:]])
    content["parameters"] |= fewer | {k: {"value": yaml.safe_load(v)} for k, v in small.items()}
    Path("sweep.yaml").write_text(yaml.safe_dump(content))
    names = sorted(content["parameters"])
    specs = [content["parameters"][name] for name in names]
    grid = [
        dict(zip(names, values, strict=True))
        for values in product(*(spec.get("values", [spec.get("value")]) for spec in specs))
    ]
    wandb = [sys.executable, "-m", "wandb"]
    with WandbServer() as server:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, **server.env, "PATH": path}
        created = subprocess.run(
            [*wandb, "sweep", "sweep.yaml"], env=env, check=True, capture_output=True, text=True
        )
        (agent,) = [w for w in created.stderr.splitlines() if "wandb agent" in w]
        server.agent_runs = [*grid, grid[0]]  # the last has been run by then
        subprocess.run(
            [*wandb, "agent", agent.rpartition(" ")[2]], env=env, check=True, capture_output=True
        )
        assert yaml.safe_load(server.sweeps["sweep0"])["parameters"] == content["parameters"]
        served = list(server.runs.values())
    assert len(find_runs(Path("runs"))) == 2
    assert len(served) == 3
    for arrived, point in zip(served, [*grid, grid[0]], strict=True):
        (run,) = [r for r in find_runs(Path("runs")) if r.path.name == arrived.display_name]
        assert (arrived.sweep, arrived.project, arrived.complete) == ("sweep0", "lora_lab", True)
        assert arrived.exitcode == 0
        assert arrived.group == run.status["cell"]
        for key, value in point.items():
            assert arrived.config[key] == value
        assert arrived.config["adapter"] == run.config["adapter"]
        assert arrived.config["adapter"]["method"] == (
            "full" if point["adapter.r"] == "full" else "lora"
        )
        rows = [row for row in arrived.history if "trainer/global_step" in row]
        assert len(rows) == len(run.rows())
        for row, ours in zip(rows, run.rows(), strict=True):
            assert {k: row[k] for k in ours if k != "step"} == {
                k: v for k, v in ours.items() if k != "step"
            }
        assert arrived.summary["val/loss"] == run.last("val/loss")
        assert any(key.startswith("spectra/head/sigma_1") for row in rows for key in row)
        assert {a["type"] for a in arrived.artifacts} & {"adapter", "model"}
