"""Training at r against cutting to r: pairs, tests, the table and what it says in words.

Truth: scipy's one-sample t-test of the differences, Holm's correction as the definition says it (a
plain loop over all hypotheses), and sentences written by hand.

Run: make test ARGS=tests/report/test_cut_against_trained.py
"""

from itertools import product
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_lab.report.cells import RunResult
from lora_lab.report.cut_against_trained import comparisons
from lora_lab.report.cut_report import (
    comparison_note,
    comparison_table,
    comparison_table_in_full,
    sentences,
)
from lora_lab.report.paired_test import holm, paired_test
from tests.report.seed_runs import seed_run

LOSS, CUT = "val/loss", "cut/{}/val/loss"


def runs_with(differences: dict[int, list[float]], metric: str = LOSS) -> list[RunResult]:
    """Runs at each r and at 16, whose metric is cut + the difference; a value for each seed."""
    level, runs = 1.0, []
    for seed in range(len(next(iter(differences.values())))):
        cut = {f"cut/{r}/{metric}": level + 0.1 * seed + 1 / r for r in differences}
        runs.append(seed_run(16, seed, {metric: 0.5, **cut}))
        for r, of_seeds in differences.items():
            value = cut[f"cut/{r}/{metric}"] + of_seeds[seed]
            runs.append(seed_run(r, seed, {metric: value}))
    return runs


def test_holms_correction():
    draws = np.random.default_rng(0).uniform(0, 0.4, size=(40, 5))
    for p in [[0.01, 0.04, 0.03], [0.5], [], *draws.tolist()]:
        expected = []
        for one in p:
            # The largest, over all p up to this one, of p times the number of those not below it.
            steps = [other * sum(x >= other for x in p) for other in p if other <= one]
            expected.append(min(1.0, max(steps)))
        assert holm(p) == pytest.approx(expected)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("n", [3, 4, 9])
def test_the_paired_test_is_the_t_test_of_the_differences(n: int):
    first, second = np.random.default_rng(n).normal(size=(2, n))
    test = paired_test(first.tolist(), second.tolist(), scale=1.0)
    truth: Any = stats.ttest_1samp(first - second, 0.0)
    half = stats.t.ppf(0.975, n - 1) * stdev(first - second) / n**0.5
    assert test.interval is not None
    assert (test.n, test.difference) == (n, pytest.approx(mean(first - second)))
    assert test.p == pytest.approx(truth.pvalue)
    assert test.interval == pytest.approx((test.difference - half, test.difference + half))


@pytest.mark.parametrize(
    ("first", "second", "is_rounding"),
    [
        ([1.0, 2.0], [0.5, 1.0], False),  # two pairs
        ([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], False),  # no spread
        ([1.0, 2.0, 3.0], [1.0 + 1e-8, 2.0, 3.0 - 1e-8], True),
        ([], [], False),
    ],
)
def test_what_is_not_tested(first: list[float], second: list[float], is_rounding: bool):
    test = paired_test(first, second, scale=3.0)
    assert (test.p, test.interval, test.is_rounding) == (None, None, is_rounding)


def test_pairs_share_their_seeds_and_the_table_has_their_numbers():
    """Of r = 1 one seed is missing, one data seed is another, one cut value is infinite."""
    rng = np.random.default_rng(1)
    points = list(product(range(3), range(2)))
    trained = {point: float(rng.normal(1, 0.1)) for point in points}
    cut = {point: float(rng.normal(2, 0.1)) for point in points}
    cut[1, 1] = float("inf")
    runs = []
    for seed, data_seed in reversed(points):
        at_largest = {LOSS: 0.1, CUT.format(1): cut[seed, data_seed], CUT.format(2): 0.3}
        runs.append(seed_run(4, seed, at_largest, data_seed=data_seed))
        if (seed, data_seed) != (0, 1):
            runs.append(seed_run(1, seed, {LOSS: trained[seed, data_seed]}, data_seed=data_seed))
    runs.append(seed_run(1, 7, {LOSS: 9.0}))  # without a partner
    (one,) = comparisons(runs)
    pairs = [point for point in points if point not in ((0, 1), (1, 1))]
    assert (one.metric, one.r, one.largest, one.pairs) == (LOSS, 1, 4, 5)
    assert sorted(zip(one.trained, one.cut, strict=True)) == sorted(
        (trained[point], cut[point]) for point in pairs
    )
    head, row = comparison_table_in_full([one])
    full = dict(zip(head, row, strict=True))
    values = [trained[point] for point in pairs], [cut[point] for point in pairs]
    truth = stats.ttest_rel(*values)
    assert float(full["p"]) == float(full["p Holm"]) == pytest.approx(truth.pvalue)
    assert [float(full[f"95% {end}"]) for end in ("from", "to")] == pytest.approx(
        list(truth.confidence_interval())
    )
    assert float(full["trained at r std"]) == pytest.approx(stdev(values[0]))
    assert float(full["difference"]) == pytest.approx(mean(values[0]) - mean(values[1]))
    head, row = comparison_table([one])
    assert head[:4] == ["metric", "r", "trained at r", "cut from 4"]
    assert row[-1] == "4 of 5"
    assert "over seeds and data seeds" in comparison_note(runs, [one])
    assert "nothing is said of others" not in comparison_note(runs, [one])


def test_what_was_healed_is_compared_too_and_corrected_apart():
    runs = runs_with({1: [-0.3, -0.31, -0.32], 2: [-0.1, -0.2, 0.05]})
    for run in runs:
        if run.rank == 16:
            run.config["adapter"]["heal"] = 5
            healed = {
                k.replace("cut/", "healed/"): v - 0.5 for k, v in run.last.items() if "cut" in k
            }
            run.last.update(healed)
    compared = comparisons(runs)
    assert [(one.r, one.heal) for one in compared] == [(1, 0), (1, 5), (2, 0), (2, 5)]
    for heal in (0, 5):
        of_way = [one for one in compared if one.heal == heal]
        alone = [stats.ttest_rel(one.trained, one.cut).pvalue for one in of_way]
        assert [one.p for one in of_way] == pytest.approx(holm(alone))
        assert alone[0] < alone[1]
        assert of_way[0].p == pytest.approx(2 * alone[0])
    head, first, _ = comparison_table(compared)
    assert head[3::4] == ["cut from 16", "cut from 16, trained 5 steps more"]
    assert first[4].startswith("-0.310 [-0.335 to -0.285]")
    assert len(sentences(compared)) == 2
    assert "than cutting from 16 and training 5 steps more" in sentences(compared)[1]


SURE = [-0.30, -0.31, -0.32]
CASES = [
    (
        {1: SURE},
        LOSS,
        "Validation loss: at r = 1 training at r is better than cutting from 16 (lower by 0.310 "
        "[0.285 to 0.335], p < 0.001). 3 pairs of seeds.",
    ),
    (
        {1: SURE},
        "val/accuracy",
        "Validation accuracy: at r = 1 training at r is worse than cutting from 16 (lower by 0.310 "
        "[0.285 to 0.335], p < 0.001). 3 pairs of seeds.",
    ),
    (
        {1: SURE},
        "val/words",
        "Validation words: at r = 1 training at r is lower than cutting from 16 (lower by 0.310 "
        "[0.285 to 0.335], p < 0.001). 3 pairs of seeds.",
    ),
    (
        {1: [0.2, 0.28, 0.14], 2: [0.15, 0.1, 0.12], 8: [0.1, -0.1, 0.02]},
        LOSS,
        "Validation loss: at r = 2 training at r is worse than cutting from 16 (higher by 0.123 "
        "[0.061 to 0.186], p = 0.041); at r = 1 a difference between training at r and cutting "
        "from 16 is not sure (0.21 [0.03 to 0.38], p = 0.036 alone, with Holm's correction p = "
        "0.073); at r = 8 no difference between training at r and cutting from 16 is seen (0.01 "
        "[-0.24 to 0.26], p = 0.92). 3 pairs of seeds.",
    ),
    (
        {8: [0.1, -0.1, 0.03]},
        LOSS,
        "Validation loss: at r = 8 no difference between training at r and cutting from 16 is seen "
        "(0.01 [-0.24 to 0.26], p = 0.88). 3 pairs of seeds.",
    ),
    (
        {4: [0.1], 8: [0.2]},
        LOSS,
        "Validation loss: at r = 4 and 8 training at r less cutting from 16 is 0.1 and 0.2, "
        "without a test: it takes 3 pairs. 1 pair of seeds.",
    ),
    (
        {4: [0.1] * 3, 8: [1e-9] * 3},
        LOSS,
        "Validation loss: at r = 8 training at r and cutting from 16 are the same up to rounding; "
        "at r = 4 training at r less cutting from 16 is 0.1, without a test: all pairs differ by "
        "the same. 3 pairs of seeds.",
    ),
]


@pytest.mark.parametrize(("differences", "metric", "sentence"), CASES)
def test_one_sentence_says_what_the_data_say(
    differences: dict[int, list[float]], metric: str, sentence: str
):
    (said,) = sentences(comparisons(runs_with(differences, metric)))
    assert said == sentence
