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

    A prompt of several rows is one prompt with several references (as E2E counts). `rows` are the
    most prompts, drawn by data.seed; None: all. `split`: `test` takes the prompts of data.test in
    the place of those of the validation. With `every_n_steps` texts are generated during training
    too, before the first step and after every so many, from `step_rows` (None: `rows`) prompts of
    the validation set.

    `max_new_tokens` end a text at the latest. With `num_beams` above 1 so many beams are searched,
    and their log-probabilities divided by length^`length_penalty`. No `no_repeat_ngram_size` tokens
    in a row come twice in a text (0: they may). Nothing is drawn: the likeliest token or beam is
    taken. `batch_rows` prompts are computed at once.

    `answer` is a regular expression. Its last match in a text (`match`: or the first) is the text's
    answer: its first group that took part, or all of it. exact_match is the share of texts whose
    answer is that of a reference. Without `answer` it compares the texts. `lowercase` is BLEU's: it
    takes no account of case, as the script of E2E.
    """

    rows: PositiveInt | None = None
    split: Literal["val", "test"] = "val"
    every_n_steps: PositiveInt | None = None
    step_rows: PositiveInt | None = None
    max_new_tokens: PositiveInt = 128
    num_beams: PositiveInt = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: NonNegativeInt = 0
    batch_rows: PositiveInt = 16
    metrics: list[Annotated[str, one_of(TEXT_METRICS)]] = Field(
        default=["exact_match"], min_length=1
    )
    answer: Annotated[str, AfterValidator(_pattern)] | None = None
    match: Literal["last", "first"] = "last"
    lowercase: bool = False

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
