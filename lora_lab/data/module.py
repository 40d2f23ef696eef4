"""What a data set is: two phases, tensors drawn from a seed, batches that are a function of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lora_lab.analysis.theory import Prediction
from lora_lab.seeding import generator

Phase = Literal["base", "adapt"]


class Data(pl.LightningDataModule, ABC):
    """One data set in one of its two phases: `base`, what the base learns, and `adapt`.

    A subclass says its task and sizes, and draws its tensors from `seed`. Batches are a function
    of (seed, phase, epoch) alone, so that the runs of one cell see the same data in the same order.
    """

    task: str
    """A key of training/tasks.py's TASKS."""

    rows_differ_in: Literal["batch", "epoch"] = "epoch"
    """Drawn without replacement within each epoch (a permutation), or within each batch only."""

    eval_rows = 4096
    """Rows of one evaluation batch: large, since nothing is kept for a backward pass."""

    def __init__(self, phase: Phase, batch_size: int | None, seed: int, steps: int = 1):
        """`batch_size` None: every batch is all the rows, `steps` of them an epoch."""
        super().__init__()
        self.phase, self.batch_size, self.seed, self.steps = phase, batch_size, seed, steps
        self.train: TensorDataset | None = None
        self.val: TensorDataset | None = None

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """What this data can tell a model of its sizes, by the model's argument names."""

    @abstractmethod
    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """The training and the validation set of this phase."""

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """What theory says of an adapted run's metrics at its end, by their names, if anything.

        `model` is the base before its first step, with its adapters on it, or none for full
        fine-tuning; this is the `adapt` phase, and the data is drawn.
        """
        return {}

    def setup(self, stage: str) -> None:
        """Draws the data, once."""
        if self.train is None:
            self.train, self.val = self.draw()
            self.check_batch(len(self.train))

    def check_batch(self, rows: int) -> None:
        """Raises ValueError where not even one batch can be drawn without replacement."""
        if self.batch_size is not None and self.batch_size > rows:
            raise ValueError(f"batch_size={self.batch_size} is more than the {rows} training rows")

    def train_dataloader(self) -> DataLoader:
        """Batches in the order that (seed, phase, epoch) gives."""
        assert self.train is not None
        place = _, count = self._place()
        if (rows := self.batch_size or len(self.train)) % count:
            raise ValueError(f"{rows} rows a batch cannot be shared evenly by {count} processes")
        if self.batch_size is None:
            return _loader(self.train, [_share(slice(0, rows), *place)] * self.steps)
        key = (self.seed, self.phase, "order")
        return _loader(self.train, Batches(len(self.train), rows, self.rows_differ_in, key, *place))

    def val_dataloader(self) -> DataLoader:
        """The validation set from first to last."""
        assert self.val is not None
        rows = len(self.val)
        slices = [slice(i, min(i + self.eval_rows, rows)) for i in range(0, rows, self.eval_rows)]
        return _loader(self.val, [_share(batch, *self._place()) for batch in slices])

    def _place(self) -> tuple[int, int]:
        """Which process this is of how many that share every batch."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def _loader(dataset: TensorDataset, rows: object) -> DataLoader:
    # batch_size=None: each draw indexes a whole batch at once, not row by row. A generator of
    # its own: DataLoader otherwise takes a seed off the global stream, dropout's, every epoch.
    return DataLoader(dataset, batch_size=None, sampler=rows, generator=torch.Generator())  # pyright: ignore


def _share(batch: slice, rank: int, count: int) -> slice:
    """The consecutive rows of a batch that are for process `rank` of `count`."""
    rows = batch.stop - batch.start
    start, stop = rows * rank // count, rows * (rank + 1) // count
    return slice(batch.start + start, batch.start + stop)


class Batches(Sampler[Tensor]):
    """Row indices of each whole batch of an epoch: ⌊rows / batch_size⌋ batches.

    Of every batch process `rank` of `count` has its share.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        differ_in: Literal["batch", "epoch"],
        key: tuple,
        rank: int = 0,
        count: int = 1,
    ):
        self.rows, self.batch_size, self.differ_in, self.key = rows, batch_size, differ_in, key
        self.share = _share(slice(0, batch_size), rank, count)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        draws = generator(*self.key, self.epoch)
        if self.differ_in == "epoch":
            batches = torch.randperm(self.rows, generator=draws).split(self.batch_size)
            yield from (batch[self.share] for batch in batches[: len(self)])
        else:
            for _ in range(len(self)):
                yield torch.randperm(self.rows, generator=draws)[self.share]
