"""Tokens of documents for language models: what is learned of them, blocks, masks, and pairs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lab.data.tokens import IGNORED, Encoded, TokenRows, model_inputs
from lora_lab.seeding import generator


def _with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens that end with the end of text, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _text(tokenizer: Any, texts: list[str], *, max_length: int | None, train_on: str) -> Encoded:
    rows = tokenizer(texts)["input_ids"]
    return {"input_ids": [_with_end(tokenizer, row)[:max_length] for row in rows]}


def _masked(tokenizer: Any, texts: list[str], *, max_length: int | None, train_on: str) -> Encoded:
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    return model_inputs(tokenizer(texts, **cut))


def _completion(
    tokenizer: Any,
    prompts: list[str],
    completions: list[str],
    *,
    max_length: int | None,
    train_on: str,
) -> Encoded:
    """A prompt, then its completion, tokenized apart as they are when a completion is generated."""
    encoded: Encoded = {"input_ids": [], "learned": []}
    rests = tokenizer(completions, add_special_tokens=False)["input_ids"]
    for start, rest in zip(prompt_tokens(tokenizer, prompts), rests, strict=True):
        rest = _with_end(tokenizer, rest)
        learned = [int(train_on == "all")] * len(start) + [1] * len(rest)
        encoded["input_ids"].append((start + rest)[:max_length])
        encoded["learned"].append(learned[:max_length])
    return encoded


def prompt_tokens(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """The tokens of prompts that a completion follows: without those that end a text."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    rows = tokenizer(prompts)["input_ids"]
    for row in rows:
        while row and row[-1] in ends:
            row.pop()
    return rows


def _chat(
    tokenizer: Any, chats: list[list[dict]], *, max_length: int | None, train_on: str
) -> Encoded:
    """Chats as the tokenizer's template writes them, of which the assistant's turns are learned."""
    encoded: Encoded = {"input_ids": [], "learned": []}
    for chat in chats:
        text = written_chat(tokenizer, chat)
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(0, len(text))] if train_on == "all" else _assistant_spans(tokenizer, chat, text)
        learned = [
            int(any(start <= first < end for start, end in spans))
            for first, _ in tokens["offset_mapping"]
        ]
        encoded["input_ids"].append(tokens["input_ids"][:max_length])
        encoded["learned"].append(learned[:max_length])
    return encoded


def written_chat(tokenizer: Any, chat: list[dict], **options: Any) -> str:
    """A chat as the tokenizer's template writes it. Raises ValueError where it refuses the chat."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError) as error:
        shown = str(chat)[:80]
        raise ValueError(f"messages: the chat template refuses {shown}…: {error}") from None


def _assistant_spans(tokenizer: Any, chat: list[dict], text: str) -> list[tuple[int, int]]:
    """From which to which character of a written chat the assistant speaks.

    A turn goes from the end of what the template writes to ask for it to the end of what it writes
    of the chat up to this turn.
    """
    spans = []
    for i, turn in enumerate(chat):
        if turn["role"] == "assistant":
            before = written_chat(tokenizer, chat[:i], add_generation_prompt=True)
            upto = written_chat(tokenizer, chat[: i + 1])
            if not (text.startswith(upto) and upto.startswith(before)):
                raise ValueError(
                    "train_on=completion: the tokenizer's chat template writes earlier turns in"
                    " another way once others follow; train_on=all learns all tokens"
                )
            spans.append((len(before), len(upto)))
    return spans


def _encoder(tokenizer: Any, texts: list[str], *, max_length: int | None, train_on: str) -> Encoded:
    return {"input_ids": _masked(tokenizer, texts, max_length=max_length, train_on="")["input_ids"]}


def _decoder(tokenizer: Any, texts: list[str], *, max_length: int | None, train_on: str) -> Encoded:
    rows = tokenizer(text_target=texts)["input_ids"]
    return {"input_ids": [_with_end(tokenizer, row)[:max_length] for row in rows]}


ENCODERS: dict[str, Callable[..., Encoded]] = {
    **{"text": _text, "masked": _masked, "prompt": _completion, "messages": _chat},
    **{"encoder": _encoder, "decoder": _decoder},
}
"""How the columns of a part of the documents become tokens, and which of these are learned."""


def vocabulary(tokenizer: Any, path: str) -> int:
    """How many outputs a model has: those of the config beside a tokenizer, or its tokens."""
    config = _config(path)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return max(len(tokenizer), getattr(text, "vocab_size", 0) or 0)


def decoder_ids(path: str) -> tuple[int, int]:
    """The token that a decoder starts with, and the one that pads, from the config at `path`."""
    config = _config(path)
    start, pad = (getattr(config, f"{n}_token_id", None) for n in ("decoder_start", "pad"))
    if start is None or pad is None:
        raise ValueError(
            f"objective=seq2seq: tokenizer={path} has no config.json of an encoder-decoder, which"
            " tells decoder_start_token_id and pad_token_id"
        )
    return start, pad


def _config(path: str) -> Any:
    """The model's config beside a tokenizer; None where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def gathered(flat: dict[str, Tensor], numbers: Tensor) -> dict[str, Tensor]:
    """The tokens of some rows only, one row behind the other."""
    offsets = flat["offsets"]
    lengths = offsets[numbers + 1] - offsets[numbers]
    ends = lengths.cumsum(0)
    # Rows of lengths 2 and 3 that start at 10 and 20: 10 11 20 21 22, which is 0 … 4 plus the
    # distance of each row's start from where it comes to lie, 10 10 18 18 18.
    moved = (offsets[numbers] - (ends - lengths)).repeat_interleave(lengths)
    place = moved + torch.arange(len(moved))
    rows = {name: tensor[place] for name, tensor in flat.items() if name != "offsets"}
    return {"offsets": torch.cat([ends.new_zeros(1), ends]), **rows}


def part(flat: dict[str, Tensor], split: str, share: float) -> dict[str, Tensor]:
    """The first `share` of the tokens for `train`, the rest for `val`, as one row each."""
    cut = round(len(flat["input_ids"]) * share)
    chosen = slice(0, cut) if split == "train" else slice(cut, None)
    rows = {name: tensor[chosen] for name, tensor in flat.items() if name != "offsets"}
    return {"offsets": torch.tensor([0, len(rows["input_ids"])]), **rows}


def blocks(flat: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """All tokens cut into rows of `block`; the last ones, that fill no row, are left out."""
    count = len(flat["input_ids"]) // block
    return {**flat, "offsets": torch.arange(count + 1) * block}


def next_tokens(flat: dict[str, Tensor]) -> Tensor:
    """The target of each token: the next one of its row, if it is learned."""
    ids = flat["input_ids"]
    learned = flat["learned"].bool() if "learned" in flat else torch.ones_like(ids).bool()
    targets = torch.full_like(ids, IGNORED)
    targets[:-1] = torch.where(learned[1:], ids[1:], IGNORED)
    ends = flat["offsets"][1:]
    targets[ends[ends > flat["offsets"][:-1]] - 1] = IGNORED
    return targets


def shifted_right(flat: dict[str, Tensor], start: int) -> Tensor:
    """What a decoder is given: `start`, then each row's tokens without the last."""
    shifted = flat["input_ids"].roll(1)
    shifted[flat["offsets"][:-1]] = start
    return shifted


class MaskedRows:
    """Rows of which some tokens are hidden, and are to be recovered (Devlin et al. 2019).

    The share `share` of the tokens is chosen, special ones never. Of these 80% become the mask, 10%
    any token, and 10% stay. What is drawn is a function of (*key, epoch, row); where the rows are
    not drawn anew it is the same in all epochs.
    """

    def __init__(
        self, rows: TokenRows, tokenizer: Any, share: float, key: tuple, is_drawn_anew: bool
    ):
        self.rows, self.share, self.key = rows, share, key
        self.mask, self.tokens = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(tokenizer.all_special_ids)
        if is_drawn_anew:
            self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs with hidden tokens, and targets (B, T), IGNORED where nothing is hidden."""
        inputs, _ = self.rows[index]
        ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1)
        draws = torch.ones(3, *ids.shape)  # chosen, what becomes of it, which token: in [0, 1)
        for i, row in enumerate(self.rows.rows[index].tolist()):
            rng = generator(*self.key, getattr(self, "epoch", "fixed"), row)
            draws[:, i, : lengths[i]] = torch.rand(3, int(lengths[i]), generator=rng)
        chosen = (draws[0] < self.share) & ~torch.isin(ids, self.special)
        drawn = (draws[2] * self.tokens).long().clamp(max=self.tokens - 1)
        hidden = torch.where(draws[1] < 0.8, self.mask, torch.where(draws[1] < 0.9, drawn, ids))
        inputs["input_ids"] = torch.where(chosen, hidden, ids)
        return inputs, torch.where(chosen, ids, IGNORED)


class PairRows:
    """Rows of an encoder and of a decoder, each padded to the longest of a batch."""

    def __init__(self, encoder: TokenRows, decoder: TokenRows):
        self.encoder, self.decoder = encoder, decoder

    def __len__(self) -> int:
        return len(self.encoder)

    def __getitem__(self, index: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs of both, and the targets (B, T) of the decoder."""
        inputs, _ = self.encoder[index]
        decoder, targets = self.decoder[index]
        return {**inputs, "decoder_input_ids": decoder["decoder_input_ids"]}, targets
