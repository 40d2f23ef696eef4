"""The LightningModules: a base learning its task, and LoRA adapting it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import cos, pi
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lora_lab.adapters import parameter_groups
from lora_lab.config.schema import Optimizer

Batch = tuple[Tensor, Tensor]

LOSS_READ_INTERVAL = 50
"""Steps between two looks at the training loss: reading one waits for the device."""


class DivergedError(RuntimeError):
    """A loss that is no number any more."""


@dataclass(frozen=True)
class Task:
    """What the outputs are for: a loss, and the metrics of a validation pass by name.

    A metric is made from the number of outputs.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: dict[str, Callable[[int], Metric]]


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy in nats of logits (B, T, V) at the tokens (B, T) that came."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class TokenAccuracy(MulticlassAccuracy):
    """The share of tokens (B, T) to which the logits (B, T, V) give the most."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts a batch."""
        super().update(preds.flatten(0, 1), target.flatten())


TASKS = {
    "regression": Task(F.mse_loss, {}),
    "classification": Task(
        F.cross_entropy, {"accuracy": partial(MulticlassAccuracy, average="micro")}
    ),
    "language": Task(next_token_loss, {"accuracy": partial(TokenAccuracy, average="micro")}),
}


class BaseModule(pl.LightningModule):
    """A model learning a task with every one of its parameters.

    `prefix` stands before the names of everything it logs: `base/` while the base is trained.
    """

    def __init__(
        self, model: nn.Module, task: str, outputs: int, optimizer: Optimizer, prefix: str = ""
    ):
        super().__init__()
        self.model, self.task, self.optimizer, self.prefix = model, TASKS[task], optimizer, prefix
        self.metrics = nn.ModuleDict({n: make(outputs) for n, make in self.task.metrics.items()})
        self.final_step: dict[str, float] | None = None
        """Step and epoch at which training ended; None while it runs."""
        self.train_loss: float | None = None
        """The last training loss that was looked at."""
        self._losses: list[Tensor] = []
        """Of the epoch's steps since the training loss was looked at."""
        self._read: list[Tensor] = []
        """Those before, as they were read."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning writes the running hook's name here some 40 times a step, and nn.Module would
        # each time find out anew that a string is no parameter: a fifth of Lightning's own cost.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """With trainer=fsdp, leaves each process its share of every weight."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if isinstance(self.model, FSDPModule):  # Lightning asks at every pass
            return
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for module in list(self.model.modules()):
            for block in module if isinstance(module, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output."""
        return self.model(x)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """What the optimizer moves, in its groups: every parameter."""
        return [{"params": list(self.model.parameters())}]

    @property
    def epochs_done(self) -> int:
        """Whole epochs behind us; within fit every measurement is made at an epoch's end."""
        return self.current_epoch + (self.trainer.state.fn == TrainerFn.FITTING)

    def step_and_epoch(self) -> dict[str, float]:
        """Optimizer steps and epochs completed so far, as logged beside metrics.

        Within fit, Lightning's `current_epoch` is one behind when metrics are logged.
        """
        if self.final_step is not None:
            return self.final_step
        return {"step": float(self.global_step), "epoch": float(self.epochs_done)}

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's list of losses."""
        self._losses.clear()
        self._read.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The task's loss on a batch."""
        x, y = batch
        loss = self.task.loss(self.model(x), y)
        self._losses.append(loss.detach())
        if len(self._losses) == LOSS_READ_INTERVAL or self.trainer.is_last_batch:
            self._read_losses()
        return loss

    # Lightning asks at every step which arguments it takes: said here, it is 4 µs in place of 10.
    training_step.__signature__ = signature(training_step)  # pyright: ignore

    def _read_losses(self) -> Tensor:
        """The losses of the epoch so far, those since the last look read from the device."""
        if self._losses:
            # Of all processes, so that each sees what one sees.
            new = self.trainer.strategy.reduce(torch.stack(self._losses), reduce_op="mean").cpu()
            self.check_losses(new, sum(map(len, self._read)))
            self.train_loss = new[-1].item()
            self._read.append(new)
            self._losses.clear()
        return torch.cat(self._read)

    def check_losses(self, losses: Tensor, before: int) -> None:
        """Raises DivergedError where training losses, after `before` steps, are not all numbers."""
        if not (finite := losses.isfinite()).all():
            at, steps = int(finite.int().argmin()), self.trainer.num_training_batches
            raise DivergedError(
                f"{self.prefix}train/loss became {losses[at].item()} in epoch "
                f"{self.current_epoch + 1}, step {before + at + 1} of {steps}; "
                f"a smaller learning rate (now {self.optimizer.lr:g}) or "
                "trainer.gradient_clip_val may keep it finite"
            )

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's mean training loss."""
        mean = self._read_losses().double().mean()
        self.log_dict({f"{self.prefix}train/loss": mean, **self.step_and_epoch()})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The task's loss and metrics, logged as means over the whole validation set."""
        x, y = batch
        output = self.model(x)
        loss = self.task.loss(output, y)
        if not len(x):  # fewer rows than processes
            return
        self.check_val_loss(loss)
        # A float: the mean of the processes' row counts is not to be rounded down.
        rows: Any = float(len(x))
        self.log(f"{self.prefix}val/loss", loss, batch_size=rows, sync_dist=True)
        for name, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            metric.update(output, y)
            self.log(f"{self.prefix}val/{name}", metric, batch_size=len(x))

    def check_val_loss(self, loss: Tensor) -> None:
        """Raises DivergedError where a validation loss is no number."""
        if not loss.isfinite():
            raise DivergedError(
                f"{self.prefix}val/loss is {loss.item()} after epoch {self.epochs_done}, "
                f"step {self.global_step} of the run"
                + ("" if self.global_step else ": the base or the data holds it, no step was taken")
            )

    def on_validation_epoch_end(self) -> None:
        """Dates the row."""
        self.log_dict(self.step_and_epoch())

    def configure_optimizers(self) -> Any:
        """The configured optimizer over what trains, its rate scheduled over all steps."""
        optimizer = self.optimizer.callee(self.optimizer_groups(), **self.optimizer.arguments)
        if self.optimizer.schedule == "constant" and not self.optimizer.warmup:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        rate = partial(lr_factor, self.optimizer.schedule, self.optimizer.warmup * steps, steps)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, rate), "interval": "step"}]


def lr_factor(schedule: str, warmup: float, steps: int, step: int) -> float:
    """The share of the learning rate at `step` of `steps`: up over `warmup` steps, then down."""
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[schedule]


class LoRAModule(BaseModule):
    """A frozen base and its adapters: they alone train.

    The base takes no gradient, is not in the optimizer, and its running statistics stay what they
    were. Weight decay, which would pull the adapted model toward the base, is on only where the
    config says so. `lr_ratio` is LoRA+'s.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        outputs: int,
        optimizer: Optimizer,
        prefix: str = "",
        lr_ratio: float = 1.0,
    ):
        super().__init__(model, task, outputs, optimizer, prefix)
        self.lr_ratio = lr_ratio

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The adapters' parameters, with the factor that starts at zero apart where it must be."""
        decay = self.optimizer.arguments.get("weight_decay", 0.0)
        return parameter_groups(self.model, self.optimizer.lr, self.lr_ratio, decay)
