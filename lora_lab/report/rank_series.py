"""Runs that differ in r and seeds alone, and what they have by r."""

import json
import math
from collections.abc import Sequence
from statistics import mean

import numpy as np

from lora_lab.report.cells import Cell, RunResult, cell_label, goal_of, swept_keys

FREE = ("adapter.r", "data.seed", "base.seed")
"""What runs of one series may differ in, besides their seed."""


def lora_runs_by_series(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """LoRA runs that differ in r and seeds alone, by what tells one series from another."""
    return runs_by_series([result for result in results if result.rank is not None])


def runs_by_series(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs that differ in r and seeds alone, of whatever method, by what tells them apart."""
    members: dict[str, list[RunResult]] = {}
    for result in results:
        told = {k: v for k, v in result.settings.items() if _tells(k)}
        members.setdefault(json.dumps(told, sort_keys=True), []).append(result)
    cells = [Cell(key, own) for key, own in members.items()]
    keys = {key: name for key, name in swept_keys(cells).items() if _tells(key)}
    series: dict[str, list[RunResult]] = {}
    for cell in cells:
        name = cell_label(cell, keys) if keys else ""
        series[name if name not in series else f"{name} ({len(series)})"] = cell.results
    return series


def differing_seeds(results: Sequence[RunResult]) -> str:
    """The kinds of seeds that differ in these runs: `seeds and data seeds`; "" of none."""
    kinds = {
        "seeds": [result.config["seed"] for result in results],
        "data seeds": [result.settings.get("data.seed") for result in results],
        "base seeds": [result.settings.get("base.seed") for result in results],
    }
    return " and ".join(kind for kind, seeds in kinds.items() if len({*seeds} - {None}) > 1)


def best_without_rank(
    results: Sequence[RunResult], method: str, metric: str
) -> tuple[str, float] | None:
    """The best mean of a metric that a method without r reaches, over seeds; and where, in words.

    "" where all that was swept comes to the same; None where no run has it.
    """
    own = [r for r in results if r.config["adapter"]["method"] == method and metric in r.metrics]
    means = {
        name: mean(r.metrics[metric] for r in runs) for name, runs in runs_by_series(own).items()
    }
    means = {name: value for name, value in means.items() if math.isfinite(value)}
    if not means:
        return None
    top = (max if goal_of(metric) == "maximize" else min)(means, key=lambda name: means[name])
    return top if len({*means.values()}) > 1 else "", means[top]


def _tells(key: str) -> bool:
    return key not in FREE and key != "cell" and not key.startswith("spectra.")


def values_by_rank(results: Sequence[RunResult], metric: str) -> dict[int, list[float]]:
    """Final values of a metric by r."""
    found: dict[int, list[float]] = {}
    for result in results:
        if (r := result.rank) is not None and metric in result.metrics:
            found.setdefault(r, []).append(result.metrics[metric])
    return dict(sorted(found.items()))


def truncation_losses(results: Sequence[RunResult]) -> tuple[dict[int, list[float]], int]:
    """Losses by k of the runs with the largest r, their ΔW cut to rank k; and that r."""
    top = max((r for result in results if (r := result.rank) is not None), default=0)
    found: dict[int, list[float]] = {}
    for result in results:
        path = result.run.path / "spectra.npz"
        if result.rank == top and path.exists():
            with np.load(path) as arrays:
                if "truncation/ranks" in arrays:
                    ranks, losses = arrays["truncation/ranks"], arrays["truncation/loss"]
                    for k, loss in zip(ranks.tolist(), losses.tolist(), strict=True):
                        found.setdefault(k, []).append(loss)
    return found, top


def mean_spectra(results: Sequence[RunResult]) -> dict[str, dict[int, np.ndarray]]:
    """Site → r → the final singular values of ΔW (k,), their mean over the runs of that r."""
    suffix = "/singular_values"
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    for result in sorted(results, key=lambda result: result.rank or 0):
        path = result.run.path / "spectra.npz"
        if result.rank is not None and path.exists():
            with np.load(path) as arrays:
                for key in (k for k in arrays.files if k.endswith(suffix)):
                    by_r = found.setdefault(key.removesuffix(suffix), {})
                    by_r.setdefault(result.rank, []).append(arrays[key][-1])
    return {
        site: {r: np.mean(_padded(own), axis=0) for r, own in by_r.items()}
        for site, by_r in found.items()
    }


def _padded(every: list[np.ndarray]) -> list[np.ndarray]:
    """With as many values each: a site's own rank may differ between base seeds' advice."""
    k = max(len(sigma) for sigma in every)
    return [np.pad(sigma, (0, k - len(sigma))) for sigma in every]


def best_series(results: Sequence[RunResult]) -> tuple[str, list[RunResult]]:
    """The series with several ranks that reaches the lowest mean loss; ("", []) of none."""
    found = [
        (min(map(mean, losses.values())), name, own)
        for name, own in lora_runs_by_series(results).items()
        if len(losses := values_by_rank(own, "val/loss")) > 1
    ]
    return min(found, key=lambda one: one[:2])[1:] if found else ("", [])
