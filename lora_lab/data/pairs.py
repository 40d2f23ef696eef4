"""Pairs of texts that say the same, which embeddings of sentences are to bring together."""

from functools import lru_cache, partial
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from lora_lab.adapters.model_call import Inputs
from lora_lab.data import columns, tokens
from lora_lab.data.module import Phase, Rows
from lora_lab.data.sources import Source
from lora_lab.data.tables import TableData


class Pairs(TableData):
    """Pairs of texts, read as `TableData` says, as sentence-transformers trains its models on.

    They measure what such a model forgets (`forget=pairs`): a text's embedding is the mean of
    its tokens' last hidden states, and is to be nearer to that of its partner than to those of the
    other partners in a batch of `eval_batch_size` pairs. The last pairs that fill no batch are left
    out, since fewer are told apart more easily. `first` and `second` name the columns. Texts of
    more than `max_length` tokens are cut.
    """

    task = "pairs"
    usual_length = 512
    """What max_length=null means in a run's config, if the model has as many positions."""

    def __init__(
        self,
        phase: Phase,
        first: str,
        second: str,
        tokenizer: str | None,
        max_length: PositiveInt | None = None,
        **table: Any,
    ):
        super().__init__(phase, **table)
        self.columns, self.max_length = (first, second), max_length
        self.tokenizer = tokens.load_tokenizer(tokenizer)
        for source in self.sources.values():
            _texts(source, self.columns)
        self.check_chosen()

    @property
    def heads(self) -> tuple[str, ...]:
        """No head of a model: what lies below it."""
        return ("sentence",)

    @property
    def sizes(self) -> dict[str, int]:
        """One output: the dimensions of an embedding are the model's own."""
        return {"out_features": 1}

    @property
    def least_length(self) -> int:
        """The least `max_length` with which a row has a token of its text."""
        return 1 + self.tokenizer.num_special_tokens_to_add()

    @staticmethod
    def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
        """The embeddings (B, d) of texts, by the layers below the model's head."""
        assert isinstance(inputs, dict)
        below: Any = model.base_model
        hidden = below(**inputs)[0]  # (B, T, d)
        is_token = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # (B, T, 1)
        return (hidden * is_token).sum(1) / is_token.sum(1)

    def rows(self, source: Source, numbers: Tensor, split: str) -> Rows:
        """The pairs of some rows, in whole batches."""
        texts = [text for column in _texts(source, self.columns) for text in column]
        settings = {"how": "pairs", "max_length": self.max_length}
        encode = partial(_encode, self.tokenizer, max_length=self.max_length)
        flat = tokens.tokenize(source.path, [texts], self.tokenizer, settings, encode)
        whole = len(numbers) // self.eval_rows * self.eval_rows or len(numbers)
        return PairRows(flat, tokens.padding(self.tokenizer, flat), numbers[:whole])

    def _process(self) -> tuple[int, int]:
        """Each process computes all pairs: parts of a batch would have fewer to tell apart."""
        return 0, 1


class PairRows:
    """Pairs of texts of which `flat` has the N first ones, and behind them the N second ones."""

    def __init__(self, flat: dict[str, Tensor], padding: dict[str, int], numbers: Tensor):
        texts = len(flat["offsets"]) - 1
        self.numbers, self.count = numbers, texts // 2
        self.tokens = tokens.TokenRows(flat, padding, torch.zeros(texts))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        """The B first texts and behind them their partners (2 B, T); each one's place among these.

        Of three pairs: targets 0 1 2 IGNORED IGNORED IGNORED.
        """
        numbers = self.numbers[index]
        inputs, _ = self.tokens[torch.cat([numbers, numbers + self.count])]
        ignored = torch.full_like(numbers, tokens.IGNORED)
        return inputs, torch.cat([torch.arange(len(numbers)), ignored])


@lru_cache(maxsize=4)
def _texts(source: Source, names: tuple[str, str]) -> list[list[str]]:
    """The texts of both columns of a source, checked."""
    table = source.table()
    return [
        columns.texts(table, argument, name)
        for argument, name in zip(("first", "second"), names, strict=True)
    ]


def _encode(tokenizer: Any, texts: list[str], *, max_length: int | None) -> tokens.Encoded:
    """The tokens of texts, with the special tokens that the tokenizer adds."""
    cut = {"truncation": max_length is not None, "max_length": max_length}
    return tokens.model_inputs(tokenizer(texts, return_attention_mask=False, **cut))
