"""The best learning rate at a rank: the least point of a parabola in log lr, and how sure it is.

Near its least point a loss is a parabola in log lr. It is fitted by least squares to all seeds'
values at the best rate that was tried and at its neighbours, with a level of its own for each seed:
y = level + b x + c x², where x = log(lr / best tried). Its least point is at x = −b / 2c.

The 95% interval is Fieller's (1954): all x at which the slope b + 2 c x does not differ from 0 by
a t-test. It holds its level where the parabola is nearly flat too, where errors carried over from b
and c (the delta method) are too small, and is then open: these seeds do not tell the best rate. It
knows the noise of seeds, and what of the misfit the residuals show.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from statistics import mean
from typing import Any

import numpy as np

from lora_lab.report.paired_test import ROUNDING

MIN_RATES = 3
"""The fewest rates of which one can be best and have neighbours."""
REACH = 10**0.5
"""Neighbours are the rates within this factor of the best, and the next one on each side.

Farther away a loss is no parabola: it rises otherwise below the best rate than above it.
"""
JUMP = 10.0
"""A value that rises by more than this many times what it does on the other side is no parabola's.

A parabola's rises are at most some 4 times each other, where two rates of each side are compared.
"""


@dataclass(frozen=True)
class RateCurve:
    """A metric of runs that differ in the learning rate and seeds alone."""

    values: dict[float, dict[tuple[Any, ...], float]]
    """lr → seeds → the metric, where it is finite."""
    diverged: dict[float, int]
    """lr → the number of runs that diverged, where there are any."""

    @cached_property
    def rates(self) -> list[float]:
        """All rates that were tried, ascending."""
        return sorted({*self.values, *self.diverged})

    @cached_property
    def means(self) -> dict[float, float]:
        """lr → the mean over seeds, of the rates at which no run diverged."""
        usable = [lr for lr in self.rates if lr not in self.diverged]
        return {lr: mean(self.values[lr].values()) for lr in usable}

    @property
    def runs(self) -> int:
        """The number of its runs, diverged ones too."""
        return sum(map(len, self.values.values())) + sum(self.diverged.values())


@dataclass(frozen=True)
class Parabola:
    """y = level + b x + c x² over x = log(lr / tried)."""

    tried: float
    level: float
    b: float
    c: float
    low: float
    """The lowest of the rates that it was fitted to."""
    high: float
    """The highest of them."""

    def at(self, lr: np.ndarray) -> np.ndarray:
        """Its values at learning rates."""
        x = np.log(lr / self.tried)
        return self.level + self.b * x + self.c * x**2


@dataclass(frozen=True)
class BestRate:
    """The best learning rate of a curve, as far as its runs tell."""

    tried: float
    """The rate with the best mean of those that were tried."""
    lr: float | None
    """The parabola's best; None where the neighbours do not tell it."""
    interval: tuple[float, float] | None = None
    """95% interval of `lr`; None where it is not known."""
    remark: str = ""
    """Why `lr` or its interval is not known."""
    bounds: tuple[float, float] | None = None
    """Where `lr` is None: the rates between which it lies, beyond an edge 0 or infinity."""
    parabola: Parabola | None = None

    @property
    def point(self) -> float | None:
        """The rate that stands for it in a trend: the parabola's, or the best that was tried.

        The latter where no parabola tells the best rate, but the rates beside it enclose it. None
        at an edge.
        """
        is_enclosed = self.bounds is not None and 0 < self.bounds[0] < self.bounds[1] < math.inf
        return self.tried if self.lr is None and is_enclosed else self.lr


ONE_SEED = "no interval: one seed"
"""The remark on a rate of runs that share one seed, or have no value to spare for an error."""
NO_NOISE = "no interval: seeds give one value"
"""The remark on a rate of runs that are the same whatever their seed, up to rounding."""
OPEN = "open: too flat for these seeds"
"""The remark on a rate whose interval has no bounds."""


def best_rate(curve: RateCurve, sign: int) -> BestRate | None:
    """The best rate of a curve; None where at each rate a run diverged.

    `sign` is 1 for a metric that is to be minimized, −1 for one that is to be maximized.
    """
    if not curve.means:
        return None
    tried = min(curve.means, key=lambda lr: sign * curve.means[lr])
    if len(curve.rates) < MIN_RATES:
        return BestRate(tried, None, remark=f"it takes {MIN_RATES} rates")
    if tried == curve.rates[0]:
        return BestRate(tried, None, remark=f"at the edge: ≤ {tried:g}", bounds=(0.0, tried))
    if tried == curve.rates[-1]:
        return BestRate(tried, None, remark=f"at the edge: ≥ {tried:g}", bounds=(tried, math.inf))
    place = curve.rates.index(tried)
    below, above = curve.rates[place - 1 :: -1], curve.rates[place + 1 :]
    near = []
    for side, other in ((below, above), (above, below)):
        near += (kept := _neighbours(curve, tried, side, other, sign))
        if not kept:
            cause = "runs diverge" if side[0] in curve.diverged else "too steep for a parabola"
            remark = f"between {below[0]:g} and {above[0]:g}: {cause} at {side[0]:g}"
            return BestRate(tried, None, remark=remark, bounds=(below[0], above[0]))
    return _least_point(curve, tried, [tried, *near], sign)


def _neighbours(
    curve: RateCurve, tried: float, side: Sequence[float], other: Sequence[float], sign: int
) -> list[float]:
    """The rates on one side of the best that a parabola may hold with it, from it outward.

    They end before a rate at which a run diverged, or at which the metric rises by more than JUMP
    times what it does on the `other` side.
    """

    def near(rates: Sequence[float], least: int) -> list[float]:
        factors = [max(lr / tried, tried / lr) for lr in rates]
        return [lr for i, lr in enumerate(rates) if i < least or factors[i] < 1.001 * REACH]

    def rise(lr: float) -> float:
        return sign * (curve.means[lr] - curve.means[tried]) if lr in curve.means else math.inf

    rises = [rise(lr) for lr in near(other, least=2)]
    most = JUMP * max(filter(math.isfinite, rises), default=sys.float_info.max)
    return list(takewhile(lambda lr: rise(lr) <= most, near(side, least=1)))


def _least_point(curve: RateCurve, tried: float, near: Sequence[float], sign: int) -> BestRate:
    """The best point of the parabola through all seeds' values at the rates `near`."""
    points = [(lr, seeds, y) for lr in near for seeds, y in curve.values[lr].items()]
    x = np.array([math.log(lr / tried) for lr, _, _ in points])
    y = np.array([value for *_, value in points])
    blocks = sorted({seeds for _, seeds, _ in points}, key=str)
    # A column of ones for each seed, then x and x²: with 2 seeds (points, 4).
    of_seed = [[float(seeds == block) for block in blocks] for _, seeds, _ in points]
    design = np.column_stack([of_seed, x, x**2])
    fit, _, _, _ = np.linalg.lstsq(design, y)
    level, b, c = float(fit[:-2].mean()), float(fit[-2]), float(fit[-1])
    parabola = Parabola(tried, level, b, c, min(near), max(near))
    if sign * c <= 0 or not min(x) <= (least := -b / (2 * c)) <= max(x):
        bounds = (parabola.low, parabola.high)
        remark = f"between {bounds[0]:g} and {bounds[1]:g}: no parabola fits"
        return BestRate(tried, None, remark=remark, bounds=bounds)
    best = BestRate(tried, tried * math.exp(least), parabola=parabola)
    spare = len(points) - design.shape[1]
    if len(blocks) < 2 or spare < 1:
        return replace(best, remark=ONE_SEED)
    spreads = [np.ptp([*curve.values[lr].values()]) for lr in near]
    if max(spreads) <= ROUNDING * np.abs(y).max():
        return replace(best, remark=NO_NOISE)
    variance = float(np.sum((y - design @ fit) ** 2)) / spare
    errors = variance * np.linalg.inv(design.T @ design)[-2:, -2:]
    bounds = _zeros_of_slope(b, c, errors, spare)
    if bounds is None:
        return replace(best, remark=OPEN)
    return replace(best, interval=(tried * math.exp(bounds[0]), tried * math.exp(bounds[1])))


def _zeros_of_slope(
    b: float, c: float, errors: np.ndarray, spare: int
) -> tuple[float, float] | None:
    """Fieller's interval: the x at which b + 2 c x does not differ from 0; None where it is open.

    `errors` is the covariance of b and c (2, 2), with `spare` degrees of freedom. The bounds solve
    (b + 2 c x)² = t² Var(b + 2 c x), which is quadratic in x.
    """
    from scipy.special import stdtrit

    t2 = float(stdtrit(spare, 0.975)) ** 2
    squared = 4 * (c * c - t2 * errors[1, 1])
    linear = 4 * (b * c - t2 * errors[0, 1])
    constant = b * b - t2 * errors[0, 0]
    if squared <= 0:
        return None
    # At x = −b / 2c the left side is 0 and the right side is not less, so that there are roots.
    root = max(0.0, linear**2 - 4 * squared * constant)
    ends = sorted((-linear + sign * math.sqrt(root)) / (2 * squared) for sign in (-1, 1))
    return ends[0], ends[1]
