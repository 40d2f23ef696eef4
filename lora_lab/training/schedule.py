"""The schedule of the learning rate."""

from collections.abc import Callable
from math import cos, pi


def jagged(factor: Callable[[int], float], every: int, warmup: float, step: int) -> float:
    """A schedule's factor at `step`, from 0 again after each `every` steps, but not the first ones.

    Over `warmup` steps it rises back to what it is without restarts (ReLoRA, Lialin et al. 2023,
    figure 2).
    """
    since = step % every
    is_rising = step >= every and since < warmup
    return factor(step) * (since / warmup if is_rising else 1)


def lr_factor(schedule: str, warmup: float, steps: int, step: int) -> float:
    """The factor on the configured learning rate at `step` (from 0) of `steps`.

    It rises from 0 to 1 over `warmup` steps. Then it stays 1 (`constant`), or falls along a line
    (`linear`) or half a cosine wave (`cosine`) toward 0, which it would reach at step `steps`.
    """
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[schedule]
