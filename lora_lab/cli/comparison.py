"""The numbers, the environment and the settings of a run beside those of its reproduction."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.torch import load_file

from lora_lab.cli.stored_devices import recorded_devices
from lora_lab.report.cells import flatten_config
from lora_lab.report.matrices import singular_values_by_matrix
from lora_lab.report.tables import Rows
from lora_lab.runs import DEVICE_KEYS, Run

CHANGED_SETTINGS = ("runs_dir", "bases_dir", "overwrite", "figures", "tracking.mode")
CHANGED_SETTINGS += tuple(f"trainer.{key}" for key in DEVICE_KEYS)
"""Settings that a reproduction changes, and that are not compared therefore.

Of the devices those are compared that trained: `auto` means others on another machine.
"""

WEIGHTS = ("adapter/adapter.safetensors", "model/model.safetensors")
"""The file of a run's trained parameters: its adapter, or its model after full fine-tuning."""


@dataclass(frozen=True)
class Comparison:
    """A number or an array of the stored run beside that of the new run.

    `stored` and `new` are the number, or the array's entry of largest magnitude; None where a run
    does not have it. `absolute` is the largest difference between entries, `relative` is that
    divided by the largest magnitude stored. Both are infinite where one is missing or the shapes
    differ.
    """

    name: str
    stored: float | None
    new: float | None
    absolute: float
    relative: float


def comparisons(stored_run: Run, new_run: Run) -> list[Comparison]:
    """Each metric's last value, each site's singular values over time, each trained tensor."""
    stored, new = _numbers(stored_run), _numbers(new_run)
    return [_compare(name, stored.get(name), new.get(name)) for name in {**stored, **new}]


def differing_settings(stored_run: Run, new_run: Run) -> Rows:
    """Rows of (name, stored, new) for what differs in the environment and the settings."""
    rows: Rows = []
    for read in (environment, _settings):
        stored, new = read(stored_run), read(new_run)
        for name in {**stored, **new}:
            texts = [str(values.get(name, "–")) for values in (stored, new)]
            if texts[0] != texts[1]:
                rows.append([name, *texts])
    return rows


def _compare(name: str, stored: np.ndarray | None, new: np.ndarray | None) -> Comparison:
    """Compares two arrays of one shape; entries that are both NaN count as equal."""
    numbers = [None if a is None else float(a.flat[np.abs(a).argmax()]) for a in (stored, new)]
    if stored is None or new is None or stored.shape != new.shape:
        return Comparison(name, numbers[0], numbers[1], math.inf, math.inf)
    is_same = (stored == new) | (np.isnan(stored) & np.isnan(new))
    with np.errstate(invalid="ignore"):
        gaps = np.nan_to_num(np.where(is_same, 0, np.abs(new - stored)), nan=math.inf)
    absolute, scale = float(gaps.max()), float(np.abs(stored).max())
    relative = (absolute / scale if scale else math.inf) if absolute else 0.0
    return Comparison(name, numbers[0], numbers[1], absolute, relative)


def _numbers(run: Run) -> dict[str, np.ndarray]:
    """The numbers that are compared, by name.

    Each metric's last value (1,), each site's singular values (times, k), each trained tensor.
    """
    last: dict[str, Any] = {}
    for row in run.rows():
        last |= row
    numbers = {k: np.array([float(last[k])]) for k in last if k not in ("step", "epoch")}
    numbers |= {
        f"{name}: singular values": S
        for name, S in singular_values_by_matrix(run).items()
        if S.size
    }
    for file in WEIGHTS:
        if (run.path / file).exists():
            for key, tensor in load_file(run.path / file).items():
                numbers[f"{file.partition('/')[0]}: {key}"] = tensor.double().numpy()
    return numbers


def environment(run: Run) -> dict[str, Any]:
    """The machine, versions, host, threads and devices that a run had, by dotted key."""
    machine = flatten_config(run.environment)
    machine |= {key: run.status.get(key, "–") for key in ("host", "threads")}
    return machine | {"devices": recorded_devices(run) or "–"}


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run by dotted key, without those that a reproduction changes."""
    return {k: v for k, v in flatten_config(run.config).items() if k not in CHANGED_SETTINGS}
