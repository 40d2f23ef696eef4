"""Times the steps of a training, without what comes between them, as validations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

WARM_UP = (1, 5)
"""Steps at which a window ends: those before are slower, as memory and kernels are sought."""


class Window(NamedTuple):
    """Consecutive steps between two pauses."""

    first: int
    """How many steps the clock has seen before."""
    steps: int
    seconds: float
    rows: int
    tokens: int
    runs: int
    """How many runs were trained at once, in a pack."""


class Speed(NamedTuple):
    """The speed of some windows: the median seconds a step of one run, and a step's mean size.

    The median is over all steps, each as long as the mean of its window: an interruption of the
    machine in one of many windows does not count.
    """

    steps: int
    seconds_per_step: float
    rows_per_step: float
    tokens_per_step: float
    runs: int


@dataclass
class StepClock:
    """Adds up the seconds of steps from one pause to the next.

    It waits for a GPU at the two ends of such a window and not in each step. `batch` is called
    before each batch, `pause` before whatever is no step.
    """

    device: torch.device
    first_step: int
    """The step of training at which this process begins, as it is resumed."""
    windows: list[Window] = field(default_factory=list)
    _began: float | None = None
    _step = _rows = _tokens = _runs = 0

    def batch(self, step: int, rows: int, tokens: int, runs: int = 1) -> None:
        """A batch of so many rows comes, after `step` steps of training."""
        done = step - self.first_step
        if done > self._step and (done in WARM_UP or runs != self._runs):
            self.pause(step)
        if self._began is None:
            self._wait()
            self._step, self._rows, self._tokens, self._runs = done, 0, 0, runs
            self._began = perf_counter()
        self._rows += rows
        self._tokens += tokens

    def pause(self, step: int) -> None:
        """Ends a window, if one has begun, after `step` steps of training."""
        if self._began is None:
            return
        self._wait()
        seconds, self._began = perf_counter() - self._began, None
        if steps := step - self.first_step - self._step:
            sizes = self._rows, self._tokens, self._runs
            self.windows.append(Window(self._step, steps, seconds, *sizes))

    def _wait(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @property
    def speed(self) -> Speed | None:
        """The speed so far, without the first steps; None before the first window's end."""
        windows = _warm(self.windows)
        if not windows:
            return None
        counts = [window.steps for window in windows]
        steps, seconds = sum(counts), [w.seconds / w.steps / w.runs for w in windows]
        return Speed(
            steps=steps,
            seconds_per_step=float(np.median(np.repeat(seconds, counts))),
            rows_per_step=sum(window.rows for window in windows) / steps,
            tokens_per_step=sum(window.tokens for window in windows) / steps,
            runs=windows[-1].runs,
        )


def _warm(windows: Sequence[Window]) -> Sequence[Window]:
    """The windows from the sixth step on, where these have five steps; else from the second on."""
    warm = [window for window in windows if window.first >= WARM_UP[1]]
    if sum(window.steps for window in warm) >= WARM_UP[1]:
        return warm
    return [window for window in windows if window.first >= WARM_UP[0]] or windows
