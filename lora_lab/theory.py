"""Closed forms that a measured curve is held against: tensors in, numbers out, in float64.

W is out × d, rows of X are samples, Δ the change planted in W; a loss is a mean over all elements.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """What theory says a metric will be: `value`, give or take a standard error of `error`.

    `error` 0: the formula is exact for the very data and adapter at hand.
    """

    value: float
    error: float = 0.0
