"""Checks that a run can generate texts, and that they can be compared, before it is made."""

from torch import nn

from lora_lab.config.schema import Config, ConfigError, Generate
from lora_lab.data import Data
from lora_lab.data.language import Language
from lora_lab.data.prompts import prompts
from lora_lab.training.fit_checks import position_count
from lora_lab.training.text_metrics import answer_of, missing_library

HEADS = ("language", "seq2seq")
"""The heads of model=pretrained that generate texts."""


def check_generate(cfg: Config, data: Data, model: nn.Module, processes: int) -> None:
    """Raises ConfigError where the texts of `generate` cannot be generated or compared.

    `model` may be on the meta device. `processes` train the run.
    """
    if (settings := cfg.generate) is None:
        return
    check_texts(settings, data, model)
    if settings.every_n_steps and processes > 1:
        raise ConfigError(
            f"generate.every_n_steps={settings.every_n_steps}: not with {processes} processes, of "
            "which all but one would wait; without it one generates at the end, and `lora-lab "
            "evaluate` does it at any later time"
        )


def check_head(data: Data, model: nn.Module) -> None:
    """Raises ConfigError where the model, or what the data teaches it, writes no texts."""
    if not isinstance(data, Language) or data.heads[0] not in HEADS:
        raise ConfigError(
            "generate: needs model.head=language or seq2seq and data=language with data.prompt and "
            "data.completion, or data.messages"
        )
    if not callable(getattr(model, "generate", None)):
        raise ConfigError(f"generate: {type(model).__name__} has no `generate` of transformers")


def check_texts(settings: Generate, data: Data, model: nn.Module) -> None:
    """Raises ConfigError where this model cannot generate texts, or this data has no prompts."""
    check_head(data, model)
    assert isinstance(data, Language)
    if missing := missing_library(settings):
        raise ConfigError(f"generate.metrics: {missing}")
    positions = position_count(model)
    if positions is not None and (new := settings.max_new_tokens) >= positions:
        raise ConfigError(
            f"generate.max_new_tokens={new}: the model has {positions} positions, for prompts too; "
            f"at most generate.max_new_tokens={positions - 1}"
        )
    try:
        chosen = prompts(data, settings.split, settings.rows)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None
    references = [reference for prompt in chosen for reference in prompt.references]
    if all(answer_of(reference, settings) is None for reference in references):
        raise ConfigError(
            f"generate.answer={settings.answer}: matches none of the {len(references)} references, "
            f"as {references[0][-60:]!r}"
        )
