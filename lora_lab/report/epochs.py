"""At which epoch the value of a metric is taken: the last one, or the metric's best."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

At = Literal["last", "best"]
"""The epoch that a metric's value is of, as `--at` of the commands names it."""

LOWER_IS_BETTER = ("loss", "perplexity", "error", "_per_step", "memory_bytes")
"""Endings of the names of metrics that are to be minimized."""
HIGHER_IS_BETTER = ("accuracy", "f1", "auroc", "r2", "matthews", "pearson", "spearman")
HIGHER_IS_BETTER += ("_per_second",)
HIGHER_IS_BETTER += ("exact_match", "bleu", "rouge1", "rouge2", "rougel")
"""Endings of the names of metrics that are to be maximized."""

OPTIMISTIC = "The best of several validations is optimistic: a test split tells what to expect."
"""What has to be known of the value of a validation that was chosen by its value."""


class BestValue(NamedTuple):
    """The best value that a metric had in a run, and its epoch."""

    value: float
    epoch: float


def goal_of(metric: str) -> str | None:
    """`minimize` or `maximize`, by the ending of a metric's name; None where it tells neither."""
    ending = metric.lower().rpartition("/")[2]
    if ending.endswith(LOWER_IS_BETTER):
        return "minimize"
    return "maximize" if ending.endswith(HIGHER_IS_BETTER) else None


def best_values(
    rows: Sequence[Mapping[str, Any]], goals: Mapping[str, str] | None = None
) -> dict[str, BestValue]:
    """The best value of each validation metric (`val/…`) of an adaptation, each at its own epoch.

    `rows` are those of metrics.jsonl. `goals` say minimize or maximize where it is not as `goal_of`
    tells; metrics without a goal are left out. The validation before the first step, at epoch 0,
    does not count, nor does NaN. Of equal values the first is the best.
    """
    best: dict[str, BestValue] = {}
    signs: dict[str, int] = {}
    for row in rows:
        for metric, value in row.items() if row.get("epoch") else ():
            if not metric.startswith("val/") or value != value:
                continue
            if metric not in signs:
                goal = (goals or {}).get(metric) or goal_of(metric)
                signs[metric] = {"minimize": 1, "maximize": -1}.get(goal or "", 0)
            sign = signs[metric]
            if sign and (metric not in best or sign * value < sign * best[metric].value):
                best[metric] = BestValue(value, row["epoch"])
    return best


def epoch_text(metric: str, at: At, selects: Sequence[str]) -> str:
    """Where in training a metric's values are taken, as `at its best epoch`.

    `selects` are the runs' settings `select`: where that is no `last`, the run's result, and so the
    last value of a validation metric, is of the epoch that was selected.
    """
    if not metric.startswith("val/"):
        return "at the end"
    if at == "best":
        return "at its best epoch"
    if not (selected := [select for select in selects if select != "last"]):
        return "at the last epoch"
    is_each = len(selected) == len(selects)
    return "at the selected epoch" if is_each else "at the last, or the selected, epoch"


def range_text(values: Sequence[float]) -> str:
    """Epochs in short: `3`, or `2–4` where they differ."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"
