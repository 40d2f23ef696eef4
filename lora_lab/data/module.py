"""The base class of data sets: two phases, tensors drawn from a seed, reproducible batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise, repeat
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lora_lab.adapters.model_call import Inputs, logits
from lora_lab.analysis.theory import Prediction
from lora_lab.seeding import generator

Phase = Literal["base", "adapt"]

Rows = Any
"""A set of rows: it has a length, and gives the inputs and targets of a batch by its row numbers.

Row numbers are a tensor or a slice: `inputs, targets = rows[numbers]`. A TensorDataset is one. A
set whose rows are drawn anew in each epoch has an attribute `epoch`, which is set before it.
"""


class Data(pl.LightningDataModule, ABC):
    """A data set in one of its two phases: `base` trains the base, `adapt` the adapters.

    A subclass gives its `task` and `sizes`, and draws its tensors from `seed` in `draw`. Batches
    are a function of (seed, phase, epoch) alone, so that runs that differ in other settings see the
    same data in the same order.
    """

    task: str
    """The loss and the metrics: a key of TASKS in training/tasks.py, as `regression`."""

    metrics: Sequence[str] | None = None
    """The validation metrics, by name in TASKS; None: the task's defaults."""

    known: "Data | None" = None
    """What the base knew: its validation rows are read in each validation too (`forget/…`)."""

    outputs_of: Callable[[nn.Module, Inputs], Tensor] = staticmethod(logits)
    """(model, inputs) → the outputs that `task` takes, where the data is what a base knew."""

    distinct_rows_in: Literal["batch", "epoch"] = "epoch"
    """Rows are drawn without replacement in each epoch (a permutation), or in each batch only."""

    eval_rows = 4096
    """Rows of a validation batch; large, since no activations are stored for a backward pass."""

    def __init__(self, phase: Phase, batch_size: int | None, seed: int, steps: int = 1):
        """`batch_size` None: a batch is the full training set, and an epoch is `steps` of them."""
        super().__init__()
        self.phase, self.batch_size, self.seed, self.steps = phase, batch_size, seed, steps
        self.train: Rows = None
        self.val: Rows = None
        self.test: Rows = None
        """Rows that a run looks at once, at its end; None until they are drawn."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes of a model for this data, by the model's argument names, as `in_features`."""

    @property
    def heads(self) -> Sequence[str] | None:
        """Heads of model=pretrained (or `timm`) that learn this data; None: it is not checked."""
        return None

    @property
    def heads_because(self) -> str:
        """The setting that decides on `heads`, as " data.objective=masked", for messages."""
        return ""

    @abstractmethod
    def draw(self) -> tuple[Rows, Rows]:
        """Draws the training and the validation set of this phase from the seed."""

    @property
    def has_test(self) -> bool:
        """Whether `draw_test` gives rows: told before anything is drawn."""
        return False

    def draw_test(self) -> Rows:
        """Draws the rows of the test, which are of the `adapt` phase, where it `has_test`."""
        raise NotImplementedError

    def check_base(self) -> None:
        """Raises ValueError where there are no rows for the `base` phase; here there are."""

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """What theory predicts for the metrics of an adapted run at its end, by their names.

        Empty where theory predicts nothing. `model` is the base before the first step, with its
        adapters attached; without any, the run is full fine-tuning. Called in the `adapt` phase,
        with the data drawn.
        """
        return {}

    def setup(self, stage: str) -> None:
        """Draws the data, the first time that it is called. Lightning's hook.

        The test is drawn as training begins, which a wrong one ends then and not at its end. Who
        only validates draws none.
        """
        if self.train is None:
            self.train, self.val = self.draw()
            self.check_batch(len(self.train))
        is_tested = self.has_test and self.phase == "adapt" and stage in ("fit", "test")
        if is_tested and self.test is None:
            self.test = self.draw_test()
        if self.known is not None:
            self.known.setup(stage)

    def check_batch(self, rows: int) -> None:
        """Raises ValueError where `rows` training rows are fewer than one batch."""
        if self.batch_size is not None and self.batch_size > rows:
            raise ValueError(f"batch_size={self.batch_size} is more than the {rows} training rows")

    def train_dataloader(self) -> DataLoader:
        """Training batches in the order given by (seed, phase, epoch).

        Raises ValueError where the processes of the run cannot share a batch evenly.
        """
        assert self.train is not None
        process = _, count = self._process()
        if (rows := self.batch_size or len(self.train)) % count:
            raise ValueError(f"{rows} rows a batch cannot be shared evenly by {count} processes")
        if self.batch_size is None:
            share = _process_share(slice(0, rows), *process)
            return _loader(self.train, SameBatch(share, self.steps))
        draws = (self.distinct_rows_in, (self.seed, self.phase, "order"))
        batches = Batches(len(self.train), rows, *draws, *process)
        batches.drawn_rows = self.train if hasattr(self.train, "epoch") else None
        return _loader(self.train, batches)

    def val_dataloader(self) -> Any:
        """The validation set in its order, `eval_rows` at a time; with `known`, a list of both."""
        assert self.val is not None
        loader = self.eval_dataloader(self.val)
        if self.known is None:
            return loader
        self.known.trainer = self.trainer
        return [loader, self.known.val_dataloader()]

    def test_dataloader(self) -> DataLoader:
        """The rows of the test in their order, `eval_rows` at a time."""
        assert self.test is not None
        return self.eval_dataloader(self.test)

    def eval_dataloader(self, rows: Rows) -> DataLoader:
        """A set in its order, `eval_rows` at a time."""
        ends = [*range(self.eval_rows, len(rows), self.eval_rows), len(rows)]
        slices = [slice(start, end) for start, end in pairwise([0, *ends])]
        return _loader(rows, [_process_share(batch, *self._process()) for batch in slices])

    def _process(self) -> tuple[int, int]:
        """This process's rank, and the number of processes, which share each batch."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def _loader(dataset: Rows, batches: object) -> DataLoader:
    """A DataLoader over `batches`, each the indices (a tensor or a slice) of a batch's rows."""
    # batch_size=None: the dataset is indexed once for each batch, not row by row. A generator is
    # passed because DataLoader otherwise draws a seed from the global random stream at each epoch,
    # and that would change the dropout masks.
    return DataLoader(dataset, batch_size=None, sampler=batches, generator=torch.Generator())  # pyright: ignore


def _process_share(batch: slice, process_rank: int, processes: int) -> slice:
    """The consecutive rows of a batch that one of several processes computes."""
    rows = batch.stop - batch.start
    start, stop = rows * process_rank // processes, rows * (process_rank + 1) // processes
    return slice(batch.start + start, batch.start + stop)


class EpochSampler(Sampler[Any], ABC):
    """Sampler of an epoch's batches, of which the first are left out where training is resumed."""

    def __init__(self) -> None:
        self.skipped = 0
        """How many batches the next epoch leaves out; those after it leave out none."""

    @abstractmethod
    def batches(self) -> Iterator[Tensor | slice]:
        """All of an epoch's batches, each the indices of its rows."""

    def skip(self, batches: int) -> None:
        """Leaves out the first `batches` of the next epoch. The others are what they would be."""
        self.skipped = batches

    # A generator, so that `skipped` is read as late as the epoch's first batch: when the Trainer's
    # loop says where to begin, it has the DataLoader's iterator already.
    def __iter__(self) -> Iterator[Any]:
        skipped, self.skipped = self.skipped, 0
        yield from islice(self.batches(), skipped, None)


class Batches(EpochSampler):
    """Sampler of the row indices of an epoch's ⌊rows / batch_size⌋ batches, none of them partial.

    `rows` is the size of the training set, `distinct_in` as `Data.distinct_rows_in`. The draws are
    seeded by (*seed_key, epoch). Each process gets its share of each batch's rows, (batch_size /
    processes,) indices.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        distinct_in: Literal["batch", "epoch"],
        seed_key: tuple,
        process_rank: int = 0,
        processes: int = 1,
    ):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
        self.distinct_in, self.seed_key = distinct_in, seed_key
        self.share = _process_share(slice(0, batch_size), process_rank, processes)
        self.epoch = 0
        self.drawn_rows: Rows = None
        """A set whose rows are drawn anew in each epoch, to be told which one it is."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that is drawn next; Lightning calls this before each epoch."""
        self.epoch = epoch
        if self.drawn_rows is not None:
            self.drawn_rows.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def batches(self) -> Iterator[Tensor]:
        """An epoch's batches, drawn from the seed."""
        rng = generator(*self.seed_key, self.epoch)
        # All processes draw the full batch, so that their streams agree, and take their share.
        if self.distinct_in == "epoch":
            batches = torch.randperm(self.rows, generator=rng).split(self.batch_size)
            yield from (batch[self.share] for batch in batches[: len(self)])
        else:
            for _ in range(len(self)):
                yield torch.randperm(self.rows, generator=rng)[self.share]


class SameBatch(EpochSampler):
    """Sampler that gives one batch, of consecutive `rows`, `steps` times an epoch."""

    def __init__(self, rows: slice, steps: int):
        super().__init__()
        self.rows, self.steps = rows, steps

    def __len__(self) -> int:
        return self.steps

    def batches(self) -> Iterator[slice]:
        """The same rows, `steps` times."""
        return repeat(self.rows, self.steps)
