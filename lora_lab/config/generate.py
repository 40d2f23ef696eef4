"""The schema of `generate`: what a trained model writes, and how it is compared with references."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from lora_lab.config.components import Node
from lora_lab.config.errors import one_of

ROUGES = ("rouge1", "rouge2", "rougeL")
"""The metrics that rouge-score computes, by its names."""

TEXT_METRICS = ("exact_match", "bleu", *ROUGES)
"""The metrics of generated texts."""


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return value


class Generate(Node):
    """Texts that the model generates from prompts of the validation set once it is trained.

    Nothing is drawn: the likeliest token or beam is taken.
    """

    rows: PositiveInt | None = None
    """the most prompts, drawn by data.seed; null: all. Rows with the same prompt are one prompt
    with several references, as E2E counts"""
    split: Literal["val", "test"] = "val"
    """test takes the prompts of data.test in the place of those of the validation"""
    every_n_steps: PositiveInt | None = None
    """texts are generated in training too: before the first step and after every so many"""
    step_rows: PositiveInt | None = None
    """from so many prompts of the validation; null: as rows"""
    max_new_tokens: PositiveInt = 128
    """which end a text at the latest"""
    num_beams: PositiveInt = 1
    """beams that are searched; 1: the likeliest token each time"""
    length_penalty: float = 1.0
    """a beam's log-probability is divided by its length to this power"""
    no_repeat_ngram_size: NonNegativeInt = 0
    """so many tokens in a row never come twice in a text; 0: they may"""
    batch_rows: PositiveInt = 16
    """prompts that are computed at once"""
    metrics: list[Annotated[str, one_of(TEXT_METRICS)]] = Field(
        default=["exact_match"], min_length=1
    )
    """exact_match | bleu | rouge1 | rouge2 | rougeL"""
    answer: Annotated[str, AfterValidator(_pattern)] | None = None
    """a regular expression whose match in a text is its answer (the first group that took part, or
    all of it): exact_match is the share of texts with the answer of a reference; null: the texts"""
    match: Literal["last", "first"] = "last"
    """of several matches of answer"""
    lowercase: bool = False
    """true: BLEU takes no account of case, as the script of E2E"""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        """Refuses settings that would do nothing beside the others."""
        needs = {
            "length_penalty": ("num_beams of 2 or more", self.num_beams > 1),
            "step_rows": ("every_n_steps", self.every_n_steps is not None),
            "answer": ("exact_match among metrics", "exact_match" in self.metrics),
            "match": ("answer", self.answer is not None),
            "lowercase": ("bleu among metrics", "bleu" in self.metrics),
        }
        for name, (needed, is_met) in needs.items():
            value = getattr(self, name)
            if not is_met and value != Generate.model_fields[name].default:
                raise ValueError(f"{name}={value} does nothing without {needed}")
        return self
