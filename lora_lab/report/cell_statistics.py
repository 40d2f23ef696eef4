"""The statistics of one number over the runs of a cell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from lora_lab.report.tables import format_mean_std


@dataclass(frozen=True)
class Statistics:
    """The mean, deviation, median and range of one metric's final values over a cell's runs."""

    n: int
    mean: float
    std: float | None
    """The sample standard deviation (over n − 1); None of one run."""
    median: float
    minimum: float
    maximum: float

    def __str__(self) -> str:
        return format_mean_std(self.mean, self.std)


def statistics_of(values: Sequence[float]) -> Statistics | None:
    """The statistics of one metric's values over runs; None of an empty sequence.

    Where a value is not finite, mean and median are nan and there is no deviation.
    """
    if not values:
        return None
    is_finite = all(map(math.isfinite, values))
    average = mean(values) if is_finite else math.nan
    std = stdev(values) if is_finite and len(values) > 1 else None
    middle = median(values) if is_finite else math.nan
    return Statistics(len(values), average, std, middle, min(values), max(values))
