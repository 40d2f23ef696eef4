"""The schedule of the learning rate."""

from math import cos, pi


def lr_factor(schedule: str, warmup: float, steps: int, step: int) -> float:
    """The factor on the configured learning rate at `step` (from 0) of `steps`.

    It rises from 0 to 1 over `warmup` steps. Then it stays 1 (`constant`), or falls along a line
    (`linear`) or half a cosine wave (`cosine`) toward 0, which it would reach at step `steps`.
    """
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[schedule]
