"""Words with a class each: named entities, parts of speech."""

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from pydantic import PositiveInt
from torch import Tensor

from lora_lab.data import columns, tokens
from lora_lab.data.module import Phase
from lora_lab.data.sources import Source
from lora_lab.data.tables import TableData


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and their classes: a key of caches, as a Source is."""

    words: str
    labels: str
    classes: tuple[str | int, ...] | None


class Words(TableData):
    """Classification of each word of a text, read as `TableData` says and tokenized once.

    `words` names the column of the words, a list of texts in each row; `labels` that of their
    classes (texts, or integers), a list of as many. The model has an output for each token, and a
    word can be several: its first token has its label and the others count for nothing, as special
    tokens do, in losses and in metrics. This is the usual choice (Devlin et al. 2019, section 5.3):
    each word is learned, and scored, once. So accuracy and f1 are over words, not over entities of
    several words. A word that the tokenizer drops (of control characters alone) counts in none.

    `classes` are the classes' names in their order; None: those of a hub set, or the sorted labels
    of `train`. Rows of more than `max_length` tokens are cut, and the words behind do not count.
    Rows are padded to the longest of their batch, in a multiple of `pad_to_multiple`.
    """

    task = "classification"
    usual_length = 512
    """What max_length=null means in a run's config, if the model has as many positions."""

    def __init__(
        self,
        phase: Phase,
        words: str,
        labels: str,
        tokenizer: str | None,
        max_length: PositiveInt | None = None,
        pad_to_multiple: PositiveInt = 1,
        classes: list[str | int] | None = None,
        **table: Any,
    ):
        super().__init__(phase, **table)
        self.max_length, self.pad_to_multiple = max_length, pad_to_multiple
        self.tokenizer = tokens.load_tokenizer(tokenizer)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer={tokenizer}: {type(self.tokenizer).__name__} is not a fast one of"
                " transformers (of a tokenizer.json), which alone tells the word of each token"
            )
        self.columns = Columns(words, labels, None if classes is None else tuple(classes))
        self.class_names = _class_names(self.sources["train"], self.columns)
        """The classes in the order of the model's outputs."""
        for source in self.sources.values():
            _examples(source, self.columns, self.class_names)
        self.check_chosen()

    @property
    def heads(self) -> tuple[str, ...]:
        """The head with outputs for each token."""
        return ("tokens",)

    @property
    def least_length(self) -> int:
        """The least `max_length` with which a row has a token of its words."""
        return 1 + self.tokenizer.num_special_tokens_to_add()

    @property
    def sizes(self) -> dict[str, int]:
        """An output for each class, of each token."""
        return {"out_features": len(self.class_names)}

    def rows(self, source: Source, numbers: Tensor, split: str) -> tokens.TokenRows:
        """Rows of tokens (B, T), with a class, or IGNORED, for each token."""
        examples = _examples(source, self.columns, self.class_names)
        settings = {"how": "words", "max_length": self.max_length}
        encode = partial(_encode, self.tokenizer, max_length=self.max_length)
        flat = tokens.tokenize(source.path, examples, self.tokenizer, settings, encode)
        if not (flat["targets"] != tokens.IGNORED).any():
            raise ValueError(f"max_length={self.max_length}: no word is left in any row")
        padding = {**tokens.padding(self.tokenizer, flat), "targets": tokens.IGNORED}
        return tokens.TokenRows(flat, padding, None, numbers, self.pad_to_multiple)


@lru_cache(maxsize=4)
def _class_names(train: Source, chosen: Columns) -> tuple[str, ...]:
    return columns.class_names(train.table(), chosen.labels, chosen.classes, "labels")


@lru_cache(maxsize=8)
def _examples(
    source: Source, chosen: Columns, classes: tuple[str, ...]
) -> tuple[list[list[str]], list[list[int]]]:
    """The words of each row of a source and their classes, checked."""
    table = source.table()
    words = columns.words(table, "words", chosen.words)
    labels = columns.lists(table, "labels", chosen.labels)
    for row, (row_words, row_labels) in enumerate(zip(words, labels, strict=True)):
        if len(row_words) != len(row_labels):
            raise ValueError(
                f"{table.where(row)}: '{chosen.words}' has {len(row_words)} words and"
                f" '{chosen.labels}' {len(row_labels)} labels"
            )
    indices = columns.class_indices(
        table, chosen.labels, classes, chosen.classes is not None, "labels"
    )
    return words, [part.tolist() for part in indices.split([*map(len, labels)])]


def _encode(
    tokenizer: Any, words: list[list[str]], classes: list[list[int]], *, max_length: int | None
) -> tokens.Encoded:
    """The tokens of words, with the special tokens that the tokenizer adds, and their targets."""
    # Byte-level tokenizers (GPT-2's, RoBERTa's, Llama 3's) have a word's space in its first token:
    # "a b" is a, Ġb. Of words alone they would make a, b, as if these were one word, ab.
    text, pair = tokenizer("a b"), tokenizer(["a", "b"], is_split_into_words=True)
    if text["input_ids"] != pair["input_ids"]:
        words = [[f" {word}" for word in row] for row in words]
    encoded = tokenizer(
        words,
        is_split_into_words=True,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
    )
    targets = [_targets(encoded.word_ids(i), row) for i, row in enumerate(classes)]
    return {**tokens.model_inputs(encoded), "targets": targets}


def _targets(word_of: list[int | None], classes: list[int]) -> list[int]:
    """A word's class at its first token, IGNORED elsewhere. Special tokens are of no word: None."""
    return [
        tokens.IGNORED if word is None or word == before else classes[word]
        for before, word in pairwise([None, *word_of])
    ]
