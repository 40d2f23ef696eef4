"""What the loop costs a step: Lightning's on top of a plain one, and ours on top of Lightning's.

One model with its adapter, the same batches, three loops: plain torch; Lightning's Trainer with a
module that has a loss and an optimizer and nothing else; `experiment.run` with all it does, W&B
offline and a bar on a terminal included. A step lasts from one asking for a batch to the next; the
loops take turns, and the table has the median, least and most over those turns. Torch has one
thread. The bound is on processor time, of all threads: on a shared machine wall time is also the
others'.
"""

import argparse
import copy
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from math import inf
from operator import sub

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lora_lab.config import compose
from lora_lab.console import silence_lightning
from lora_lab.data import Data, Phase
from lora_lab.data.shift import Shift
from lora_lab.training import experiment
from lora_lab.training.plan import Plan, plan

BOUND = 100.0
"""Microseconds a step of ours on top of Lightning's."""

SIZES = {"0.3 ms": (8, 2, 3000), "1 ms": (416, 128, 1000), "10 ms": (1664, 128, 300)}
"""Sides of the weight, rows of a batch and steps, by what a plain step is to take about.

The first is the least possible: a step of LoRA is 15 calls into torch, however small.
"""

ROWS = 256

WARM = 50
"""Steps that are not counted."""

times: list[tuple[float, float]] = []
"""Wall and processor seconds at which the last loop asked for its training batches."""


class Clock(Sampler[Tensor]):
    """The rows of each batch; notes when it is asked for them."""

    def __init__(self, batch: int, steps: int):
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        times.clear()
        for _ in range(self.steps):
            times.append((time.perf_counter(), time.process_time()))
            yield torch.arange(self.batch)


class Timed(Shift):
    """Shift, one epoch of so many steps of which is timed; the base takes one."""

    def __init__(self, phase: Phase, size: int, batch_size: int, steps: int):
        super().__init__(phase, ROWS, size, size, 1.0, batch_size, 0)
        self.steps = steps if phase == "adapt" else 1

    def train_dataloader(self) -> DataLoader:
        assert self.train is not None
        assert self.batch_size is not None
        rows = Clock(self.batch_size, self.steps)
        return DataLoader(self.train, batch_size=None, sampler=rows)


class Bare(pl.LightningModule):
    """A loss and an optimizer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.model)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    moved = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(moved, lr=1e-3, fused=True)


def plain(planned: Plan, model: nn.Module, data: Data) -> None:
    """Plain torch."""
    moves = optimizer(model)
    for x, y in data.train_dataloader():
        moves.zero_grad()
        F.mse_loss(model(x), y).backward()
        moves.step()


def bare(planned: Plan, model: nn.Module, data: Data) -> None:
    """Lightning with everything off."""
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(off, False))
    trainer.fit(Bare(model), data.train_dataloader())


def ours(planned: Plan, model: nn.Module, data: Data) -> None:
    """A run of lora_lab."""
    with open(os.devnull, "w") as nowhere:
        experiment.run(planned, Console(file=nowhere, force_terminal=True))


LOOPS: dict[str, Callable[[Plan, nn.Module, Data], None]] = {
    "plain": plain,
    "Lightning": bare,
    "lora_lab": ours,
}


def step(loop: Callable[[Plan, nn.Module, Data], None], planned: Plan) -> list[float]:
    """Wall and processor microseconds a step."""
    model, data = planned.model(), planned.data("adapt")
    planned.attach(model)
    data.setup("fit")
    loop(planned, copy.deepcopy(model), data)
    first, last = times[WARM], times[-1]
    return [(b - a) / (len(times) - 1 - WARM) * 1e6 for a, b in zip(first, last, strict=True)]


def planned(folder: str, size: int, batch: int, steps: int) -> Plan:
    settings = ["experiment=shift", "trainer=cpu", "tracking=offline", "overwrite=true"]
    settings += ["figures=false", "spectra.truncation=none", "spectra.against_base=false"]
    settings += ["base.epochs=1", "trainer.max_epochs=1"]
    settings += [f"runs_dir={folder}/runs", f"bases_dir={folder}/bases"]
    settings += [
        f"~data.{key}" for key in ("samples", "in_features", "out_features", "shift", "seed")
    ]
    settings += [
        f"data._target_={__name__}.Timed",
        f"+data.size={size}",
        f"data.batch_size={batch}",
    ]
    settings += [f"+data.steps={steps}"]
    ((_, cfg),) = compose.compose_points([settings])
    if isinstance(cfg, Exception):
        raise cfg
    return plan(cfg)


def shown(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.0f} ({ordered[0]:.0f} – {ordered[-1]:.0f})"


def main() -> None:
    """Prints the table; exits with 1 where ours is beyond its bound."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.overhead")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", choices=[*SIZES], default=[*SIZES])
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    silence_lightning()
    torch.set_num_threads(1)
    table = Table(title=f"µs a step: median (least – most) of {arguments.repeats} turns")
    for name in ("about", "time", *LOOPS, "Lightning − plain", "lora_lab − Lightning", "bound"):
        table.add_column(name, justify="right")
    beyond = False
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            run_plan = planned(folder, *SIZES[name])
            repeats = range(arguments.repeats)
            turns = [[step(loop, run_plan) for loop in LOOPS.values()] for _ in repeats]
        for i, clock in enumerate(("wall", "processor")):
            a, b, c = ([took[i] for took in loop] for loop in zip(*turns, strict=True))
            over, on_top = (list(map(sub, more, less)) for more, less in ((b, a), (c, b)))
            bound = BOUND if clock == "processor" else inf
            beyond |= statistics.median(on_top) > bound
            table.add_row(name, clock, *map(shown, (a, b, c, over, on_top)), f"{bound:.0f}")
    Console(width=150).print(table)
    sys.exit(int(beyond))


if __name__ == "__main__":
    # By its name, under which the config knows its data.
    from tests.benchmarks import overhead

    overhead.main()
