"""Runs as they were read, grouped into cells, and each metric's statistics over a cell's runs.

A cell is one point of an ablation: the runs whose configs differ in `seed` alone. `read_run` reads
a run once; tables and figures take `RunResult`s and `Cell`s.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

from lora_lab.report.cell_statistics import Statistics, statistics_of
from lora_lab.report.epochs import At, BestValue, best_values, epoch_text, goal_of
from lora_lab.report.setting_values import full_text, short_text, sort_key
from lora_lab.report.theory import TheoryCheck, check_against_theory
from lora_lab.run_files import DamagedRunError, cost_metrics, fault
from lora_lab.runs import DEVICE_KEYS, NOT_IN_IDENTITY, Run


@dataclass(frozen=True)
class RunResult:
    """What one run's directory held when it was read, so that all tables show the same moment."""

    run: Run
    status: dict[str, Any]
    """status.json, with `state` set to damaged where a file is not as it was."""
    config: dict[str, Any]
    """The resolved config; {} where it cannot be read or was changed."""
    last: dict[str, float]
    """The last value of each metric in metrics.jsonl, without step and epoch, and of cost.json."""
    best: dict[str, BestValue]
    """The best value of each validation metric, and its epoch (epochs.py)."""
    epochs: float
    """The epoch of its last validation."""
    first: dict[str, float] = field(default_factory=dict)
    """The first value of each metric: of `val/loss`, that before the first step."""
    at: At = "last"
    """The epoch that the validation metrics in `metrics` are of; all others are the last."""

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The value of each metric: its last, or at=best its best where it has one."""
        best = self.best if self.at == "best" else {}
        return self.last | {metric: value for metric, (value, _) in best.items()}

    @property
    def select(self) -> str:
        """Which validation's weights are the result: the `last` one's, or `best METRIC`."""
        return self.config.get("select", "last")

    def is_at_best(self, metric: str) -> bool:
        """Whether the value of a metric in `metrics`, or of one that begins so, is its best."""
        return self.at == "best" and any(name.startswith(metric) for name in self.best)

    @property
    def state(self) -> str:
        """finished, running, failed, interrupted, none or damaged."""
        return self.status["state"]

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end and its files can be read."""
        return self.state == "finished"

    @property
    def cause(self) -> str:
        """One line on why the run is not finished; "" where it is not known."""
        return stop_cause(self.status)

    @property
    def experiment(self) -> str:
        """The `name` in its config; the name of its parent folder where the config has none."""
        return self.config.get("name") or self.run.path.absolute().parent.name

    @property
    def cell(self) -> str:
        """The name of its cell: main settings and a hash of all settings but the seed."""
        return self.status.get("cell", self.run.path.name)

    @property
    def rank(self) -> int | None:
        """The `adapter.r` of its config; None where its method is not LoRA."""
        return self.config["adapter"].get("r")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its config as {dotted key: value}, without `seed` and what cannot change a result."""
        config = {k: v for k, v in self.config.items() if k not in (*NOT_IN_IDENTITY, "seed")}
        devices = {f"trainer.{key}" for key in DEVICE_KEYS}
        return {k: v for k, v in flatten_config(config).items() if k not in devices}

    @cached_property
    def theory_checks(self) -> list[TheoryCheck]:
        """Its final metrics, each beside the value that theory predicts; [] without a theory."""
        return check_against_theory(self.run)

    def site_values(self, measure: str) -> list[float]:
        """A measure of ΔW, as effective_rank, at each site; [] where no spectra were taken."""
        keys = [k for k in self.metrics if k.startswith("spectra/") and k.endswith(measure)]
        return [self.metrics[key] for key in keys]


def read_run(
    run: Run, in_full: tuple[str, ...] = (), at: At = "last", goals: Mapping[str, str] | None = None
) -> RunResult:
    """Reads a run's directory as it is now, for its metrics at the epoch `at`.

    `in_full` are beginnings of names: the content of these files is compared with the records of a
    finished run whatever their size (`Run.check`). The state is `damaged` where they differ.
    `goals` are as in `best_values`.
    """
    status, config, rows, cost = run.status, {}, [], {}
    if status["state"] == "finished" and (problem := fault(run.path, status, in_full)):
        status |= {"state": "damaged", "error": problem}
    with suppress(OSError, DamagedRunError):
        if not status.get("error", "").startswith("config.yaml"):
            config = run.config if isinstance(run.config.get("adapter"), dict) else {}
        rows = run.rows()
        cost = cost_metrics(run.path)
    last = {key: value for row in rows for key, value in row.items()}
    last = {key: value for key, value in last.items() if key not in ("step", "epoch")} | cost
    first = {key: value for row in reversed(rows) for key, value in row.items()}
    epochs = max((row.get("epoch", 0) for row in rows if "val/loss" in row), default=0)
    best = best_values(rows, goals)
    return RunResult(run, status, config, last, best, epochs, first=first, at=at)


def stop_cause(status: dict[str, Any]) -> str:
    """The first line of the error in a run's status; `stopped` after Ctrl-C or SIGTERM."""
    error = str(status.get("error", "")).partition("\n")[0]
    by_signal = error.startswith(("SystemExit", "KeyboardInt"))
    return "stopped" if status["state"] == "interrupted" and by_signal else error


def flatten_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as {dotted key: value}.

    The values of rank_pattern and alpha_pattern stay dicts: their keys are globs over site names,
    which have dots themselves.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_section = isinstance(value, dict) and not key.endswith("_pattern")
        flat |= flatten_config(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


@dataclass(frozen=True)
class Cell:
    """One point of an ablation: the runs that differ in their seed alone."""

    name: str
    results: list[RunResult]

    @cached_property
    def finished(self) -> list[RunResult]:
        """Those of its runs that are finished; all statistics are over these."""
        return [result for result in self.results if result.is_finished]

    @property
    def settings(self) -> dict[str, Any]:
        """What its runs share of their configs, as {dotted key: value}."""
        return self.results[0].settings

    @cached_property
    def metrics(self) -> dict[str, Statistics]:
        """Statistics of each metric's value, over the finished runs that logged it."""
        keys = dict.fromkeys(key for result in self.finished for key in result.metrics)
        return {key: s for key in keys if (s := statistics_of(self.values(key)))}

    @cached_property
    def published(self) -> dict[str, float]:
        """The published metrics of this cell; none where its runs are of no published one."""
        numbers: dict[str, float] = {}
        for result in self.results:
            for metrics in ((result.config.get("published") or {}).get("cells") or {}).values():
                numbers |= metrics
        return numbers

    def value_of(self, key: str) -> Any:
        """The value of a key of `swept_keys`; None where the cell has no such setting.

        `target` gives the names of its targets, joined; `cell` gives the hash in the cell's name.
        """
        if key == "target":
            return "+".join(self.results[0].config["target"])
        if key == "cell":
            return self.name.rpartition("-")[2]
        return self.settings.get(key)

    def swept_texts(self, keys: dict[str, str]) -> list[str]:
        """The first columns of its row: its swept settings; its name where nothing was swept."""
        return [short_text(self.value_of(key)) for key in keys] or [self.name]

    def full_texts(self, keys: dict[str, str]) -> list[str]:
        """Likewise in a table for programs: its name, then its settings, "" for one it lacks."""
        values = [self.value_of(key) for key in keys]
        return [self.name, *("" if value is None else full_text(value) for value in values)]

    def values(self, metric: str) -> list[float]:
        """The metric's value in each finished run that logged it."""
        return [result.metrics[metric] for result in self.finished if metric in result.metrics]

    @cached_property
    def rank_measures(self) -> dict[str, Statistics]:
        """Statistics of ΔW's `effective rank` and `stable rank`, each run's mean over its sites."""
        measures = {}
        for measure in ("effective_rank", "stable_rank"):
            by_run = [result.site_values(measure) for result in self.finished]
            if s := statistics_of([mean(by_site) for by_site in by_run if by_site]):
                measures[measure.replace("_", " ")] = s
        return measures


def cells_of(results: Sequence[RunResult]) -> list[Cell]:
    """Groups runs into cells, sorted by their swept settings: by r first.

    Runs whose config cannot be read are left out.
    """
    by_name: dict[str, list[RunResult]] = {}
    for result in results:
        if result.config:
            by_name.setdefault(result.cell, []).append(result)
    cells = [Cell(name, members) for name, members in by_name.items()]
    keys = swept_keys(cells)
    return sorted(cells, key=lambda c: ([sort_key(c.value_of(key)) for key in keys], c.name))


def swept_keys(cells: Sequence[Cell]) -> dict[str, str]:
    """The settings in which these cells differ, as {dotted key: short name for a column}.

    r comes first, then the adapter's other keys, then the rest. A key that some cells lack (full
    fine-tuning has no r) counts only where it differs between the cells that have it. Two keys are
    not of the configs: `target`, where the cells have different targets, and `cell`, the hash in a
    cell's name, where two cells would look alike without it. `Cell.value_of` gives their values.
    """
    targets = {"+".join(cell.results[0].config["target"]) for cell in cells}
    swept = ["target"] if len(targets) > 1 else []
    for key in dict.fromkeys(key for cell in cells for key in cell.settings):
        values = [cell.settings[key] for cell in cells if key in cell.settings]
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            swept.append(key)
    swept.sort(key=lambda key: (key != "adapter.r", not key.startswith("adapter.")))
    points = {json.dumps([cell.value_of(key) for key in swept], default=str) for cell in cells}
    if len(points) < len(cells):
        swept.append("cell")
    return _short_names(swept)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part, as lr of optimizer.lr; the full key where two end alike.

    data.seed and base.seed stay full: `seed` alone is the run's, over which a cell is the mean.
    """
    full = {key: key.removesuffix("._target_") for key in keys}
    last_parts = [name.rpartition(".")[2] for name in full.values()]
    unique = {part for part in last_parts if last_parts.count(part) == 1 and part != "seed"}
    return {k: p if p in unique else full[k] for k, p in zip(keys, last_parts, strict=True)}


def cell_label(cell: Cell, keys: dict[str, str]) -> str:
    """A cell by its swept settings, for a legend or a label: `r=4, lr=0.01`."""
    values = [(name, cell.value_of(key)) for key, name in keys.items()]
    parts = [f"{name}={short_text(value)}" for name, value in values if value is not None]
    return ", ".join(parts) or cell.name


def ranked_cells(cells: Sequence[Cell], metric: str, goal: str | None = None) -> list[Cell]:
    """The cells by their mean of a metric, the best first; those without a finite mean left out.

    `goal` None: as `goal_of` tells; [] where it does not.
    """
    if (goal := goal or goal_of(metric)) is None:
        return []
    ranked = [c for c in cells if metric in c.metrics and math.isfinite(c.metrics[metric].mean)]
    sign = 1 if goal == "minimize" else -1
    return sorted(ranked, key=lambda cell: sign * cell.metrics[metric].mean)


def metrics_below(prefix: str, cells: Sequence[Cell]) -> list[str]:
    """The names of the metrics below a prefix, as `val/`, that any of the cells has."""
    return list(dict.fromkeys(k for cell in cells for k in cell.metrics if k.startswith(prefix)))


def epoch_of(metric: str, results: Sequence[RunResult]) -> str:
    """Where in training the metric's values in these runs are taken, as `at its best epoch`."""
    at = "best" if any(result.is_at_best(metric) for result in results) else "last"
    return epoch_text(metric, at, [result.select for result in results])
