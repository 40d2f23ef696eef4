"""Data modules: one file each. A data module draws what the base learns, and what comes after."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lora_lab.adapters import INITS, adapter_for, attached
from lora_lab.analysis import theory
from lora_lab.analysis.theory import Expected, Fit
from lora_lab.seeding import generator

Phase = Literal["base", "adapt"]


class Data(pl.LightningDataModule, ABC):
    """One data set in one of its two phases: `base`, what the base learns, and `adapt`.

    A subclass says its task and sizes, and draws its tensors from `seed`. Batches are a function
    of (seed, phase, epoch) alone, so that the runs of one cell see the same data in the same order.
    """

    task: str
    """A key of modules.TASKS."""

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

    def expected(self, model: nn.Module) -> dict[str, Expected]:
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


class Planted(Data):
    """A change planted in the one weight of a linear model, from all the rows at every step.

    Validation is on the same rows, so that the loss at the end is that of the best ΔW there is.
    """

    task = "regression"

    def __init__(self, phase: Phase, steps: int, seed: int):
        super().__init__(phase, None, seed, steps)

    @abstractmethod
    def design(self) -> tuple[Tensor, Tensor]:
        """The drawn data as the weight's matrix meets it: X (n × rest) and Y (n × out)."""

    def residual(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """X, and what the base leaves of Y, in float64."""
        (site,) = weights(model)
        layer = model.get_submodule(site)
        W = adapter_for(layer).matrix(weights(model)[site].detach().cpu().double())
        X, Y = (tensor.double() for tensor in self.design())
        return X, Y - X @ W.T

    def best(self, model: nn.Module) -> Fit | None:
        """The best ΔW for the adapter on `model`; None for DoRA, under dropout, of many weights."""
        if len(weights(model)) != 1:
            return None
        (site,) = weights(model)
        X, Y = self.residual(model)
        X = X[:, seen := X.any(0)]  # not an embedding's tokens that never come
        if (adapter := attached(model).get(site)) is None:
            return theory.fit(X, Y)
        if adapter.magnitude is not None or adapter.recipe.dropout:
            return None
        held = {name: t.detach().cpu().double() for name, t in adapter.tensors().items()}
        A, B = held["A"][:, seen], held["B"]
        match adapter.recipe.trains, adapter.zero:
            case "both", _ if "A0" in held:
                start = adapter.scale * held["B0"] @ held["A0"][:, seen]
                found = theory.fit(X, Y, adapter.r, start=start)
            case "both", _:
                found = theory.fit(X, Y, adapter.r)
            case "core", _:
                found = theory.fit(X, Y, A=A, B=B)
            case _, "A":
                found = theory.fit(X, Y, B=B)
            case _:
                found = theory.fit(X, Y, A=A)
        # Factors that start from the weight also move the tokens that never come.
        moved = INITS[adapter.recipe.init].from_weight and not seen.all()
        return replace(found, unique=found.unique and not moved)

    def expected(self, model: nn.Module) -> dict[str, Expected]:
        """The loss, and the first singular values of ΔW where only one ΔW leaves as little."""
        if (best := self.best(model)) is None:
            return {}
        found = {"val/loss": Expected(best.loss)}
        if best.unique:
            (site,) = weights(model)
            sigma = torch.linalg.svdvals(best.delta)[:4].tolist()
            for i, value in enumerate(sigma, 1):
                if value > 1e-3 * sigma[0]:  # the rest is rounding
                    found[f"spectra/{site}/sigma_{i}"] = Expected(value)
        return found


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters, by the layers that hold them."""
    named = model.named_parameters()
    return {name.rpartition(".")[0]: p for name, p in named if "lora" not in name.split(".")}


def planted(out: int, rest: int, sigma: list[float], draws: torch.Generator) -> Tensor:
    """A matrix of singular values `sigma` between random directions, out × rest, in float64.

    Raises ValueError for more values than it can have.
    """
    if len(sigma) > min(out, rest):
        raise ValueError(
            f"sigma={sigma}: {len(sigma)} singular values, and {out} × {rest} has {min(out, rest)}"
        )
    U, V = (orthonormal(size, len(sigma), draws) for size in (out, rest))
    return U * torch.tensor(sigma, dtype=torch.float64) @ V.T


def orthonormal(rows: int, columns: int, draws: torch.Generator) -> Tensor:
    """Random orthonormal columns, in float64. Raises ValueError for more columns than rows."""
    if columns > rows:
        raise ValueError(f"{columns} orthonormal columns do not fit in {rows} rows")
    return torch.linalg.qr(torch.randn(rows, columns, generator=draws, dtype=torch.float64)).Q


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
