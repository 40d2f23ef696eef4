"""The best learning rate at a rank, its interval, its trend over r, and what is said of them.

Truth: parabolas with a known least point, noise of a known size (the share of intervals that hold
the true rate), a search over a grid of x for Fieller's bounds, scipy's `linregress`, and sentences
written by hand.

Run: make test ARGS=tests/report/test_best_learning_rate.py
"""

import csv
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_lab.report.best_learning_rate import NO_NOISE, ONE_SEED, OPEN, RateCurve, best_rate
from lora_lab.report.cells import RunResult
from lora_lab.report.learning_rate_figure import learning_rate_figure
from lora_lab.report.learning_rate_report import rate_table, rate_table_in_full, sentences
from lora_lab.report.rate_by_rank import FULL, rate_sweeps, trend_of
from lora_lab.runs import Run
from tests.conftest import Lab, command, only_run
from tests.copied_runs import Point, copy_run
from tests.report.seed_runs import seed_run

GRID = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
Loss = Callable[[float, int], float]
"""(log lr, seed) → loss."""


def curve_of(loss: Loss, seeds: int, rates: list[float] = GRID, **more: Any) -> RateCurve:
    values = {lr: {(s,): loss(math.log(lr), s) for s in range(seeds)} for lr in rates}
    return RateCurve(values, more.get("diverged", {}))


def runs_of(loss: Callable[[float, int, int | None], float], ranks: list[int | None], **more: Any):
    """Runs at each r, rate and seed, whose loss is `loss(log lr, seed, r)`."""
    return [
        seed_run(r, seed, {"val/loss": loss(math.log(lr), seed, r)}, lr=lr)
        for r in ranks
        for lr in more.get("rates", GRID)
        for seed in range(more.get("seeds", 3))
    ]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rates", [GRID, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]])
@pytest.mark.parametrize("lr", [0.0029, 0.00601, 0.0123, 0.0298])
def test_a_parabolas_least_point_is_recovered(lr: float, rates: list[float], sign: int):
    """Each seed has a level of its own, which does not move the best rate."""
    curve = curve_of(lambda x, s: sign * (0.3 + 0.1 * s + (x - math.log(lr)) ** 2), 2, rates)
    best = best_rate(curve, sign)
    assert best is not None
    assert best.lr == pytest.approx(lr, rel=1e-6)
    if max(np.diff(np.log(rates))) > 1.1:
        assert best.interval == pytest.approx((lr, lr), rel=1e-4)
    one_seed = best_rate(curve_of(lambda x, _: sign * (x - math.log(lr)) ** 2, 1, rates), sign)
    assert one_seed is not None
    assert one_seed.lr == pytest.approx(lr, rel=1e-6)
    assert (one_seed.interval, one_seed.remark) == (None, ONE_SEED)


@pytest.mark.parametrize(("noise", "seeds"), [(0.1, 2), (0.5, 3), (1.0, 5)])
def test_the_interval_holds_the_best_rate_as_often_as_it_says(noise: float, seeds: int):
    """Rates are a factor of e apart, the loss is (log lr − best)²; an open interval holds all."""
    rng, rates = np.random.default_rng(0), [math.exp(x) for x in range(-4, 5)]
    holds = []
    for _ in range(400):
        truth, levels = rng.uniform(-0.5, 0.5), rng.normal(size=seeds)

        def loss(x: float, s: int, truth: float = truth, levels: np.ndarray = levels) -> float:
            return float((x - truth) ** 2 + levels[s] + noise * rng.normal())

        best = best_rate(curve_of(loss, seeds, rates), 1)
        assert best is not None
        low, high = best.interval or (0.0, math.inf)
        holds.append(low <= math.exp(truth) <= high)
    # Four standard errors of a share of 0.95 over 400 draws are 0.044. The delta method's interval
    # holds 0.91 and 0.85 in the last two cases.
    assert mean(holds) == pytest.approx(0.95, abs=0.044)


def test_fiellers_bounds_by_a_search():
    """A bound is where the slope's t-value over a fine grid of rates crosses the quantile."""
    noise = np.random.default_rng(3).normal(size=(5, 3))
    losses = dict(zip(GRID, noise, strict=True))
    curve = curve_of(lambda x, s: (x + 4.5) ** 2 + 0.2 * losses[round(math.exp(x), 6)][s], 3)
    best = best_rate(curve, 1)
    assert best is not None
    assert best.interval is not None
    near = [3e-3, 1e-2, 3e-2]
    x = np.repeat(np.log(near), 3)
    y = np.array([v for lr in near for v in curve.values[lr].values()])
    design = np.column_stack([np.tile(np.eye(3), (3, 1)), x, x**2])
    fit = np.linalg.solve(design.T @ design, design.T @ y)
    errors = np.sum((y - design @ fit) ** 2) / 4 * np.linalg.inv(design.T @ design)
    grid = np.linspace(math.log(1e-3), math.log(1e-1), 200_001)
    gradient = np.stack([np.zeros_like(grid)] * 3 + [np.ones_like(grid), 2 * grid])
    t = (fit @ gradient) / np.sqrt(np.einsum("ig,ij,jg->g", gradient, errors, gradient))
    inside = grid[np.abs(t) <= stats.t.ppf(0.975, 4)]
    assert np.log(best.interval) == pytest.approx([inside[0], inside[-1]], abs=1e-4)


def bowl(x: float, _: int) -> float:
    return (x + 4.5) ** 2


@pytest.mark.parametrize(
    ("curve", "remark", "point"),
    [
        (curve_of(lambda x, _: x, 2), "at the edge: ≤ 0.001", None),
        (curve_of(lambda x, _: -x, 2), "at the edge: ≥ 0.1", None),
        (curve_of(bowl, 2, GRID[:2]), "it takes 3 rates", None),
        (
            curve_of(bowl, 2, diverged={3e-2: 1}),
            "between 0.003 and 0.03: runs diverge at 0.03",
            0.01,
        ),
        (
            curve_of(lambda x, _: 2.3 if x > -4 else bowl(x, 0) / 100, 2),
            "between 0.003 and 0.03: too steep for a parabola at 0.03",
            0.01,
        ),
        (curve_of(bowl, 2), NO_NOISE, math.exp(-4.5)),
        (curve_of(lambda x, s: 0.1 * bowl(x, s) + s * math.sin(90 * x), 2), OPEN, None),
    ],
)
def test_why_a_best_rate_or_its_interval_is_not_known(
    curve: RateCurve, remark: str, point: float | None
):
    best = best_rate(curve, 1)
    assert best is not None
    assert (best.remark, best.interval) == (remark, None)
    if remark != OPEN:
        assert best.point == pytest.approx(point)


def test_a_rate_at_which_all_runs_diverged_has_no_best():
    assert best_rate(RateCurve({}, {1e-3: 1, 1e-2: 1, 1e-1: 1}), 1) is None


def falling(x: float, seed: int, r: int | None) -> float:
    """The best rate is 0.03 r^(−1/2), nearly; of full fine-tuning 0.003."""
    noise = 0.02 * math.sin(100 * x + 7 * seed + (r or 0))
    best = 0.003 if r is None else 0.03 / math.sqrt(r) * (1 + 0.05 * math.sin(9 * r))
    return 0.1 + 0.1 * seed + (x - math.log(best)) ** 2 + noise


def test_the_trend_is_the_line_through_the_best_rates():
    (sweep,) = rate_sweeps(runs_of(falling, [1, 2, 4, 8, 16, None]), "val/loss")
    assert list(sweep.curves) == [FULL, 1, 2, 4, 8, 16]
    best = {r: rate.lr for r, rate in sweep.best.items()}
    ranks = [1, 2, 4, 8, 16]
    line = stats.linregress(np.log(ranks), np.log([best[r] or 0 for r in ranks]))
    trend = trend_of(sweep)
    assert trend is not None
    assert trend.interval is not None
    assert (trend.slope, trend.intercept) == pytest.approx((line[0], line[1]))
    half = stats.t.ppf(0.975, 3) * line[4]
    assert trend.interval == pytest.approx((line[0] - half, line[0] + half))
    assert -0.6 < trend.interval[0] < -0.5 < trend.interval[1] < -0.4
    text = sentences(sweep)
    assert text.startswith("Validation loss: the best lr falls as r grows: the slope of log lr ")
    assert "That it does not depend on r does not hold here." in text
    times = math.exp(mean(math.log(best[r] or 0) for r in ranks)) / (best[FULL] or 0)
    assert f"LoRA's, in the geometric mean over r, is {times:.2g} times that." in text
    head, *rows = rate_table_in_full([sweep])
    full = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["r"] for row in full] == ["full", "1", "2", "4", "8", "16"]
    for row, (r, lr) in zip(full, best.items(), strict=True):
        assert float(row["best lr"]) == lr
        assert sweep.best[r].interval == (float(row["95% from"]), float(row["95% to"]))
        assert (row["rates"], row["runs"], row["diverged"]) == ("5", "15", "0")


def same_for_all(x: float, seed: int, r: int | None) -> float:
    return (x + 4.5 + 0.02 * math.sin(9 * (r or 0))) ** 2 + 0.01 * math.sin(100 * x + 7 * seed)


def rank_one_at_the_edge(x: float, seed: int, r: int | None) -> float:
    return -x if r == 1 else same_for_all(x, seed, r)


def drawn_runs() -> list[RunResult]:
    """A run for each rate, none of which two ranks share, as random search draws them."""
    return [run for i, r in enumerate((1, 2, 4)) for run in drawn_at(r, [0.8 + i / 10, 1, 1.2])]


def drawn_at(r: int, factors: list[float]) -> list[RunResult]:
    rates = [lr * factor * (1 + r / 100) for lr in GRID for factor in factors]
    return runs_of(same_for_all, [r], rates=rates, seeds=1)


@pytest.mark.parametrize(
    ("runs", "parts"),
    [
        (
            runs_of(same_for_all, [1, 2, 4, 8]),
            ["Validation loss: that the best lr depends on r is not seen: the slope of log "],
        ),
        (
            runs_of(same_for_all, [1, 2]),
            ["the slope of log lr over log r is", "how sure is not known, it takes 3 ranks."],
        ),
        (
            runs_of(same_for_all, [1, 2], seeds=1),
            ["Each rate has one seed: intervals need several at the same rates (seed=0,1,2)."],
        ),
        (drawn_runs(), ["The rates were drawn, one run each: intervals need the same rates"]),
        (
            runs_of(rank_one_at_the_edge, [1, 2, 4, 8]),
            ["over r = 2, 4 and 8", "Left out: r = 1 (at the edge: ≥ 0.1)."],
        ),
        (
            runs_of(lambda x, *_: x, [1, 2]),
            ["nothing is said of how the best lr depends on r: it is known at no rank."],
        ),
    ],
)
def test_what_is_said_of_the_best_rate_and_r(runs: list[RunResult], parts: list[str]):
    (sweep,) = rate_sweeps(runs, "val/loss")
    text = sentences(sweep)
    for part in parts:
        assert part in text
    assert learning_rate_figure([sweep]) is not None


def test_one_rank_has_a_best_rate_and_no_trend():
    (sweep,) = rate_sweeps(runs_of(same_for_all, [4]), "val/loss")
    assert (sentences(sweep), trend_of(sweep)) == ("", None)
    figure = learning_rate_figure([sweep])
    assert figure is not None
    assert len(figure.axes) == 1
    assert rate_sweeps(runs_of(same_for_all, [4], rates=GRID[:2]), "val/loss") == []


def test_runs_of_another_alpha_are_another_series_and_the_best_is_drawn():
    runs = runs_of(same_for_all, [1, 2])
    worse = [
        seed_run(
            r.rank,
            r.config["seed"],
            {"val/loss": r.last["val/loss"] + 1},
            lr=r.config["optimizer"]["lr"],
            alpha=16,
        )
        for r in runs
    ]
    sweeps = rate_sweeps([*worse, *runs], "val/loss")
    assert [sweep.series for sweep in sweeps] == ["alpha=8", "alpha=16"]
    head, *rows = rate_table(sweeps)
    assert head[:4] == ["metric", "series", "r", "best lr [95% interval]"]
    assert [row[1:3] for row in rows] == [[s.series, r] for s in sweeps for r in ("1", "2")]


def test_the_figure_shows_means_crosses_and_best_rates():
    runs = runs_of(falling, [1, 2, 4], rates=GRID)
    error = "DivergedError: train/loss became nan"
    for i, run in enumerate(runs):
        if run.rank == 4 and run.config["optimizer"]["lr"] == 0.1:
            runs[i] = seed_run(4, run.config["seed"], {}, lr=0.1, state="failed", error=error)
    (sweep,) = rate_sweeps(runs, "val/loss")
    assert sweep.curves[4].diverged == {0.1: 3}
    figure = learning_rate_figure([sweep])
    assert figure is not None
    curves, rates = figure.axes
    drawn = [[tuple(map(float, p)) for p in line.get_xydata()] for line in curves.lines]  # pyright: ignore
    for r in (1, 2, 4):
        means = {lr: mean(falling(math.log(lr), s, r) for s in range(3)) for lr in GRID}
        shown = [(lr, pytest.approx(value)) for lr, value in means.items() if (r, lr) != (4, 0.1)]
        assert shown in drawn
    crosses = [line for line in curves.lines if line.get_marker() == "x"]
    assert [line.get_xdata() for line in crosses] == [[0.1]]
    points = [line for line in rates.lines if line.get_marker() == "o"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [  # pyright: ignore
        (r, best.lr) for r, best in sweep.best.items()
    ]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_report_has_both_comparisons(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The runs are copies of one, so that all have its truncation curve."""
    assert lab("shift", "adapter.r=2") == 0
    keys = ("adapter.r", "optimizer.lr", "seed")
    values = product((1, 2), (0.01, 0.05, 0.2), range(3))
    points: list[Point] = [dict(zip(keys, point, strict=True)) for point in values]
    runs = copy_run(only_run(), points, Path("sweep"))
    with np.load(runs[0].path / "spectra.npz") as arrays:
        curve = dict(zip(arrays["truncation/ranks"], arrays["truncation/loss"], strict=True))
    capsys.readouterr()
    assert command(monkeypatch, "report", "sweep/shift") == 0
    shown, folder = capsys.readouterr().out, Path("sweep/shift/report")

    def losses(r: int, lr: float) -> list[float]:
        def has(run: Run) -> bool:
            return (run.config["adapter"]["r"], run.config["optimizer"]["lr"]) == (r, lr)

        return [run.last("val/loss") or 0.0 for run in runs if has(run)]

    table = rows_of(folder / "cut_against_trained.csv")
    assert {row["metric"] for row in table} == {"val/loss", "forget/loss"}
    rows = {row["series"]: row for row in table if row["metric"] == "val/loss"}
    assert list(rows) == ["lr=0.01", "lr=0.05", "lr=0.2"]
    for row, lr in zip(rows.values(), (0.01, 0.05, 0.2), strict=True):
        test: Any = stats.ttest_1samp(np.array(losses(1, lr)) - curve[1], 0.0)
        assert (row["r"], row["largest r"], row["n"]) == ("1", "2", "3")
        assert float(row["p"]) == pytest.approx(test.pvalue)
    tried = {
        row["r"]: float(row["best lr tried"]) for row in rows_of(folder / "best_learning_rate.csv")
    }
    assert tried == {
        str(r): min((0.01, 0.05, 0.2), key=lambda lr: mean(losses(r, lr))) for r in (1, 2)
    }
    page, markdown = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    for text in ("Paired t-test, two-sided, over seeds", "Best lr: the least point of a parabola"):
        assert text in " ".join(shown.split())
        assert text in page
        assert text in markdown
    assert (folder / "learning_rate.png").stat().st_size > 5000
    assert "![Validation loss over the learning rate" in markdown
    assert all(
        (folder / f"{name}.tex").exists() for name in ("cut_against_trained", "best_learning_rate")
    )
