"""Texts, or pairs of texts, with a class or a number each."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor

from lora_lab.data import columns, parts, tokens
from lora_lab.data.module import Phase
from lora_lab.data.sources import Source
from lora_lab.data.tables import TableData


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and as what: a key of caches, as a Source is."""

    text: tuple[str, ...]
    label: str
    task: Literal["classification", "regression"]
    classes: tuple[str | int, ...] | None


class Text(TableData):
    """Classification or regression of texts, read as `TableData` says and tokenized once.

    `text` names the column of the texts, or two columns, whose texts the tokenizer joins to a pair
    (premise and hypothesis). `label` names that of the classes (texts, or integers) or, with
    task=regression, of the numbers. `classes` are the classes' names in their order; None: those of
    a hub set, or the sorted labels of `train`. Texts of more than `max_length` tokens are cut.
    Rows are padded to the longest of their batch, in a multiple of `pad_to_multiple`. With
    `mask_padding=False` the tokens that fill a row are read as its text: no attention mask hides
    them, and a model that classifies by the last token takes that of the padded row. `balance`
    draws the rows of each class of `train` down to the number of the rarest; it needs `shares`.
    """

    usual_length = 512
    """What max_length=null means in a run's config, if the model has as many positions."""

    def __init__(
        self,
        phase: Phase,
        text: str | list[str],
        label: str,
        tokenizer: str | None,
        task: Literal["classification", "regression"] = "classification",
        max_length: PositiveInt | None = None,
        pad_to_multiple: PositiveInt = 1,
        classes: list[str | int] | None = None,
        mask_padding: bool = True,
        balance: bool = False,
        **table: Any,
    ):
        super().__init__(phase, **table)
        self.task, self.max_length, self.pad_to_multiple = task, max_length, pad_to_multiple
        self.mask_padding, self.balance = mask_padding, balance
        if balance and (task == "regression" or not self.shares):
            lacking = "data.task=classification" if task == "regression" else "data.shares"
            raise ValueError(f"balance=true: needs {lacking}")
        text = [text] if isinstance(text, str) else text
        if not 1 <= len(text) <= 2:
            raise ValueError(f"text={text}: must be one column, or two for pairs")
        self.tokenizer = tokens.load_tokenizer(tokenizer)
        listed = None if classes is None else tuple(classes)
        self.columns = Columns(tuple(text), label, task, listed)
        self.class_names: tuple[str, ...] | None = None
        """The classes in the order of the model's outputs; None in regression."""
        if task == "classification":
            self.class_names = _class_names(self.sources["train"], self.columns)
        for source in self.sources.values():
            _examples(source, self.columns, self.class_names)
        self.check_chosen()

    @property
    def heads(self) -> tuple[str, ...]:
        """The head with outputs for each row."""
        return ("classification",)

    @property
    def least_length(self) -> int:
        """The least `max_length` with which a row has a token of its text."""
        return 1 + self.tokenizer.num_special_tokens_to_add(len(self.columns.text) == 2)

    @property
    def sizes(self) -> dict[str, int]:
        """An output for each class, or one number; and the token that fills short rows."""
        outputs = len(self.class_names) if self.class_names else 1
        # No token has the id −1: then the last one is the last that is no padding.
        padding = tokens.pad_id(self.tokenizer) if self.mask_padding else -1
        return {"out_features": outputs, "pad_token_id": padding}

    def usable(self, source: Source) -> Tensor:
        """All rows, or as many of each class."""
        if not self.balance:
            return super().usable(source)
        return parts.balanced(_examples(source, self.columns, self.class_names)[1], self.seed)

    def rows(self, source: Source, numbers: Tensor, split: str) -> tokens.TokenRows:
        """Rows of tokens, with a class (B,) or a number (B, 1) for each."""
        texts, targets = _examples(source, self.columns, self.class_names)
        settings = {"max_length": self.max_length}
        encode = partial(_encode, self.tokenizer, **settings)
        flat = tokens.tokenize(source.path, texts, self.tokenizer, settings, encode)
        padding = tokens.padding(self.tokenizer, flat)
        rows = tokens.TokenRows(flat, padding, targets, numbers, self.pad_to_multiple)
        rows.has_mask = self.mask_padding
        return rows


@lru_cache(maxsize=4)
def _class_names(train: Source, chosen: Columns) -> tuple[str, ...]:
    return columns.class_names(train.table(), chosen.label, chosen.classes)


@lru_cache(maxsize=8)
def _examples(
    source: Source, chosen: Columns, classes: tuple[str, ...] | None
) -> tuple[list[list[str]], Tensor]:
    """The texts of each column and the targets of a source, checked."""
    table = source.table()
    texts = [columns.texts(table, "text", name) for name in chosen.text]
    if classes is None:
        return texts, columns.numbers(table, chosen.label)
    listed = chosen.classes is not None
    return texts, columns.class_indices(table, chosen.label, classes, listed)


def _encode(tokenizer: Any, *texts: list[str], max_length: int | None) -> tokens.Encoded:
    """The tokens of texts or pairs, with the special tokens that the tokenizer adds."""
    encoded = tokenizer(
        *texts,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
    )
    return tokens.model_inputs(encoded)
