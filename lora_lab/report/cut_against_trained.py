"""Training at rank r against training at a larger rank and cutting to r, in pairs of one seed.

Both are compared in each metric that is known after the cut, and again where what was cut was
trained further (healed).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_lab.report import rank_series
from lora_lab.report.cells import RunResult
from lora_lab.report.paired_test import PairedTest, holm, paired_test

COMPARED = ("val/", "test/", "forget/", "generate/")
"""How the names of metrics begin that are compared."""

BySeeds = dict[tuple[Any, ...], float]
"""The seeds of a training → a metric's value."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one series: trained at r, and at the largest r and cut to r."""

    metric: str
    series: str
    r: int
    largest: int
    heal: int
    """The steps that it was trained further after the cut; 0 for none."""
    pairs: int
    """Seeds with both; a pair with a value that is not finite is left out below."""
    trained: list[float]
    """The metric trained at r, a value for each pair."""
    cut: list[float]
    """The metric after the cut, in the same order."""
    test: PairedTest
    """Of trained − cut."""
    p: float | None = None
    """The test's p with Holm's correction over the ranks; None where nothing was tested."""


def comparisons(finished: Sequence[RunResult]) -> list[Comparison]:
    """Each metric, series, rank below the largest, and way for which some seed has both values.

    A way is a cut alone, or a cut and so many steps of healing. All values are those at the end of
    the training, as is the ΔW that is cut.
    """
    at_the_end = [replace(result, at="last") for result in finished]
    names = dict.fromkeys(m for r in at_the_end for m in r.metrics if m.startswith(COMPARED))
    series = rank_series.lora_runs_by_series(at_the_end)
    pairs = [(metric, name, runs) for metric in names for name, runs in series.items()]
    return [one for metric, name, runs in pairs for one in _of_series(metric, name, runs)]


def _of_series(metric: str, series: str, runs: Sequence[RunResult]) -> list[Comparison]:
    """The comparisons of one metric in one series."""
    largest = max(run.rank or 0 for run in runs)
    trained, by_steps = _values(runs, metric, largest)
    by_rank = [at_r for ways in (trained, *by_steps.values()) for at_r in ways.values()]
    values = [abs(value) for at_r in by_rank for value in at_r.values()]
    scale = max(filter(math.isfinite, values), default=0.0)
    of_series: list[Comparison] = []
    for heal, cut in by_steps.items():
        of_way: list[Comparison] = []
        for r in sorted(r for r in trained.keys() & cut.keys() if r < largest):
            if seeds := sorted(trained[r].keys() & cut[r].keys(), key=str):
                both = [(trained[r][seed], cut[r][seed]) for seed in seeds]
                finite = [pair for pair in both if all(map(math.isfinite, pair))]
                first, second = [a for a, _ in finite], [b for _, b in finite]
                test = paired_test(first, second, scale)
                sizes = (r, largest, heal, len(both))
                of_way.append(Comparison(metric, series, *sizes, first, second, test))
        of_series += _corrected(of_way)
    return sorted(of_series, key=lambda comparison: comparison.r)


def _corrected(of_way: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one way at several ranks, with Holm's correction for their number."""
    tested = [one for one in of_way if one.test.p is not None]
    p_values = dict(
        zip((c.r for c in tested), holm([c.test.p or 0.0 for c in tested]), strict=True)
    )
    return [replace(one, p=p_values.get(one.r)) for one in of_way]


def _values(
    runs: Sequence[RunResult], metric: str, largest: int
) -> tuple[dict[int, BySeeds], dict[int, dict[int, BySeeds]]]:
    """A metric by seeds: r → of what was trained; steps of healing → r → of what was then cut.

    0 steps are the cut alone. What was cut is of the runs with the largest r.
    """
    by_seeds: dict[tuple[Any, ...], list[RunResult]] = {}
    for run in runs:
        by_seeds.setdefault(rank_series.seeds_of(run), []).append(run)
    trained: dict[int, BySeeds] = {}
    smaller: dict[int, dict[int, BySeeds]] = {}
    for seeds, members in by_seeds.items():
        _add(trained, seeds, rank_series.values_by_rank(members, metric))
        at_largest = [run for run in members if run.rank == largest]
        after_cut, _ = rank_series.values_after_cut(at_largest, metric)
        _add(smaller.setdefault(0, {}), seeds, after_cut)
        for steps, healed in rank_series.values_after_healing(at_largest, metric).items():
            _add(smaller.setdefault(steps, {}), seeds, healed)
    return trained, dict(sorted(smaller.items()))


def _add(
    to: dict[int, BySeeds], seeds: tuple[Any, ...], by_rank: Mapping[int, list[float]]
) -> None:
    """Adds the first value at each rank under the seeds that it has; others differ in spectra."""
    for r, values in by_rank.items():
        to.setdefault(r, {})[seeds] = values[0]
