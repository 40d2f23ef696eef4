"""Texts, prompts with completions, or chats, whose tokens a language model learns to predict."""

import logging
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from lora_lab.data import columns, encodings, tokens
from lora_lab.data.module import Phase, Rows
from lora_lab.data.sources import Source
from lora_lab.data.tables import Share, TableData, row_count

log = logging.getLogger(__name__)


class Language(TableData):
    """Next tokens, masked tokens, or completions by an encoder-decoder; read as `TableData` says.

    One of these names the columns: `text`; `prompt` and `completion`; `messages`, chats as lists of
    {role, content} that the tokenizer's template writes out. None of them means text=text. Of a
    prompt or a chat only the completion (the assistant's turns) is learned, or with train_on=all
    all tokens. `templates` are what texts are put in, at {}, by what they are: {prompt:
    "Question: {}\\nAnswer:", completion: " {}"}. A text file (.txt) is one document.

    A document ends with the tokenizer's end of text. Rows are documents of at most `max_length`
    tokens, padded to the longest of their batch. Or, with `block`, all documents follow each other
    and are cut into rows of `block` tokens; the last tokens that fill no row are left out. Where
    `train` is one document and validates itself, its last `val_share` is for validation.

    `objective`: `causal`, targets[t] is the token t + 1; `masked`, BERT's: the share `mask_share`
    of the tokens is to be recovered, drawn anew in each epoch; `seq2seq`, the prompt is encoded and
    the completion is decoded.
    """

    task = "language"
    usual_length = 1024
    """What max_length=null means in a run's config, if the model has as many positions."""

    def __init__(
        self,
        phase: Phase,
        tokenizer: str | None,
        text: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        messages: str | None = None,
        objective: Literal["causal", "masked", "seq2seq"] = "causal",
        train_on: Literal["completion", "all"] = "completion",
        block: PositiveInt | None = None,
        max_length: PositiveInt | None = None,
        mask_share: Share = 0.15,
        pad_to_multiple: PositiveInt = 1,
        templates: dict[str, str] | None = None,
        **table: Any,
    ):
        super().__init__(phase, **table)
        self.objective, self.train_on, self.mask_share = objective, train_on, mask_share
        self.block, self.max_length, self.pad_to_multiple = block, max_length, pad_to_multiple
        self.columns = _chosen_columns(text, prompt, completion, messages)
        self.templates = _checked_templates(templates or {}, self.columns)
        self._check_objective()
        self.tokenizer_path = tokenizer
        self.tokenizer = tokens.load_tokenizer(tokenizer)
        if objective == "masked" and self.tokenizer.mask_token_id is None:
            raise ValueError(f"objective=masked: tokenizer={tokenizer} has no mask token")
        if messages and not self.tokenizer.chat_template:
            raise ValueError(f"messages={messages}: tokenizer={tokenizer} has no chat template")
        for source in self.sources.values():
            self._check_source(source)
        self.check_chosen()

    def _check_objective(self) -> None:
        """Raises ValueError where the columns and `block` do not suit the objective."""
        kind = next(iter(self.columns))
        fitting = {"causal": ("text", "prompt", "messages"), "masked": ("text",)}
        if kind not in fitting.get(self.objective, ("prompt",)):
            needed = (
                "data.text" if self.objective == "masked" else "data.prompt and data.completion"
            )
            raise ValueError(f"objective={self.objective}: needs {needed}, not data.{kind}")
        if self.block and self.objective == "seq2seq":
            raise ValueError(
                f"block={self.block}: not with objective=seq2seq, whose rows are pairs"
            )

    def documents(self, source: Source) -> dict[str, list[Any]]:
        """The texts or chats of a source, by what they are, checked, in their templates."""
        return _documents(source, tuple(self.columns.items()), tuple(self.templates.items()))

    def _check_source(self, source: Source) -> None:
        self.documents(source)
        files = source.table().files
        if files and files[0].suffix == ".txt" and self.block is None:
            raise ValueError(
                f"block=null: {source.key}={source.path} is text, of which each file is one"
                " document; block=TOKENS cuts it into rows"
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """The head that has this objective."""
        return ("language" if self.objective == "causal" else self.objective,)

    @property
    def heads_because(self) -> str:
        """The objective, which decides on the head."""
        return f" data.objective={self.objective}"

    @property
    def least_length(self) -> int:
        """The least tokens of a row (`max_length`, or `block`) of which one is learned."""
        if self.objective == "causal":
            return 2  # a token, and the one that follows it
        return 1 if self.block else 1 + self.tokenizer.num_special_tokens_to_add()

    @property
    def sizes(self) -> dict[str, int]:
        """An output for each token of the vocabulary."""
        return {"out_features": encodings.vocabulary(self.tokenizer, str(self.tokenizer_path))}

    def chosen(self) -> list[tuple[Source, Tensor]]:
        """As TableData's; where a source is one document, both parts are of it."""
        source = self._cut_source()
        return [(source, torch.tensor([0]))] * 2 if source else super().chosen()

    def check_chosen(self) -> None:
        """As TableData's; with `block`, how many rows there are is known once they are cut."""
        if self.block is None:
            super().check_chosen()
        elif self.phase == "adapt" or "base" in self.sources:
            self.chosen()

    def _cut_source(self) -> Source | None:
        """The source that is one document, whose end is for validation; None: there is none."""
        source = self.sources.get("train" if self.phase == "adapt" else "base")
        validates_itself = self.phase == "base" or "val" not in self.sources
        is_cut = validates_itself and self.block and self.val_share and not self.shares
        if source is None or not is_cut:
            return None
        return source if row_count(source) == 1 else None

    def rows(self, source: Source, numbers: Tensor, split: str) -> Rows:
        """The rows of some documents; of a single one, the part that `split` has of it."""
        if self.objective == "seq2seq":
            return self._pairs(source, numbers)
        flat = self._tokens(
            source, tuple(self.columns), "masked" if self.objective == "masked" else None
        )
        if self.block:
            flat = encodings.gathered(flat, numbers)
            if source == self._cut_source() and split in ("train", "val"):
                flat = encodings.part(flat, split, 1 - (self.val_share or 0))
            flat = encodings.blocks(flat, self.block)
            if not (count := len(flat["offsets"]) - 1):
                raise ValueError(
                    f"block={self.block}: more than all tokens of {source.key}={source.path}"
                    f" for {split}"
                )
            numbers = torch.arange(count)
        padding = tokens.padding(self.tokenizer, flat)
        if self.objective == "masked":
            no_targets = torch.zeros(len(flat["offsets"]) - 1)
            rows = tokens.TokenRows(flat, padding, no_targets, numbers, self.pad_to_multiple)
            is_drawn_anew = split == "train"
            key = (self.seed, self.phase, "masks", split)
            return encodings.MaskedRows(rows, self.tokenizer, self.mask_share, key, is_drawn_anew)
        flat |= {"targets": encodings.next_tokens(flat)}
        self._check_learned(source, flat)
        padding |= {"targets": tokens.IGNORED}
        return tokens.TokenRows(flat, padding, None, numbers, self.pad_to_multiple)

    def _check_learned(self, source: Source, flat: dict[str, Tensor]) -> None:
        """Warns of rows without a token to learn, or raises ValueError where no row has one.

        Such is a row whose prompt fills `max_length`.
        """
        learned = torch.cat([torch.zeros(1), (flat["targets"] != tokens.IGNORED).cumsum(0)])
        empty = int((learned[flat["offsets"]].diff() == 0).sum())
        count = len(flat["offsets"]) - 1
        if empty == count:
            raise ValueError(f"max_length={self.max_length}: no token to learn is left in any row")
        if empty:
            log.warning(
                "%d of the %d rows of %s have no token to learn: data.max_length=%s cuts them",
                *(empty, count, source.path, self.max_length),
            )

    def _tokens(
        self, source: Source, names: tuple[str, ...], how: str | None = None
    ) -> dict[str, Tensor]:
        """The tokens of columns of a source, by `how` they are encoded: by default as `names`."""
        documents = self.documents(source)
        texts = [documents[name] for name in names]
        how = how or names[0]
        cut = self.max_length if self.block is None else None
        settings = {"how": how, "max_length": cut, "train_on": self.train_on}
        encode = partial(
            encodings.ENCODERS[how], self.tokenizer, max_length=cut, train_on=self.train_on
        )
        return tokens.tokenize(source.path, texts, self.tokenizer, settings, encode)

    def _pairs(self, source: Source, numbers: Tensor) -> Rows:
        """The rows of an encoder-decoder: the prompt's tokens, and the completion's shifted."""
        start, pad = encodings.decoder_ids(str(self.tokenizer_path))
        encoder = self._tokens(source, ("prompt",), "encoder")
        decoder = self._tokens(source, ("completion",), "decoder")
        decoder = {
            "offsets": decoder["offsets"],
            "targets": decoder["input_ids"],
            "decoder_input_ids": encodings.shifted_right(decoder, start),
        }
        multiple = self.pad_to_multiple
        no_targets = torch.zeros(len(encoder["offsets"]) - 1)
        padding = {"targets": tokens.IGNORED, "decoder_input_ids": pad}
        return encodings.PairRows(
            tokens.TokenRows(encoder, {"input_ids": pad}, no_targets, numbers, multiple),
            tokens.TokenRows(decoder, padding, None, numbers, multiple),
        )


def _chosen_columns(
    text: str | None, prompt: str | None, completion: str | None, messages: str | None
) -> dict[str, str]:
    """The columns by what they are. Raises ValueError for more than one kind, or half a pair."""
    given = {"text": text, "prompt": prompt, "completion": completion, "messages": messages}
    given = {kind: name for kind, name in given.items() if name is not None} or {"text": "text"}
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if [*given] == [one]:
            raise ValueError(f"{other}: must be given with {one}={given[one]}, which is its pair")
    if [*given] not in (["text"], ["prompt", "completion"], ["messages"]):
        shown = ", ".join(f"{kind}={name}" for kind, name in given.items())
        raise ValueError(f"{shown}: give text, or prompt and completion, or messages")
    return given


def _checked_templates(templates: dict[str, str], chosen: dict[str, str]) -> dict[str, str]:
    """The templates. Raises ValueError where one is of no text that is read, or has no one {}."""
    for kind, template in templates.items():
        if kind not in chosen or kind == "messages":
            texts = ", ".join(kind for kind in chosen if kind != "messages") or "none"
            raise ValueError(f"templates={{{kind}: …}}: the texts that are read are {texts}")
        if template.count("{}") != 1:
            raise ValueError(f"templates={{{kind}: {template!r}}}: must have one {{}} for the text")
    return templates


Pairs = tuple[tuple[str, str], ...]


@lru_cache(maxsize=8)
def _documents(source: Source, chosen: Pairs, templates: Pairs) -> dict[str, list[Any]]:
    """The texts or chats of a source, by what they are, checked."""
    table, of_kind = source.table(), dict(templates)
    read = {"messages": columns.chats}
    documents: dict[str, list[Any]] = {
        kind: read.get(kind, columns.texts)(table, kind, name) for kind, name in chosen
    }
    for kind, template in of_kind.items():
        documents[kind] = [template.replace("{}", text) for text in documents[kind]]
    return documents
