"""The paired t-test over seeds, and Holm's correction for several of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean

import numpy as np

MIN_PAIRS = 3
"""The fewest pairs that are tested: of two, the deviation is one number's."""
ROUNDING = 1e-6
"""Differences below this share of the largest value are rounding, and are not tested."""


@dataclass(frozen=True)
class PairedTest:
    """The mean difference of pairs, and the two-sided t-test of whether it is 0."""

    n: int
    """The number of pairs."""
    difference: float
    """Mean of first − second; nan without pairs."""
    interval: tuple[float, float] | None = None
    """95% interval of the mean difference; None where nothing was tested."""
    p: float | None = None
    """Of this test alone; None where nothing was tested."""
    is_rounding: bool = False
    """Whether all differences are no more than rounding."""


def paired_test(first: Sequence[float], second: Sequence[float], scale: float) -> PairedTest:
    """Tests the differences of pairs, by scipy's `ttest_rel`.

    There is no test of fewer than MIN_PAIRS pairs, of differences that are all the same, and of
    those that are all below ROUNDING · `scale`.
    """
    differences = np.subtract(first, second)
    n = len(differences)
    difference = mean(differences.tolist()) if n else float("nan")
    if n and np.abs(differences).max() <= ROUNDING * scale:
        return PairedTest(n, difference, is_rounding=True)
    if n < MIN_PAIRS or np.ptp(differences) <= ROUNDING * np.abs(differences).max():
        return PairedTest(n, difference)
    # scipy.stats takes as long to import as all else of a report.
    from scipy.stats import ttest_rel

    test = ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    return PairedTest(n, difference, (float(low), float(high)), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values with Holm's correction for their number (Holm 1979), in the same order.

    The smallest of m is taken m times, the next m − 1 times, and so on; none becomes smaller than
    the one before it: 0.01, 0.04, 0.03 → 0.03, 0.06, 0.06.
    """
    order = np.argsort(p_values)
    steps = (p_values[i] * (len(order) - place) for place, i in enumerate(order))
    in_order = accumulate(steps, max, initial=0.0)
    next(in_order)
    corrected = dict(zip(order.tolist(), in_order, strict=True))
    return [min(1.0, corrected[i]) for i in range(len(order))]
