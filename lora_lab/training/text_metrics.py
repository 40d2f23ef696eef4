"""Generated texts compared with references: exact match of an answer, BLEU, ROUGE."""

import re
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import zip_longest
from statistics import fmean
from typing import Any

from lora_lab.config.generate import ROUGES, Generate

LIBRARIES = {"bleu": "sacrebleu", **dict.fromkeys(ROUGES, "rouge_score")}
"""Metric → the library that computes it."""

NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?\.?")
"""A decimal number, with or without commas between thousands; a full stop may follow it."""

References = Sequence[Sequence[str]]
"""The texts that would be right, for each generated text."""


def missing_library(settings: Generate) -> str:
    """Which metric needs a library that is not installed, and how it is; "" where none does."""
    for metric in settings.metrics:
        library = LIBRARIES.get(metric)
        if library and find_spec(library) is None:
            name = library.replace("_", "-")
            return f"{metric} needs {name}, pip install 'lora_lab[generate]'"
    return ""


def answer_of(text: str, settings: Generate) -> str | None:
    """The answer in a text: what `answer` matches, or all of it. None where nothing matches.

    With (?:####|answer is:) *([-0-9.,]+) "The answer is: 1,000." has the answer "1,000.".
    """
    if settings.answer is None:
        return text
    matches = list(re.finditer(settings.answer, text))
    if not matches:
        return None
    match = matches[-1 if settings.match == "last" else 0]
    return next((group for group in match.groups() if group is not None), match[0])


def comparable(answer: str) -> Fraction | str:
    """What two equal answers have in common: a number's value, or else the words.

    "1,000", "1000.00" and "1000." are the number 1000. Of other texts the white space does not
    count: " a  b\n" is "a b". Case does.
    """
    text = " ".join(answer.split())
    if NUMBER.fullmatch(text):
        return Fraction(text.rstrip(".").replace(",", ""))
    return text


def is_correct(text: str, references: Sequence[str], settings: Generate) -> bool:
    """Whether a text has an answer, and it is that of one of the references."""
    answer = answer_of(text, settings)
    wanted = (answer_of(reference, settings) for reference in references)
    return answer is not None and comparable(answer) in {
        comparable(one) for one in wanted if one is not None
    }


def text_metrics(
    texts: Sequence[str], references: References, settings: Generate
) -> dict[str, float]:
    """The metrics of `settings` by name.

    exact_match and ROUGE are means over texts, from 0 to 1: ROUGE the F of the reference nearest to
    the text, words as they are (no stemmer). BLEU is that of all texts together, from 0 to 100
    (sacrebleu's, with its tokens "13a").
    """
    values: dict[str, float] = {}
    for metric in settings.metrics:
        if metric == "exact_match":
            pairs = zip(texts, references, strict=True)
            values[metric] = fmean(is_correct(*pair, settings) for pair in pairs)
        elif metric == "bleu":
            values[metric] = _bleu(texts, references, settings.lowercase)
    return {**values, **_rouge(texts, references, [m for m in settings.metrics if m in ROUGES])}


def _bleu(texts: Sequence[str], references: References, lowercase: bool) -> float:
    from sacrebleu.metrics.bleu import BLEU

    # sacrebleu takes the first references of all texts, then the second ones, and so on; None
    # where a text has fewer: [[a, b], [c]] becomes [[a, c], [b, None]].
    streams: Any = [list(stream) for stream in zip_longest(*references)]
    return BLEU(lowercase=lowercase).corpus_score(texts, streams).score


def _rouge(
    texts: Sequence[str], references: References, metrics: Sequence[str]
) -> dict[str, float]:
    if not metrics:
        return {}
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(metrics)
    pairs = zip(texts, references, strict=True)
    scores = [scorer.score_multi(of_text, text) for text, of_text in pairs]
    return {metric: fmean(score[metric].fmeasure for score in scores) for metric in metrics}
