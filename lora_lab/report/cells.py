"""Runs read once, their cells, what was swept, and every metric as mean ± deviation by cell."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lora_lab.report.tables import format_mean_std, format_number
from lora_lab.report.theory import TheoryCheck, check_against_theory
from lora_lab.runs import DEVICE_KEYS, NOT_IN_IDENTITY, Run

LOWER_IS_BETTER, HIGHER_IS_BETTER = (
    ("loss", "perplexity", "error"),
    ("accuracy", "f1", "auroc", "r2"),
)
"""What a metric's name ends in, where the least or the most of it is best."""
MAX_TEXT_LENGTH = 40
"""Characters of a value in a table."""


@dataclass(frozen=True)
class RunResult:
    """One run as it was on disk when it was read."""

    run: Run
    status: dict[str, Any]
    config: dict[str, Any]
    """{} where it cannot be read."""
    metrics: dict[str, float]
    """The last value of each metric."""

    @property
    def state(self) -> str:
        """finished, running, failed, interrupted, none or damaged."""
        return self.status["state"]

    @property
    def is_finished(self) -> bool:
        """Whether it is finished, and its files can be read."""
        return self.state == "finished"

    @property
    def cause(self) -> str:
        """The first line of why it is not finished; "" where that is not known."""
        return stop_cause(self.status)

    @property
    def experiment(self) -> str:
        """The name in its config; its folder's where it has none."""
        return self.config.get("name") or self.run.path.absolute().parent.name

    @property
    def cell(self) -> str:
        """The run without its seed, in words and by a hash."""
        return self.status.get("cell", self.run.path.name)

    @property
    def rank(self) -> int | None:
        """Its r; None without LoRA."""
        return self.config["adapter"].get("r")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What matters of its config by dotted keys, seeds of the run left out."""
        plain = {k: v for k, v in self.config.items() if k not in (*NOT_IN_IDENTITY, "seed")}
        devices = {f"trainer.{key}" for key in DEVICE_KEYS}
        return {k: v for k, v in flatten_config(plain).items() if k not in devices}

    @cached_property
    def theory_checks(self) -> list[TheoryCheck]:
        """Its metrics beside theory's."""
        return check_against_theory(self.run)


def read_run(run: Run) -> RunResult:
    """The run as it is now; `damaged` where it says finished and its files cannot be read."""
    status, config, finals = run.status, {}, {}
    try:
        config = run.config
        _ = config["adapter"]["method"], config["name"]
        for row in run.rows():
            finals |= row
        if (run.path / "spectra.npz").exists():
            np.load(run.path / "spectra.npz").close()
        sound = bool(finals)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile):
        sound = False
        config = config if isinstance(config, dict) and "adapter" in config else {}
    if status["state"] == "finished" and not sound:
        status["state"] = "damaged"
    return RunResult(
        run, status, config, {k: finals[k] for k in finals if k not in ("step", "epoch")}
    )


def stop_cause(status: dict[str, Any]) -> str:
    """The first line of why a run is not finished; of one that was told to stop, that."""
    error = str(status.get("error", "")).partition("\n")[0]
    told = status["state"] == "interrupted" and error.startswith(("SystemExit", "KeyboardInt"))
    return "stopped" if told else error


def flatten_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted keys; the patterns by site stay whole, their keys are globs."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and not key.endswith("_pattern")
        found |= flatten_config(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


@dataclass(frozen=True)
class Statistics:
    """A metric over the runs of a cell; the deviation is with n − 1, None of one run."""

    n: int
    mean: float
    std: float | None
    minimum: float
    maximum: float

    def __str__(self) -> str:
        return (
            format_number(self.mean) if self.std is None else format_mean_std(self.mean, self.std)
        )


def statistics_of(values: Sequence[float]) -> Statistics | None:
    """The statistics of one metric's values over runs; None of an empty sequence.

    Where a value is not finite, the mean is nan and there is no deviation.
    """
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Statistics(len(values), math.nan, None, min(values), max(values))
    std = stdev(values) if len(values) > 1 else None
    return Statistics(len(values), mean(values), std, min(values), max(values))


@dataclass(frozen=True)
class Cell:
    """The runs that differ in their seed alone."""

    name: str
    results: list[RunResult]

    @cached_property
    def finished(self) -> list[RunResult]:
        """Its finished runs."""
        return [result for result in self.results if result.is_finished]

    @property
    def settings(self) -> dict[str, Any]:
        """What matters of its config, by dotted keys."""
        return self.results[0].settings

    @cached_property
    def metrics(self) -> dict[str, Statistics]:
        """Every metric that its finished runs logged, at the end."""
        keys = dict.fromkeys(key for result in self.finished for key in result.metrics)
        return {key: s for key in keys if (s := statistics_of(self.final_values(key)))}

    def value_of(self, key: str) -> Any:
        """The value of a key of `swept_keys`; None where the cell has no such setting.

        `target` gives the names of its targets, joined; `cell` gives the hash in the cell's name.
        """
        if key == "target":
            return "+".join(self.results[0].config["target"])
        if key == "cell":
            return self.name.rpartition("-")[2]
        return self.settings.get(key)

    def final_values(self, metric: str) -> list[float]:
        """The metric's last value in each finished run that has it."""
        return [result.metrics[metric] for result in self.finished if metric in result.metrics]

    @cached_property
    def rank_measures(self) -> dict[str, Statistics]:
        """Effective and stable rank of ΔW, over the mean of each run's sites."""
        found = {}
        for measure in ("effective_rank", "stable_rank"):
            ends = [
                [
                    v
                    for k, v in r.metrics.items()
                    if k.startswith("spectra/") and k.endswith(measure)
                ]
                for r in self.finished
            ]
            if s := statistics_of([mean(end) for end in ends if end]):
                found[measure.replace("_", " ")] = s
        return found


def cells_of(results: Sequence[RunResult]) -> list[Cell]:
    """The cells of results whose config can be read, by what was swept: r first, then the rest."""
    by_name: dict[str, list[RunResult]] = {}
    for result in results:
        if result.config:
            by_name.setdefault(result.cell, []).append(result)
    cells = [Cell(name, own) for name, own in by_name.items()]
    keys = swept_keys(cells)
    return sorted(cells, key=lambda c: ([sort_key(c.value_of(key)) for key in keys], c.name))


def sort_key(value: Any) -> tuple[Any, ...]:
    """A key for `sorted` over a setting's values: numbers by size, then text, then None."""
    if value is None:
        return (2,)
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def swept_keys(cells: Sequence[Cell]) -> dict[str, str]:
    """The keys that tell these cells from each other, r first, each with its short name.

    A key that only some cells have, as what LoRA has and full fine-tuning has not, is one only
    where it differs between those that have it. Cells that still look alike are told by their hash.
    """
    keys = dict.fromkeys(key for cell in cells for key in cell.settings)
    kinds = {"+".join(cell.results[0].config["target"]) for cell in cells}
    found = ["target"] if len(kinds) > 1 else []
    for key in keys:
        has = [cell.settings[key] for cell in cells if key in cell.settings]
        many = len({json.dumps(value, sort_keys=True) for value in has}) > 1
        if many:
            found.append(key)
    found.sort(key=lambda key: (key != "adapter.r", not key.startswith("adapter.")))
    points = {json.dumps([cell.value_of(key) for key in found], default=str) for cell in cells}
    if len(points) < len(cells):
        found.append("cell")
    short = {key: key.removesuffix("._target_").split(".")[-1] for key in found}
    # `seed` alone is the run's own, over which a cell is the mean.
    short = {key: key if name == "seed" else name for key, name in short.items()}
    names = list(short.values())
    return {
        key: name if names.count(name) == 1 else key.removesuffix("._target_")
        for key, name in short.items()
    }


def short_text(value: Any) -> str:
    """A setting's value as a table has it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rpartition(".")[2] if text.startswith(("lora_lab.", "torch.")) else text
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[: MAX_TEXT_LENGTH - 1]}…"


def full_text(value: Any) -> str:
    """A setting's value whole, as JSON but for words."""
    return value if isinstance(value, str) else json.dumps(value)


def cell_label(cell: Cell, keys: dict[str, str]) -> str:
    """A cell by what was swept: `r=4, lr=0.01`."""
    shown = [
        f"{name}={short_text(value)}"
        for key, name in keys.items()
        if (value := cell.value_of(key)) is not None
    ]
    return ", ".join(shown) or cell.name


def goal_of(metric: str) -> str | None:
    """minimize or maximize, by the metric's name; None where it does not say."""
    last = metric.lower().rpartition("/")[2]
    if last.endswith(LOWER_IS_BETTER):
        return "minimize"
    return "maximize" if last.endswith(HIGHER_IS_BETTER) else None


def ranked_cells(cells: Sequence[Cell], metric: str, goal: str) -> list[Cell]:
    """The cells that have a finite mean of the metric, the best first."""
    has = [c for c in cells if metric in c.metrics and math.isfinite(c.metrics[metric].mean)]
    sign = 1 if goal == "minimize" else -1
    return sorted(has, key=lambda cell: sign * cell.metrics[metric].mean)


def validation_metrics(cells: Sequence[Cell]) -> list[str]:
    """The validation metrics that any of the cells has."""
    return list(dict.fromkeys(k for cell in cells for k in cell.metrics if k.startswith("val/")))
