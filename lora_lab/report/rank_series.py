"""Groups runs into series, within which only r and seeds differ, and reads their values by rank.

A series is a line in a figure against r (rank_figures.py), and rows of the truncation table.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import numpy as np

from lora_lab.report.cells import Cell, RunResult, cell_label, swept_keys
from lora_lab.report.epochs import goal_of
from lora_lab.report.matrices import SUFFIX, experts_of, site_of
from lora_lab.run_files import CUTS, HEALED

CUT_KEYS = ("adapter.cut", "adapter.heal")
"""Settings of what follows a training, which is the same whatever they are."""

FREE_KEYS = ("adapter.r", "data.seed", "base.seed", *CUT_KEYS)
"""Settings that may differ within a series, besides the run's seed."""


def lora_runs_by_series(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """The LoRA runs among `results`, grouped as by `runs_by_series`."""
    return runs_by_series([result for result in results if result.rank is not None])


def runs_by_series(
    results: Sequence[RunResult], free: Collection[str] = ()
) -> dict[str, list[RunResult]]:
    """Groups runs of any method into series: settings in words → runs with these settings.

    The keys `free` may differ within a series too. A series' name has only what tells it from the
    other series, as `alpha=8`. It is "" where there is only one series.
    """
    separates = partial(_separates_series, free=free)
    members: dict[str, list[RunResult]] = {}
    for result in results:
        settings = {k: v for k, v in result.settings.items() if separates(k)}
        members.setdefault(json.dumps(settings, sort_keys=True), []).append(result)
    cells = [Cell(key, runs) for key, runs in members.items()]
    keys = {key: name for key, name in swept_keys(cells).items() if separates(key)}
    series: dict[str, list[RunResult]] = {}
    for cell in cells:
        name = cell_label(cell, keys) if keys else ""
        # Long values are shortened in a name, so that two series may have the same one.
        series[name if name not in series else f"{name} ({len(series)})"] = cell.results
    return series


def _separates_series(key: str, free: Collection[str]) -> bool:
    """Whether runs with different values of this setting belong to different series."""
    is_free = key in FREE_KEYS or key in free or key.startswith(("spectra.", "forget"))
    return not is_free and key != "cell"


def seeds_of(result: RunResult) -> tuple[Any, ...]:
    """The seeds of a run, its data and its base: runs that are compared in pairs share them."""
    settings = result.settings
    return result.config["seed"], settings.get("data.seed"), settings.get("base.seed")


def series_over_ranks(results: Sequence[RunResult], metric: str) -> dict[str, list[RunResult]]:
    """The LoRA series whose runs have the metric at two ranks or more, by name."""
    series = lora_runs_by_series(results)
    return {name: runs for name, runs in series.items() if len(values_by_rank(runs, metric)) > 1}


def differing_seeds(results: Sequence[RunResult]) -> str:
    """The kinds of seeds that differ between these runs, as `seeds and data seeds`; "" if none."""
    kinds = {
        "seeds": [result.config["seed"] for result in results],
        "data seeds": [result.settings.get("data.seed") for result in results],
        "base seeds": [result.settings.get("base.seed") for result in results],
    }
    return " and ".join(kind for kind, seeds in kinds.items() if len({*seeds} - {None}) > 1)


def best_reference(runs: Sequence[RunResult], method: str, metric: str) -> tuple[str, float] | None:
    """The best series of a method without r (`full` or `none`): its name and its mean metric.

    The mean is over seeds. The name is "" where all series have the same mean. None where no run of
    the method has a finite value.
    """
    runs = [r for r in runs if r.config["adapter"]["method"] == method and metric in r.metrics]
    series = runs_by_series(runs)
    means = {name: mean(run.metrics[metric] for run in runs) for name, runs in series.items()}
    means = {name: value for name, value in means.items() if math.isfinite(value)}
    if not means:
        return None
    best = (max if goal_of(metric) == "maximize" else min)(means, key=lambda name: means[name])
    return best if len({*means.values()}) > 1 else "", means[best]


def best_series(results: Sequence[RunResult]) -> tuple[str, list[RunResult]]:
    """Name and runs of the series that reaches the lowest mean validation loss at any r.

    Only series with at least two ranks count; ("", []) where there is none.
    """
    candidates = [
        (min(map(mean, values_by_rank(runs, "val/loss").values())), name, runs)
        for name, runs in series_over_ranks(results, "val/loss").items()
    ]
    return min(candidates, key=lambda one: one[:2])[1:] if candidates else ("", [])


def values_by_rank(results: Sequence[RunResult], metric: str) -> dict[int, list[float]]:
    """r, ascending → the metric's last value in each run of that r.

    Runs that differ only in what is cut after the training count as one.
    """
    values: dict[int, list[float]] = {}
    for result in {_training(result): result for result in results}.values():
        if (r := result.rank) is not None and metric in result.metrics:
            values.setdefault(r, []).append(result.metrics[metric])
    return dict(sorted(values.items()))


def _training(result: RunResult) -> str:
    """What tells a run's training from others: all its settings but CUT_KEYS."""
    settings = {key: value for key, value in result.settings.items() if key not in CUT_KEYS}
    return json.dumps([result.config["seed"], settings], sort_keys=True)


def values_after_cut(
    results: Sequence[RunResult], metric: str
) -> tuple[dict[int, list[float]], int]:
    """k → a metric of each training with the largest r, with its ΔW cut to rank k; and that r.

    The validation loss, and that on what the base knew (`forget/loss`), are those of the truncation
    curve. Other metrics, and a loss without a curve, are known at the ranks of adapter.cut.
    """
    largest = max((r for result in results if (r := result.rank) is not None), default=0)
    by_training: dict[str, dict[int, float]] = {}
    for result in results:
        if result.rank == largest:
            values = _smaller_adapters(result, CUTS, metric)
            values |= _truncation_curve(result, metric)
            of_training = by_training.setdefault(_training(result), {})
            of_training |= {k: v for k, v in values.items() if k not in of_training}
    return _by_rank(by_training), largest


def values_after_healing(
    results: Sequence[RunResult], metric: str
) -> dict[int, dict[int, list[float]]]:
    """Steps of healing → k → a metric of each training, cut to rank k from the largest r of them.

    The largest r is that of the runs that have healed adapters.
    """
    healed = [result for result in results if _smaller_adapters(result, HEALED, metric)]
    largest = max((result.rank or 0 for result in healed), default=0)
    by_steps: dict[int, dict[str, dict[int, float]]] = {}
    for result in healed:
        if result.rank == largest:
            by_training = by_steps.setdefault(result.config["adapter"]["heal"], {})
            values = _smaller_adapters(result, HEALED, metric)
            by_training.setdefault(_training(result), {}).update(values)
    return {steps: _by_rank(by_training) for steps, by_training in sorted(by_steps.items())}


def _smaller_adapters(result: RunResult, folder: str, metric: str) -> dict[int, float]:
    """k → a metric of the run's adapter cut to rank k (`folder` cut), or then healed (healed)."""
    pattern = re.compile(rf"{folder}/(\d+)/{re.escape(metric)}")
    matches = ((pattern.fullmatch(key), value) for key, value in result.metrics.items())
    return {int(match[1]): value for match, value in matches if match}


CURVES = {"val/loss": "truncation/loss", "forget/loss": "truncation/forget_loss"}
"""Metric → its truncation curve in spectra.npz."""


def _truncation_curve(result: RunResult, metric: str) -> dict[int, float]:
    """k → the metric with ΔW cut to rank k, by spectra.npz; {} where it has none."""
    path = result.run.path / "spectra.npz"
    if metric not in CURVES or not path.exists():
        return {}
    with np.load(path) as arrays:
        if CURVES[metric] not in arrays:
            return {}
        ranks, curve = arrays["truncation/ranks"], arrays[CURVES[metric]]
        return dict(zip(ranks.tolist(), curve.tolist(), strict=True))


def _by_rank(by_training: Mapping[str, Mapping[int, float]]) -> dict[int, list[float]]:
    """Rank, ascending → the value of each training that has one."""
    ranks = sorted({k for values in by_training.values() for k in values})
    return {k: [v[k] for v in by_training.values() if k in v] for k in ranks}


def mean_spectra(results: Sequence[RunResult]) -> dict[str, dict[int, np.ndarray]]:
    """Site → r → the final singular values of ΔW (k,), their mean over the runs of that r.

    Those of experts are also means over the experts.
    """
    spectra: dict[str, dict[int, list[np.ndarray]]] = {}
    for result in sorted(results, key=lambda result: result.rank or 0):
        path = result.run.path / "spectra.npz"
        if result.rank is not None and path.exists():
            with np.load(path) as arrays:
                experts = experts_of(arrays)
                for key in (k for k in arrays.files if k.endswith(SUFFIX)):
                    site = site_of(key.removesuffix(SUFFIX), experts)
                    by_rank = spectra.setdefault(site, {})
                    by_rank.setdefault(result.rank, []).append(arrays[key][-1])
    return {
        site: {r: np.mean(_padded(runs), axis=0) for r, runs in by_rank.items()}
        for site, by_rank in spectra.items()
    }


def _padded(spectra: list[np.ndarray]) -> list[np.ndarray]:
    """The spectra filled with zeros to the length of the longest.

    Lengths differ where runs with one r have different ranks at the site, as advised for their
    different bases.
    """
    k = max(len(singular_values) for singular_values in spectra)
    return [np.pad(singular_values, (0, k - len(singular_values))) for singular_values in spectra]
