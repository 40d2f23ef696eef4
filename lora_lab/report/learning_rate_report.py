"""The table of the best learning rate by rank, and what it says in words."""

import math
from collections.abc import Sequence

from lora_lab.report.best_learning_rate import ONE_SEED, BestRate, RateCurve
from lora_lab.report.cell_statistics import statistics_of
from lora_lab.report.cut_report import MAX_SENTENCES, interval_text, listed
from lora_lab.report.plotting import metric_label
from lora_lab.report.rate_by_rank import FULL, MIN_RANKS, RateSweep, Trend, trend_of
from lora_lab.report.tables import Rows

METHOD = (
    "Best lr: the least point of a parabola in log lr, by least squares over all seeds' values at "
    "the best rate that was tried and its neighbours (half a decade to each side, at least the "
    "next rate), with a level for each seed. Its 95% interval is Fieller's: the rates at which the "
    "parabola's slope does not differ from 0. It knows the noise of these seeds alone; that a "
    "parabola fits shows only where more than three rates are that near. The slope over log r is "
    "of the least-squares line through the best rates, its 95% interval by their scatter about "
    "it. LoRA Without Regret claims no dependence on r for the scale alpha/r."
)
"""How the numbers of the table and its sentences are computed."""


def rate_table(sweeps: Sequence[RateSweep]) -> Rows:
    """A row for each metric, series and r: the best rate tried, and the parabola's best.

    A series has a column where there are several.
    """
    several = len({sweep.series for sweep in sweeps}) > 1
    head = ["metric", *(["series"] if several else []), "r", "best lr [95% interval]"]
    rows = [[*head, "best lr tried", "value there", "rates", "runs", "diverged"]]
    for sweep in sweeps:
        for r, best in sweep.best.items():
            curve = sweep.curves[r]
            row = [sweep.metric, *([sweep.series] if several else []), rank_text(r)]
            value = str(statistics_of([*curve.values[best.tried].values()]))
            rows.append([*row, best_text(best), f"{best.tried:g}", value, *_counts(curve)])
    return rows


def rate_table_in_full(sweeps: Sequence[RateSweep]) -> Rows:
    """The same for programs: all digits, one number in each cell."""
    rows = [["metric", "series", "r", "best lr", "95% from", "95% to", "remark", "best lr tried"]]
    rows[0] += ["value there", "value there std", "rates", "runs", "diverged"]
    for sweep in sweeps:
        for r, best in sweep.best.items():
            curve = sweep.curves[r]
            s = statistics_of([*curve.values[best.tried].values()])
            low, high = best.interval or (None, None)
            row = [sweep.metric, sweep.series, rank_text(r), *map(_in_full, (best.lr, low, high))]
            row += [best.remark, repr(best.tried), *map(_in_full, (s.mean, s.std) if s else ())]
            rows.append([*row, *_counts(curve)])
    return rows


def _counts(curve: RateCurve) -> list[str]:
    """The numbers of a curve's rates, runs and diverged runs."""
    return [str(n) for n in (len(curve.rates), curve.runs, sum(curve.diverged.values()))]


def _in_full(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def rank_text(r: int) -> str:
    """r as text; `full` for full fine-tuning."""
    return "full" if r == FULL else str(r)


def best_text(best: BestRate) -> str:
    """The best rate with its interval, or why it is not known."""
    if best.lr is None:
        return best.remark
    if best.interval is None:
        return f"{best.lr:.2g} [{best.remark}]"
    return f"{best.lr:.2g} [{best.interval[0]:.2g} to {best.interval[1]:.2g}]"


def rate_note(sweeps: Sequence[RateSweep]) -> str:
    """The note below the table: what each series says, a paragraph a line, and how."""
    texts = [text for sweep in sweeps if (text := sentences(sweep))]
    if (more := len(texts) - MAX_SENTENCES) > 0:
        texts[MAX_SENTENCES:] = [f"{more} more series are in the table alone."]
    return "\n".join([*texts, METHOD])


def sentences(sweep: RateSweep) -> str:
    """What a series says of the best rate and r, how sure that is, and what would tell more."""
    best = {r: rate for r, rate in sweep.best.items() if r != FULL}
    texts = []
    if len(best) > 1:
        tried = {r: rate for r, rate in best.items() if rate.lr is None and rate.point}
        at_edge = {r: rate for r, rate in best.items() if rate.point is None}
        texts = [_trend_text(trend_of(sweep), best)]
        texts += _remarks("With the best rate tried", tried) + _remarks("Left out", at_edge)
    if any(rate.remark == ONE_SEED for rate in best.values()):
        cause = "Each rate has one seed: intervals need several at the same rates (seed=0,1,2)."
        drawn = "The rates were drawn, one run each: intervals need the same rates for each r with "
        drawn += "several seeds (optimizer.lr=0.001,0.003,0.01 seed=0,1,2)."
        texts.append(drawn if _are_drawn(sweep) else cause)
    texts += [_full_text(sweep)] if FULL in sweep.best else []
    subject = metric_label(sweep.metric) + (f", {sweep.series}" if sweep.series else "")
    return f"{subject[0].upper()}{subject[1:]}: {' '.join(texts)}" if texts else ""


def _remarks(title: str, rates: dict[int, BestRate]) -> list[str]:
    """One text that tells the ranks without a parabola's best rate, and why; [] without any."""
    remarks = [f"r = {r} ({rate.remark})" for r, rate in rates.items()]
    return [f"{title}: {listed(remarks)}."] if remarks else []


def _trend_text(trend: Trend | None, best: dict[int, BestRate]) -> str:
    """Whether the best rate depends on r, with the slope and what it means from first to last r."""
    if trend is None:
        known = sum(rate.point is not None for rate in best.values())
        where = "one rank" if known else "no rank"
        return f"nothing is said of how the best lr depends on r: it is known at {where}."
    slope = interval_text(trend.slope, trend.interval)
    over = f"over r = {listed([str(r) for r in trend.ranks])}"
    first, last = trend.ranks[0], trend.ranks[-1]
    if trend.interval is None:
        text = "the slope of log lr over log r is"
        return f"{text} {slope} {over}; how sure is not known, it takes {MIN_RANKS} ranks."
    low, high = trend.interval
    factor, least, most = (math.exp(s * math.log(last / first)) for s in (trend.slope, low, high))
    change = f"a factor of {factor:.2g} [{least:.2g} to {most:.2g}] from r = {first} to {last}"
    size = f"the slope of log lr over log r is {slope} {over}, {change}"
    if low <= 0 <= high:
        return f"that the best lr depends on r is not seen: {size}."
    text = f"the best lr {'falls' if trend.slope < 0 else 'rises'} as r grows: {size}"
    return f"{text}. That it does not depend on r does not hold here."


def _are_drawn(sweep: RateSweep) -> bool:
    """Whether each run has a rate of its own, as random search gives."""
    curves = [curve for r, curve in sweep.curves.items() if r != FULL]
    rates = [lr for curve in curves for lr in curve.rates]
    return len(curves) > 1 and len({*rates}) == sum(curve.runs for curve in curves)


def _full_text(sweep: RateSweep) -> str:
    """Full fine-tuning's best rate, and how many times that LoRA's is."""
    full = sweep.best[FULL]
    text = f"Full fine-tuning's best lr: {best_text(full)}"
    lora = [b.point for r, b in sweep.best.items() if r != FULL and b.point]
    if full.lr is None or not lora:
        return f"{text}."
    times = math.exp(sum(map(math.log, lora)) / len(lora)) / full.lr
    return f"{text}; LoRA's, in the geometric mean over r, is {times:.2g} times that."
