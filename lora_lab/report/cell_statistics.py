"""The statistics of one number over the runs of a cell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lora_lab.report.tables import format_mean_std


@dataclass(frozen=True)
class Statistics:
    """The mean, deviation and range of one metric's final values over the runs of a cell."""

    n: int
    mean: float
    std: float | None
    """The sample standard deviation (over n − 1); None of one run."""
    minimum: float
    maximum: float

    def __str__(self) -> str:
        return format_mean_std(self.mean, self.std)


def statistics_of(values: Sequence[float]) -> Statistics | None:
    """The statistics of one metric's values over runs; None of an empty sequence.

    Where a value is not finite, the mean is nan and there is no deviation.
    """
    if not values:
        return None
    is_finite = all(map(math.isfinite, values))
    average = mean(values) if is_finite else math.nan
    std = stdev(values) if is_finite and len(values) > 1 else None
    return Statistics(len(values), average, std, min(values), max(values))
