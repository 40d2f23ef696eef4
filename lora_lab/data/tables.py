"""The base class of data sets that are read from tables: their sources, splits and limits."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from lora_lab.config.schema import Seed
from lora_lab.data import parts
from lora_lab.data.module import Data, Phase, Rows
from lora_lab.data.sources import Source, source

Share = Annotated[float, Field(gt=0, lt=1)]
"""A part of some rows: more than none, less than all."""


class TableData(Data):
    """Rows of sources (files, folders, hub ids), in the phase that adapts, and in that of the base.

    The `adapt` phase trains on `train` and validates on `val`, or, where that is None, on the share
    `val_share` of the rows of `train`, drawn by `seed`. A run's result is tested on all rows of
    `test`, once. With `shares`, of training, validation and the test, all three are of `train`. The
    `base` phase has the rows of `base`, what the base knew, in the same shares; it can be drawn
    only where `base` is given. `limit` and `val_limit` are the most rows of training and
    validation. `revision` and `subset` are those of hub ids, `column_names` those of CSV or TSV
    files that do not name them. A subclass takes these arguments as **table and passes them on.
    """

    path_arguments: tuple[str, ...] = ("train", "val", "test", "base", "tokenizer")
    """Arguments that are paths or hub ids. A run's identity has their content in their place."""

    sources: dict[str, Source]
    """The sources by argument, without those that are None."""

    def __init__(
        self,
        phase: Phase,
        train: str,
        batch_size: PositiveInt,
        seed: Seed,
        val: str | None = None,
        test: str | None = None,
        base: str | None = None,
        val_share: Share | None = 0.1,
        limit: PositiveInt | None = None,
        val_limit: PositiveInt | None = None,
        revision: str | None = None,
        subset: str | None = None,
        column_names: list[str] | None = None,
        shares: list[Share] | None = None,
        eval_batch_size: PositiveInt = 128,
        metrics: Sequence[str] | None = None,
    ):
        super().__init__(phase, batch_size, seed)
        self.eval_rows, self.metrics = eval_batch_size, metrics
        self.val_share, self.limit, self.val_limit = val_share, limit, val_limit
        self.shares = _checked_shares(shares, val, test)
        paths = {"train": train, "val": val, "test": test, "base": base}
        self.sources = {
            key: source(key, path, revision, subset, column_names)
            for key, path in paths.items()
            if path is not None
        }

    @abstractmethod
    def rows(self, source: Source, numbers: Tensor, split: str) -> Rows:
        """The set of some rows of a source, by their numbers. `split` is train, val or test."""

    def check_base(self) -> None:
        """Raises ValueError where there are no rows for the `base` phase."""
        if "base" not in self.sources:
            raise ValueError(
                "base=null: base=train learns the rows of data.base, what the base knew"
                " (base=pretrained and base=checkpoint need none)"
            )

    def chosen(self) -> list[tuple[Source, Tensor]]:
        """The source and the row numbers of training, and those of validation, in this phase."""
        if self.phase == "base":
            self.check_base()
        train = self.sources["train" if self.phase == "adapt" else "base"]
        val = self.sources.get("val") if self.phase == "adapt" else None
        if self.shares:
            numbers = self._shared_out(train)[:2]
        elif val is None:
            numbers = parts.split(row_count(train), self.val_share, self.seed)
        else:
            numbers = torch.arange(row_count(train)), torch.arange(row_count(val))
        limits = self.limit, self.val_limit
        return [
            (source, parts.limited(n, limit, self.seed))
            for source, n, limit in zip((train, val or train), numbers, limits, strict=True)
        ]

    def usable(self, source: Source) -> Tensor:
        """The numbers of a source's rows, before they are shared out."""
        return torch.arange(row_count(source))

    def _shared_out(self, source: Source) -> tuple[Tensor, ...]:
        """The row numbers of training, validation and the test, by `shares`."""
        return parts.shared_out(self.usable(source), self.shares or (), self.seed)

    def check_chosen(self) -> None:
        """Raises ValueError where there are too few rows to train on or to validate on."""
        if self.phase == "adapt" or "base" in self.sources:
            (_, train), _ = self.chosen()
            self.check_batch(len(train))

    def draw(self) -> tuple[Rows, Rows]:
        """The training and the validation set of this phase."""
        (train, train_numbers), (val, val_numbers) = self.chosen()
        return self.rows(train, train_numbers, "train"), self.rows(val, val_numbers, "val")

    @property
    def has_test(self) -> bool:
        """Whether there are rows of a test."""
        return "test" in self.sources or self.shares is not None

    def test_rows(self) -> tuple[Source, Tensor]:
        """The source of the test, and its row numbers: all of `test`, or the last share."""
        if self.shares:
            train = self.sources["train"]
            return train, self._shared_out(train)[2]
        test = self.sources["test"]
        return test, torch.arange(row_count(test))

    def draw_test(self) -> Rows:
        """The rows of the test."""
        return self.rows(*self.test_rows(), "test")


def _checked_shares(
    shares: Sequence[float] | None, val: str | None, test: str | None
) -> Sequence[float] | None:
    """The shares. Raises ValueError where they are not all rows, or rows are given beside them."""
    if shares is None:
        return None
    if len(shares) != 3 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares={list(shares)}: must be three that sum to 1")
    for key, path in (("val", val), ("test", test)):
        if path is not None:
            raise ValueError(f"shares={list(shares)}: takes them from train, and {key}={path}")
    return shares


def row_count(source: Source) -> int:
    """How many rows a source has."""
    return len(source.table().rows)
