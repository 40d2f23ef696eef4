"""A sweep's figures show the right data, and the Pareto front has the right points.

Truth: for a figure, the lines, images and labels that matplotlib holds are compared with means
computed here from the runs' own files; for the front, with a search of all pairs of points.
Run: make test ARGS=tests/report/test_report_figures.py
"""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.report import rank_figures
from lora_lab.report.cells import RunResult, cells_of, read_run
from lora_lab.report.forgetting_figure import gain_by_forgetting
from lora_lab.report.phi_heat_map import phi_heat_map
from lora_lab.report.plotting import log_scale, series_style
from lora_lab.report.summary import truncation_table
from lora_lab.report.swept_key_figures import metrics_by_swept_keys
from lora_lab.report.tradeoff_figure import metric_by_costs, pareto_front
from lora_lab.runs import Run, find_runs
from tests.conftest import Lab, only_run, small
from tests.copied_runs import copy_run

LOSSES = ("val/loss", "forget/loss")
RANKS, ALPHAS, SEEDS = (1, 2, 3), (4.0, 8.0), (0, 1)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was trained; the runs of a sweep are copies of it with other settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("real_run"))
        patch.setattr(sys, "argv", ["lora-lab"])
        assert small("digits", "adapter.r=3") == 0
        return Run(only_run().path.absolute())


def sweep(real_run: Run, **values: Any) -> list[RunResult]:
    keys = [key.replace("__", ".") for key in values]
    points = (dict(zip(keys, point, strict=True)) for point in product(*values.values()))
    return [read_run(run) for run in copy_run(real_run, points, Path("sweep"))]


def values_by(results: list[RunResult], key: str, metric: str) -> dict[Any, list[float]]:
    values: dict[Any, list[float]] = {}
    for result in results:
        values.setdefault(result.settings[key], []).append(result.metrics[metric])
    return values


def lines(axes: Axes) -> list[list[tuple[float, float]]]:
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.lines]  # pyright: ignore


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 3), (64, 1)])
def test_directions_are_counted_in_integers(shape: tuple[int, int]):
    axes = (figure := Figure()).subplots()
    phi_heat_map(figure, axes, np.full(shape, 0.5))
    for axis, count in zip((axes.yaxis, axes.xaxis), shape, strict=True):
        ticks = [tick for tick in axis.get_ticklocs() if 0.5 <= tick <= count + 0.5]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.6925, 0.6931, ["0.6925", "0.6926", "0.6927", "0.6928", "0.6929", "0.693", "0.6931"]),
        (0.72, 0.78, [f"0.7{digit}" for digit in range(2, 9)]),
        (0.5, 1.0, ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        (1.0, 20, ["1", "2", "5", "10", "20"]),
    ],
)
def test_a_log_axis_of_few_decades_has_plain_numbers(low: float, high: float, ticks: list[str]):
    axes = (figure := Figure()).subplots()
    axes.plot([low, high])
    log_scale(axes, low, high)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    shown = zip(axes.yaxis.get_ticklocs(), axes.yaxis.get_ticklabels(), strict=True)
    assert [text.get_text() for at, text in shown if bottom <= at <= top] == ticks


@pytest.mark.parametrize("metric", ["val/loss", "val/accuracy"])
def test_a_metric_against_r(real_run: Run, metric: str):
    results = sweep(real_run, adapter__r=RANKS, seed=SEEDS)
    figure = rank_figures.metric_by_rank(results, metric)
    assert figure is not None
    (axes,) = figure.axes
    values = values_by(results, "adapter.r", metric)
    drawn = lines(axes)
    assert sorted(drawn[0]) == sorted((r, v) for r, at_r in values.items() for v in at_r)
    assert drawn[1] == [(r, pytest.approx(mean(at_r))) for r, at_r in values.items()]
    if metric == "val/loss":
        with np.load(real_run.path / "spectra.npz") as arrays:
            cut = dict(zip(arrays["truncation/ranks"], arrays["truncation/loss"], strict=True))
        assert drawn[2] == [(k, pytest.approx(cut[k])) for k in (1, 2, 3)]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]


def test_what_was_cut_and_healed_stands_beside_what_was_trained(real_run: Run):
    """Two runs of r = 3 are there once more, with adapters cut to 1 and 2 and healed."""
    results = sweep(real_run, adapter__r=RANKS, seed=SEEDS)
    losses = {
        "cut/1": (4.0, 5.0),
        "healed/1": (2.0, 2.5),
        "cut/2": (1.0, 3.0),
        "healed/2": (0.5, 1),
    }
    healed = []
    for i, result in enumerate(result for result in results if result.rank == 3):
        config = json.loads(json.dumps(result.config))
        config["adapter"] |= {"cut": [2, 1], "heal": 7}
        values = {f"{at}/val/{m}": v[i] for at, v in losses.items() for m in ("loss", "accuracy")}
        healed.append(replace(result, config=config, last=result.last | values))
    figure = rank_figures.metric_by_rank([*results, *healed], "val/accuracy")
    assert figure is not None
    drawn = lines(figure.axes[0])
    assert [(1, 4.5), (2, 2.0)] in drawn
    assert [(1, 2.25), (2, 0.75)] in drawn
    assert len(drawn[0]) == len(results)  # a training counts once
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels[-2:] == ["cut from r = 3", "cut, and trained 7 steps more"]
    head, *rows = truncation_table([*results, *healed], in_full=True)
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["k"] for row in table] == ["0", "1", "2", "3"]
    for row, values in zip(table[1:3], (losses["healed/1"], losses["healed/2"]), strict=True):
        way = "cut, and trained 7 steps more"
        assert (float(row[way]), float(row[f"{way} std"])) == (mean(values), stdev(values))
        assert (
            row[f"{way} n"] == row["trained at r = k n"] == row["cut from the largest r n"] == "2"
        )
    assert table[3]["cut, and trained 7 steps more"] == ""


def test_references_stand_at_the_mean_of_their_runs(lab: Lab):
    for adapter in ("full", "none", "lora"):
        assert lab("digits", f"adapter={adapter}", f"runs_dir={adapter}") == 0
    results = [read_run(only_run(adapter)) for adapter in ("full", "none")]
    results += sweep(only_run("lora"), adapter__r=(1, 2))
    figure = rank_figures.metric_by_rank(results, "val/loss")
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].texts]
    for label, result in zip(("full fine-tuning", "no adapter"), results, strict=False):
        level = result.metrics["val/loss"]
        assert [(0.0, level), (1.0, level)] in lines(figure.axes[0])
        assert label in labels


def test_a_reference_is_the_best_of_what_was_swept(lab: Lab, real_run: Run):
    for lr in (1e-4, 1e-2):
        assert lab("digits", "adapter=full", "runs_dir=full", f"optimizer.lr={lr}") == 0
    full = [read_run(run) for run in find_runs(Path("full"))]
    figure = rank_figures.metric_by_rank(
        [*sweep(real_run, adapter__r=(1, 2)), *full], "val/accuracy"
    )
    assert figure is not None
    best = max(full, key=lambda result: result.metrics["val/accuracy"])
    level = best.metrics["val/accuracy"]
    levels = [line for line in lines(figure.axes[0]) if [x for x, _ in line] == [0.0, 1.0]]
    assert levels == [[(0.0, level), (1.0, level)]]
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert f"full fine-tuning, lr={best.settings['optimizer.lr']:g}" in labels


def test_gain_stands_against_forgetting(lab: Lab, real_run: Run):
    results = sweep(real_run, adapter__r=RANKS, seed=SEEDS)
    assert lab("digits", "adapter=full,none", "-m", "spectra.truncation=none") == 0
    others = {r.config["adapter"]["method"]: read_run(r) for r in find_runs(Path("runs"))}
    figure = gain_by_forgetting([*results, *others.values()])
    assert figure is not None
    (axes,) = figure.axes

    def point(result: RunResult) -> tuple[float, float]:
        values = [[row[m] for row in result.run.rows() if m in row] for m in LOSSES]
        (start, *_, end), (known, *_, at_end) = values if len(values[0]) > 1 else ([0, 0], [0, 0])
        return at_end - known, start - end

    by_rank = {r: [point(x) for x in results if x.rank == r] for r in RANKS}
    means = [tuple(map(mean, zip(*points, strict=True))) for points in by_rank.values()]
    drawn = [line for line in lines(axes) if len(line) > 1 and line[0][0] != line[1][0]]
    with np.load(real_run.path / "spectra.npz") as arrays:
        curves = [arrays[f"truncation/{name}"] for name in ("loss", "forget_loss")]
    before = [mean(x.first[m] for x in results if x.rank == 3) for m in LOSSES]
    cut = [(known - before[1], before[0] - loss) for loss, known in zip(*curves, strict=True)]
    assert drawn[0] == [pytest.approx(at_k) for at_k in cut]
    points = sorted(p for at_r in by_rank.values() for p in at_r)
    assert sorted(drawn[1]) == [pytest.approx(p) for p in points]
    assert drawn[2] == [pytest.approx(at_r) for at_r in means]
    assert [text.get_text() for text in axes.texts] == ["r=1", "r=2", "r=3"]
    markers = {line[0] for line in lines(axes) if len(line) == 1}
    assert {point(others[method]) for method in ("full", "none")} <= markers
    without = [replace(r, last={"val/loss": 1.0}) for r in results]  # of earlier versions
    assert gain_by_forgetting(without) is None


def test_ranks_of_the_update_against_r(real_run: Run):
    results = sweep(real_run, adapter__r=RANKS, seed=SEEDS)
    figure = rank_figures.update_ranks_by_rank(results)
    assert figure is not None
    for axes, measure in zip(figure.axes, ("effective_rank", "stable_rank"), strict=True):
        drawn = lines(axes)
        assert drawn[0] == [(1, 1), (2, 2), (3, 3)], "the bound"
        for i, site in enumerate(("body.fc1", "head")):
            values = values_by(results, "adapter.r", f"spectra/{site}/{measure}")
            assert drawn[2 + 2 * i] == [(r, pytest.approx(mean(v))) for r, v in values.items()]
    results = sweep(real_run, adapter__r=RANKS, adapter__alpha=(2.0, 16.0))
    figure = rank_figures.update_ranks_by_rank(results)
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].texts][1:] == ["alpha=2", "alpha=16"]


def test_spectra_by_r(real_run: Run):
    results = sweep(real_run, adapter__r=RANKS, seed=SEEDS)
    figure = rank_figures.spectra_by_rank(results)
    assert figure is not None
    for axes in figure.axes:
        site = axes.get_title()
        for r, drawn in zip(RANKS, lines(axes), strict=True):
            ends = []
            for result in results:
                if result.rank == r:
                    with np.load(result.run.path / "spectra.npz") as arrays:
                        ends.append(arrays[f"{site}/singular_values"][-1])
            assert [i for i, _ in drawn] == list(range(1, r + 1))
            assert [s for _, s in drawn] == pytest.approx(np.mean(ends, axis=0).tolist())


def test_a_heat_map_of_two_keys_has_the_means_and_leaves_holes(real_run: Run):
    results = sweep(real_run, adapter__r=RANKS, adapter__alpha=ALPHAS, seed=SEEDS)
    results = [r for r in results if (r.rank, r.settings["adapter.alpha"]) != (3, 4.0)]
    figure = metrics_by_swept_keys(cells_of(results), ["val/loss", "val/accuracy"])
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.images]
    for axes, metric in zip(panels, ("val/loss", "val/accuracy"), strict=True):
        grid = np.ma.filled(axes.images[0].get_array(), np.nan)  # pyright: ignore
        for (i, alpha), (j, r) in product(enumerate(ALPHAS), enumerate(RANKS)):
            runs = [x for x in results if (x.rank, x.settings["adapter.alpha"]) == (r, alpha)]
            expected = mean(x.metrics[metric] for x in runs) if runs else np.nan
            assert grid[i, j] == pytest.approx(expected, nan_ok=True)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("r", "alpha")


def test_a_heat_map_has_a_place_for_full_and_for_what_failed(lab: Lab, real_run: Run):
    assert lab("digits", "adapter=full", "runs_dir=full", "optimizer.lr=0.01") == 0
    (full,) = [read_run(only_run("full"))]
    results = sweep(real_run, adapter__r=(1, 2), optimizer__lr=(0.1, 0.01))
    failed = next(r for r in results if (r.rank, r.settings["optimizer.lr"]) == (2, 0.1))
    failed.status["state"] = "failed"
    figure = metrics_by_swept_keys(cells_of([*results, full]), ["val/loss"])
    assert figure is not None
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "full"]
    grid = np.ma.filled(axes.images[0].get_array(), np.nan)  # pyright: ignore
    assert grid[0, 2] == pytest.approx(full.metrics["val/loss"])
    assert np.isnan(grid[1, 1:]).all()
    assert [text.get_text() for text in axes.texts if not text.get_text()[0].isdigit()] == [
        *("failed", "–"),
    ]
    assert len(axes.patches) == 1


def test_a_sampled_setting_is_an_axis_of_points(real_run: Run):
    points = ((1, 0.002), (1, 0.03), (2, 0.07), (2, 0.4))
    runs = copy_run(
        real_run, ({"adapter.r": r, "optimizer.lr": lr} for r, lr in points), Path("sweep")
    )
    results = [read_run(run) for run in runs]
    figure = metrics_by_swept_keys(cells_of(results), ["val/loss"])
    assert figure is not None
    (axes,) = figure.axes
    assert not axes.images
    assert axes.get_xscale() == "log"
    for r, drawn in zip((1, 2), lines(axes), strict=True):
        assert drawn == [
            (result.settings["optimizer.lr"], result.metrics["val/loss"])
            for result in results
            if result.rank == r
        ]


@pytest.mark.parametrize("alphas", [(4.0,), ALPHAS])
def test_the_front_is_labelled_with_r_or_with_letters(real_run: Run, alphas: tuple[float, ...]):
    cells = cells_of(sweep(real_run, adapter__r=RANKS, adapter__alpha=alphas))
    figure = metric_by_costs(cells, "val/loss")
    assert figure is not None
    cost = "parameters/trainable"
    points = [(c.metrics[cost].mean, c.metrics["val/loss"].mean) for c in cells]
    front = [cells[i].results[0] for i in pareto_front(points, "minimize")]
    labels = [text.get_text() for text in figure.axes[0].texts]
    if len(alphas) == 1:
        assert labels == [f"r={result.rank}" for result in front]
    else:
        assert labels == list("abcdef"[: len(front)])
        settings = [f"r={r.rank}, alpha={r.settings['adapter.alpha']:g}" for r in front]
        legend = [text.get_text() for text in figure.legends[-1].texts]
        assert legend == [
            f"{letter}: {text}" for letter, text in zip(labels, settings, strict=True)
        ]


def test_parallel_coordinates_of_three_keys(real_run: Run):
    results = sweep(real_run, adapter__r=RANKS, adapter__alpha=ALPHAS, optimizer__lr=(0.1, 0.01))
    cells = cells_of(results)
    figure = metrics_by_swept_keys(cells, ["val/loss"])
    assert figure is not None
    axes = figure.axes[0]
    drawn = [line for line in lines(axes) if len(line) == 4]
    assert len(drawn) == len(cells) == 12
    losses = sorted((cell.metrics["val/loss"].mean for cell in cells), reverse=True)
    low, high = min(losses), max(losses)
    assert [line[-1][1] for line in drawn] == pytest.approx(
        [(loss - low) / (high - low) for loss in losses]
    ), "the best is drawn last, on top"
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["r", "alpha", "lr", "validation loss"]


def test_one_run_has_no_figure_of_a_sweep(real_run: Run):
    results = [read_run(real_run)]
    assert rank_figures.metric_by_rank(results, "val/loss") is None
    assert rank_figures.update_ranks_by_rank(results) is None
    assert rank_figures.spectra_by_rank(results) is None
    assert rank_figures.theory_by_rank(results) is None
    assert metric_by_costs(cells_of(results), "val/loss") is None
    assert metrics_by_swept_keys(cells_of(results), ["val/loss"]) is None


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12),
    st.sampled_from(["minimize", "maximize"]),
)
def test_the_front_against_brute_force(points: list[tuple[int, int]], goal: str):
    sign = 1 if goal == "minimize" else -1

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        no_worse = a[0] <= b[0] and sign * a[1] <= sign * b[1]
        return no_worse and a != b

    expected = {p for p in points if not any(beats(q, p) for q in points)}
    front = pareto_front(points, goal)
    assert {points[i] for i in front} == expected
    assert len(front) == sum(p in expected for p in points), "equal points are on it together"
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_the_front_is_marked(real_run: Run):
    results = sweep(real_run, adapter__r=RANKS, adapter__alpha=ALPHAS, seed=SEEDS)
    cells = cells_of(results)
    figure = metric_by_costs(cells, "val/loss")
    assert figure is not None
    points = [(c.metrics["parameters/trainable"].mean, c.metrics["val/loss"].mean) for c in cells]
    front = pareto_front(points, "minimize")
    containers = figure.axes[0].containers
    marked = [tuple(map(float, p)) for p in containers[-1].lines[0].get_xydata()]  # pyright: ignore
    assert marked == [pytest.approx(points[i]) for i in front]
    plain = [tuple(map(float, p)) for p in containers[0].lines[0].get_xydata()]  # pyright: ignore
    assert len(plain) + len(marked) == len(cells)


def test_styles_of_many_series_differ():
    assert len({series_style(i) for i in range(49)}) == 49
