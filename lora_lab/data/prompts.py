"""Prompts of which a language model generates the rest, and the references for what it writes."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_lab.data import columns, encodings, parts
from lora_lab.data.language import Language
from lora_lab.data.sources import Source


@dataclass(frozen=True)
class Prompt:
    """A text to be continued, and one or more texts that would be right."""

    text: str
    references: tuple[str, ...]


def prompts(data: Language, split: Literal["val", "test"], limit: int | None) -> list[Prompt]:
    """The prompts of a split's rows; of more than `limit` those that data.seed draws.

    Of a chat all that comes before the assistant's last turn is the prompt, as the tokenizer's
    template writes it with what asks for that turn, and the turn is the reference. Rows of one
    prompt are one, with the references of all. Raises ValueError, with the argument, where the
    data has no prompts or no such split.
    """
    pairs = _pairs(data, *_rows(data, split))
    references: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        references.setdefault(prompt, []).append(reference)
    grouped = [Prompt(text, tuple(of_text)) for text, of_text in references.items()]
    chosen = parts.limited(torch.arange(len(grouped)), limit, data.seed)
    return [grouped[i] for i in chosen.tolist()]


def tokens_of(data: Language, chosen: list[Prompt]) -> list[list[int]]:
    """The tokens of each prompt, as the model reads it in training before the first learned token.

    An encoder's are cut to `max_length`, as in training. Others have their full length.
    """
    texts, tokenizer = [prompt.text for prompt in chosen], data.tokenizer
    if data.objective == "seq2seq":
        encoder = encodings.ENCODERS["encoder"]
        return encoder(tokenizer, texts, max_length=data.max_length, train_on="all")["input_ids"]
    if "messages" in data.columns:  # the template has written the special tokens
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encodings.prompt_tokens(tokenizer, texts)


def _rows(data: Language, split: Literal["val", "test"]) -> tuple[Source, list[int]]:
    """The source of a split, and the numbers of its rows."""
    if split == "val":
        source, numbers = data.chosen()[1]
        return source, numbers.tolist()
    if not data.has_test:
        raise ValueError("test=null: must be given, as generate.split=test takes its prompts")
    source, numbers = data.test_rows()
    return source, numbers.tolist()


def _pairs(data: Language, source: Source, numbers: list[int]) -> list[tuple[str, str]]:
    """The prompt and the reference of each row."""
    table, names = source.table(), data.columns
    if "messages" in names:
        chats = columns.chats(table, "messages", names["messages"])
        return [_of_chat(data.tokenizer, chats[i]) for i in numbers]
    if "prompt" not in names:
        raise ValueError(
            f"text={names['text']}: generate needs prompts and what is to follow them:"
            " data.prompt and data.completion, or data.messages"
        )
    starts, rests = (
        data.documents(source)["prompt"],
        columns.texts(table, "completion", names["completion"]),
    )
    return [(starts[i], rests[i]) for i in numbers]


def _of_chat(tokenizer: Any, chat: list[dict[str, Any]]) -> tuple[str, str]:
    last = max(i for i, turn in enumerate(chat) if turn["role"] == "assistant")
    prompt = encodings.written_chat(tokenizer, chat[:last], add_generation_prompt=True)
    return prompt, chat[last]["content"]
