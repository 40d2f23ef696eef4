"""The best learning rate by rank: series of runs over r and lr, and the trend of the best rate.

LoRA Without Regret (Thinking Machines 2025) claims that the best rate hardly depends on r, where
the scale is alpha/r.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.report import rank_series
from lora_lab.report.best_learning_rate import MIN_RATES, BestRate, RateCurve, best_rate
from lora_lab.report.cells import RunResult
from lora_lab.report.epochs import goal_of

LR = "optimizer.lr"
MIN_RANKS = 3
"""The fewest ranks that scatter about a line."""
FULL = 0
"""The key of full fine-tuning, which has no r."""


@dataclass(frozen=True)
class RateSweep:
    """A metric of one series of runs, which differ in r, the learning rate and seeds alone."""

    metric: str
    series: str
    curves: dict[int, RateCurve]
    """r, ascending → its curve. FULL, first, is full fine-tuning."""
    results: Sequence[RunResult]
    """Its runs."""

    @property
    def sign(self) -> int:
        """1 for a metric that is to be minimized, −1 for one that is to be maximized."""
        return 1 if goal_of(self.metric) == "minimize" else -1

    @property
    def best(self) -> dict[int, BestRate]:
        """r → its best rate, where not all rates diverged."""
        best = {r: best_rate(curve, self.sign) for r, curve in self.curves.items()}
        return {r: rate for r, rate in best.items() if rate}

    @property
    def best_value(self) -> float:
        """The best mean at any r and rate, so that less is better."""
        return min(self.sign * value for c in self.curves.values() for value in c.means.values())


@dataclass(frozen=True)
class Trend:
    """The least-squares line of the log of the best rate over log r."""

    ranks: list[int]
    """Those whose best rate is not at an edge."""
    slope: float
    intercept: float
    """The log of the best rate at r = 1."""
    interval: tuple[float, float] | None
    """95% interval of the slope, by the scatter about the line; None below MIN_RANKS ranks."""


def rate_sweeps(results: Sequence[RunResult], metric: str) -> list[RateSweep]:
    """The series in which a metric has a curve of MIN_RATES rates or more, the best series first.

    Full fine-tuning is in all of them where its runs differ in rates and seeds alone.
    """
    results = [result for result in results if LR in result.settings]
    full = [result for result in results if result.config["adapter"]["method"] == "full"]
    lora = [result for result in results if result.rank is not None]
    beside = rank_series.runs_by_series(full, free=[LR])
    full = next(iter(beside.values())) if len(beside) == 1 else []
    sweeps = []
    for name, runs in rank_series.runs_by_series(lora, free=[LR]).items():
        curves = {FULL: _curve(full, metric)} if full else {}
        curves |= {r: _curve([x for x in runs if x.rank == r], metric) for r in _ranks(runs)}
        curves = {r: curve for r, curve in curves.items() if curve.means}
        if any(r != FULL and len(curve.rates) >= MIN_RATES for r, curve in curves.items()):
            sweeps.append(RateSweep(metric, name, curves, [*runs, *full]))
    return sorted(sweeps, key=lambda sweep: sweep.best_value)


def _ranks(runs: Sequence[RunResult]) -> list[int]:
    """The different r of the runs, ascending."""
    return sorted({run.rank for run in runs if run.rank is not None})


def _curve(runs: Sequence[RunResult], metric: str) -> RateCurve:
    """A metric over the learning rate; runs of equal seeds and rate, cut otherwise, count once."""
    curve = RateCurve({}, {})
    for run in runs:
        lr = float(run.settings[LR])
        if _has_diverged(run, metric):
            curve.diverged[lr] = curve.diverged.get(lr, 0) + 1
        elif run.is_finished and metric in run.metrics:
            curve.values.setdefault(lr, {})[rank_series.seeds_of(run)] = run.metrics[metric]
    return curve


def _has_diverged(run: RunResult, metric: str) -> bool:
    """Whether the run ended because its loss, or ended with a metric that, is not finite."""
    if run.is_finished:
        return not math.isfinite(run.metrics.get(metric, 0.0))
    return run.state == "failed" and run.cause.startswith("DivergedError")


def trend_of(sweep: RateSweep) -> Trend | None:
    """The trend of the best rate over r; None with fewer than two ranks off the edges."""
    points = {r: best.point for r, best in sweep.best.items() if r != FULL}
    known = {r: lr for r, lr in points.items() if lr is not None}
    if len(known) < 2:
        return None
    # scipy.stats takes as long to import as all else of a report.
    from scipy.stats import linregress, t

    x, y = [math.log(r) for r in known], [math.log(lr) for lr in known.values()]
    line: Any = linregress(x, y)
    interval = None
    if len(known) >= MIN_RANKS:
        half = float(t.ppf(0.975, len(known) - 2)) * float(line.stderr)
        interval = float(line.slope) - half, float(line.slope) + half
    return Trend(list(known), float(line.slope), float(line.intercept), interval)
