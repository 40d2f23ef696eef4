"""Texts that a model generates from prompts of its data, and their metrics."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lora_lab.config.generate import Generate
from lora_lab.data.language import Language
from lora_lab.data.prompts import Prompt, tokens_of
from lora_lab.data.tokens import pad_id
from lora_lab.models.transformers_config import quiet
from lora_lab.training.fit_checks import position_count
from lora_lab.training.text_metrics import answer_of, is_correct, text_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """One generated text: a line of generated.jsonl.

    `answer` is what exact_match compares (None: there is none); `correct` whether it is right.
    """

    prompt: str
    references: list[str]
    text: str
    answer: str | None
    correct: bool


def as_lines(texts: Sequence[Text]) -> bytes:
    """The texts as JSON, one a line."""
    lines = [json.dumps(asdict(text), ensure_ascii=False) + "\n" for text in texts]
    return "".join(lines).encode()


def generate(
    trainer: pl.Trainer,
    model: nn.Module,
    data: Language,
    chosen: Sequence[Prompt],
    settings: Generate,
) -> tuple[list[Text], dict[str, float]]:
    """The texts that a model generates from prompts of its data, and their metrics by name."""
    began, rows = time.monotonic(), tokens_of(data, list(chosen))
    model.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context(), _evaluation(model), quiet():
        generated = _in_batches(model, data, rows, settings)
    # A sentence-piece model's text begins with the space between it and its prompt.
    texts = data.tokenizer.batch_decode(generated, skip_special_tokens=True)
    lines = [
        Text(
            *(prompt.text, list(prompt.references), text, answer_of(text, settings)),
            is_correct(text, prompt.references, settings),
        )
        for prompt, text in zip(chosen, texts, strict=True)
    ]
    metrics = text_metrics(texts, [prompt.references for prompt in chosen], settings)
    log.info("generated %d texts in %.1f s", len(texts), time.monotonic() - began)
    return lines, metrics


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """A context in which the model has no dropout. After it each layer is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _in_batches(
    model: Any, data: Language, rows: list[list[int]], settings: Generate
) -> list[list[int]]:
    """The tokens that follow each row, in the order of the rows.

    Rows of like lengths are computed together, the longest first: they need the most memory.
    """
    arguments = _generate_arguments(model, data, settings)
    is_decoder = data.objective == "causal"
    if is_decoder:
        rows = _cut_to_positions(model, rows, settings.max_new_tokens)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    generated: list[list[int]] = [[] for _ in rows]
    for start in range(0, len(order), settings.batch_rows):
        batch = order[start : start + settings.batch_rows]
        inputs = _padded([rows[i] for i in batch], arguments["pad_token_id"], is_decoder)
        width = inputs["input_ids"].shape[1] if is_decoder else 0
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        ids = model.generate(**inputs, **arguments)  # (B, width + new)
        for i, row in zip(batch, ids[:, width:].tolist(), strict=True):
            generated[i] = row
    return generated


def _generate_arguments(model: Any, data: Language, settings: Generate) -> dict[str, Any]:
    """Arguments of transformers' `generate`: greedy or beam search, keys and values are cached.

    A text ends with the tokenizer's end of text, which training put behind each, or with a token
    that the model's generation_config.json names. What that file says besides holds as well, but
    for sampling.
    """
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if (end := data.tokenizer.eos_token_id) is not None and end not in ends:
        ends.append(end)
    names = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")
    return {
        **{name: getattr(settings, name) for name in names},
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": ends or None,
        "pad_token_id": pad_id(data.tokenizer),
    }


def _cut_to_positions(model: nn.Module, rows: list[list[int]], new: int) -> list[list[int]]:
    """The last tokens of each row, as many as leave the model positions for `new` more."""
    if (positions := position_count(model)) is None:
        return rows
    longest = positions - new
    if cut := sum(len(row) > longest for row in rows):
        log.warning(
            "%d of %d prompts begin later: the model has %d positions, of which"
            " generate.max_new_tokens=%d leaves a prompt %d",
            *(cut, len(rows), positions, new, longest),
        )
    return [row[-longest:] for row in rows]


def _padded(rows: list[list[int]], pad: int, is_decoder: bool) -> dict[str, Tensor]:
    """Rows of tokens as one batch (B, T), and which of them are tokens.

    A decoder's are filled on the left, so that each text follows its prompt: rows [7] and [8, 9]
    are [pad, 7] and [8, 9]. An encoder's are filled on the right, as in training.
    """
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if is_decoder else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}
