"""The table of training at r against cutting to r, and what it says in words."""

from collections.abc import Sequence

from lora_lab.report.cell_statistics import Statistics, statistics_of
from lora_lab.report.cells import RunResult
from lora_lab.report.cut_against_trained import Comparison
from lora_lab.report.epochs import goal_of
from lora_lab.report.paired_test import MIN_PAIRS
from lora_lab.report.plotting import metric_label
from lora_lab.report.rank_series import differing_seeds
from lora_lab.report.tables import Rows, format_mean_std

LEVEL = 0.05
"""A difference is told where p, corrected, is below it."""
MAX_SENTENCES = 12
"""The most sentences that a note has."""
VERDICTS = ("lower", "higher", "unsure", "unseen", "same", "untested")
"""What a comparison says of trained − cut, in the order of a sentence."""


def comparison_table(compared: Sequence[Comparison]) -> Rows:
    """A row for each metric, series and r, with columns for each way: cut, and cut and healed.

    Each way has its value, trained − it with the 95% interval, p after Holm's correction, and n,
    the number of pairs; all are of these pairs. A series has a column where there are several.
    """
    ways, several = _ways(compared), len({one.series for one in compared}) > 1
    head = ["metric", *(["series"] if several else []), "r", "trained at r"]
    for way in ways.values():
        head += [way, "difference [95% interval]", "p", "n"]
    rows = [head]
    for (metric, series, r), by_heal in _by_row(compared).items():
        trained = statistics_of(next(iter(by_heal.values())).trained)
        rows.append([metric, *([series] if several else []), str(r), _text(trained)])
        for heal in ways:
            one = by_heal.get(heal)
            rows[-1] += _way_cells(one) if one else ["–", "–", "–", "0"]
    return rows


def _way_cells(one: Comparison) -> list[str]:
    """What the table has of one way at one rank."""
    n = str(one.test.n) if one.test.n == one.pairs else f"{one.test.n} of {one.pairs}"
    p = "–" if one.p is None else f"{one.p:.2g}"
    return [_text(statistics_of(one.cut)), _difference(one), p, n]


def comparison_table_in_full(compared: Sequence[Comparison]) -> Rows:
    """The same for programs: a row for each test, all digits, one number in each cell."""
    statistics = ("trained at r", "trained at r std", "cut from the largest r", "cut std")
    tests = ("difference", "95% from", "95% to", "p", "p Holm", "n", "pairs")
    rows = [["metric", "series", "r", "largest r", "steps after the cut", *statistics, *tests]]
    for one in compared:
        row = [one.metric, one.series, str(one.r), str(one.largest), str(one.heal)]
        for s in (statistics_of(one.trained), statistics_of(one.cut)):
            row += [_in_full(s.mean if s else None), _in_full(s.std if s else None)]
        low, high = one.test.interval or (None, None)
        numbers = (one.test.difference, low, high, one.test.p, one.p)
        rows.append([*row, *map(_in_full, numbers), str(one.test.n), str(one.pairs)])
    return rows


def _in_full(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _text(s: Statistics | None) -> str:
    return str(s) if s else "–"


def _by_row(compared: Sequence[Comparison]) -> dict[tuple[str, str, int], dict[int, Comparison]]:
    """(metric, series, r) → steps of healing → comparison."""
    rows: dict[tuple[str, str, int], dict[int, Comparison]] = {}
    for one in compared:
        rows.setdefault((one.metric, one.series, one.r), {})[one.heal] = one
    return rows


def _ways(compared: Sequence[Comparison]) -> dict[int, str]:
    """Steps of healing → the way's column title: `cut from 16`, and whether it was trained on."""
    ways = {}
    for heal in sorted({one.heal for one in compared}):
        largest = {one.largest for one in compared if one.heal == heal}
        source = str(largest.pop()) if len(largest) == 1 else "the largest r"
        ways[heal] = f"cut from {source}" + (f", trained {heal} steps more" if heal else "")
    return ways


def _difference(one: Comparison, sign: int = 1) -> str:
    """trained − cut with its 95% interval, as `-0.30 [-0.39 to -0.21]`; `sign` −1: the reverse."""
    return interval_text(sign * one.test.difference, one.test.interval, sign)


def interval_text(value: float, interval: tuple[float, float] | None, sign: int = 1) -> str:
    """A number and its interval, to two digits of half the interval's width; sign −1: mirrored."""
    if interval is None:
        return f"{value:.2g}"
    low, high = sorted(sign * bound for bound in interval)
    value, low, high = (_rounded(number, (high - low) / 2) for number in (value, low, high))
    return f"{value} [{low} to {high}]"


def _rounded(value: float, width: float) -> str:
    """A number to the place of the second digit of `width`."""
    return format_mean_std(value, width).partition(" ± ")[0]


def comparison_note(finished: Sequence[RunResult], compared: Sequence[Comparison]) -> str:
    """The note below the table: what the data say, a sentence a line, and how it was tested."""
    kinds = differing_seeds(finished) or "seeds"
    method = (
        f"Paired t-test, two-sided, over {kinds}: each pair is one seed trained at r, and at the "
        "largest r and cut to r, at the end of the training. n: pairs; difference: trained less "
        "cut; p: with Holm's correction over the ranks. Not seen is not equal: the interval, of "
        "95% for each r alone, says how large a difference may be."
    )
    if "data seeds" not in kinds:
        method += " All pairs have one data set: nothing is said of others."
    return "\n".join([*sentences(compared), method])


def sentences(compared: Sequence[Comparison]) -> list[str]:
    """One sentence for each metric, series and way: what the data say, and how sure that is."""
    groups: dict[tuple[str, str, int], list[Comparison]] = {}
    for one in compared:
        groups.setdefault((one.metric, one.series, one.heal), []).append(one)
    all_sentences = [_sentence(group) for group in groups.values()]
    if (more := len(all_sentences) - MAX_SENTENCES) > 0:
        return [*all_sentences[:MAX_SENTENCES], f"{more} more comparisons are in the table alone."]
    return all_sentences


def _sentence(group: Sequence[Comparison]) -> str:
    """What the comparisons of one metric, series and way say at all ranks, by verdict."""
    metric, series = group[0].metric, group[0].series
    by_verdict: dict[str, list[Comparison]] = {}
    for one in group:
        by_verdict.setdefault(_verdict(one), []).append(one)
    clauses = [_clause(v, by_verdict[v]) for v in VERDICTS if v in by_verdict]
    counts = sorted({one.test.n for one in group})
    pairs = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    pairs += " pair of seeds" if counts == [1] else " pairs of seeds"
    subject = metric_label(metric) + (f", {series}" if series else "")
    return f"{subject[0].upper()}{subject[1:]}: {'; '.join(clauses)}. {pairs}."


def _verdict(one: Comparison) -> str:
    """What the test says of the value trained at r: one of VERDICTS."""
    if one.test.is_rounding:
        return "same"
    if one.p is None or one.test.p is None:
        return "untested"
    if one.p < LEVEL:
        return "lower" if one.test.difference < 0 else "higher"
    return "unsure" if one.test.p < LEVEL else "unseen"


def _clause(verdict: str, group: Sequence[Comparison]) -> str:
    """A part of a sentence: the ranks with one verdict, the differences and their p."""
    at = f"at r = {listed([str(one.r) for one in group])}"
    heal = group[0].heal
    way = f"cutting from {group[0].largest}" + (f" and training {heal} steps more" if heal else "")
    goal = goal_of(group[0].metric)
    sign = -1 if verdict == "lower" else 1
    sizes = listed([_difference(one, sign) for one in group])
    p_values = [one.p for one in group if one.p is not None]
    match verdict:
        case "same":
            return f"{at} training at r and {way} are the same up to rounding"
        case "untested":
            why = f"it takes {MIN_PAIRS} pairs"
            if all(one.test.n >= MIN_PAIRS for one in group):
                why = "all pairs differ by the same"
            return f"{at} training at r less {way} is {sizes}, without a test: {why}"
        case "unseen":
            text = f"no difference between training at r and {way} is seen"
            return f"{at} {text} ({sizes}, {_p_text(min(p_values), len(group), '≥')})"
        case "unsure":
            alone = listed([f"{one.test.p:.2g}" for one in group])
            text = f"a difference between training at r and {way} is not sure"
            corrected = f"with Holm's correction {_p_text(min(p_values), len(group), '≥')}"
            return f"{at} {text} ({sizes}, p = {alone} alone, {corrected})"
    kind = {None: verdict, "minimize": {"lower": "better", "higher": "worse"}[verdict]}
    kind["maximize"] = {"lower": "worse", "higher": "better"}[verdict]
    text = f"training at r is {kind[goal]} than {way}"
    return f"{at} {text} ({verdict} by {sizes}, {_p_text(max(p_values), len(group), '≤')})"


def _p_text(p: float, count: int, bound: str) -> str:
    """`p = 0.004`, or of several ranks their bound, `p ≤ 0.004`."""
    if p < 0.001:
        return "p < 0.001"
    return f"p {bound if count > 1 else '='} {p:.2g}"


def listed(texts: Sequence[str]) -> str:
    """Texts in a row: `1, 2 and 4`."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
