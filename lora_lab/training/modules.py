"""The LightningModule of training all weights. That of adapters is in lora_module.py."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR

from lora_lab.adapters.model_call import Inputs, logits, row_count
from lora_lab.config.components import Optimizer, warmup_steps
from lora_lab.training.forgetting import Forgetting
from lora_lab.training.gradient_mean import GradientMean
from lora_lab.training.schedule import lr_factor
from lora_lab.training.tasks import TASKS, metric_names, metrics_of

Batch = tuple[Inputs, Tensor]
"""Inputs and targets, as a data module gives them."""

LOSS_READ_INTERVAL = 50
"""Steps between two reads of the training losses: reading a number waits for a GPU to finish."""


class DivergedError(RuntimeError):
    """Raised when a loss or ΔW became infinite or NaN."""


class BaseModule(pl.LightningModule):
    """Trains all parameters of a model: a base, or a full fine-tuning (adapter=full).

    `task` is a key of TASKS, `outputs` the number of the model's outputs (classes or tokens).
    `prefix` stands before the name of each logged metric: `base/` while a base is trained.
    `metrics` are names of the task's metrics (None: its defaults). `label_smoothing` is of the loss
    that is trained on, not of the validation loss.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        outputs: int,
        optimizer: Optimizer,
        prefix: str = "",
        metrics: Sequence[str] | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.model, self.task, self.optimizer, self.prefix = model, TASKS[task], optimizer, prefix
        self.training_loss_sum = self.task.training_loss(label_smoothing)
        self.metric_names = metric_names(task, metrics)
        self.metrics = nn.ModuleDict(metrics_of(task, self.metric_names, outputs))
        self.final_step: dict[str, float] | None = None
        """Step and epoch at which training ended; None while it runs."""
        self.train_loss: float | None = None
        """The training loss that was read last, for the progress bar."""
        self.gradient_mean = GradientMean()
        self._losses: list[Tensor] = []
        """Summed losses of this epoch's newest batches, still on the device."""
        self._counts: list[Tensor] = []
        """How many targets count in each of them, over all processes."""
        self.loss_totals = torch.zeros(2, dtype=torch.float64)
        """Sum and count (2,) of all batches that were read since the first step."""
        self.epoch_totals = torch.zeros(2, dtype=torch.float64)
        """Sum and count (2,) of those of this epoch."""
        self._val_losses: list[Tensor] = []
        """Summed losses of this validation's batches, on the device."""
        self._val_counts: list[Tensor] = []
        """How many targets count in each of them."""
        self.forgetting: Forgetting | None = None
        """Measures at each validation what is forgotten of `Data.known`; None without that."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets `_current_fx_name` to the running hook's name some 40 times a step.
        # nn.Module.__setattr__ would check each time whether that string is a parameter, a buffer
        # or a module, which takes a fifth of Lightning's overhead.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """With trainer=fsdp, splits each weight over the processes, block by block."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if isinstance(self.model, FSDPModule):  # called at each fit and validation
            return
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for module in list(self.model.modules()):
            for block in module if isinstance(module, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(self, inputs: Inputs) -> Tensor:
        """The model's output."""
        return logits(self.model, inputs)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: here one group of all parameters."""
        return [{"params": list(self.model.parameters())}]

    @property
    def epochs_done(self) -> float:
        """Epochs completed so far, with a fraction within an epoch; 0 before the first step."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epochs = batches / self.trainer.num_training_batches
        return int(epochs) if epochs.is_integer() else epochs

    def step_and_epoch(self) -> dict[str, float]:
        """The optimizer steps and epochs completed so far, as they are logged beside metrics."""
        if self.final_step is not None:
            return self.final_step
        return {"step": float(self.global_step), "epoch": float(self.epochs_done)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The task's loss on one batch: its mean, or its part of that of a step (GradientMean)."""
        inputs, targets = batch
        loss_sum = self.training_loss_sum(self(inputs), targets)
        trainer = self.trainer
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        loss, count = self.gradient_mean.scaled(
            loss_sum, self.task.count(targets), trainer.strategy, trainer.world_size, is_first
        )
        self._losses.append(loss_sum.detach())
        self._counts.append(count)
        if len(self._losses) == LOSS_READ_INTERVAL or trainer.is_last_batch:
            self.read_new_losses()
        return loss

    # Lightning inspects this method's arguments at each step. With the signature stored on the
    # function that takes 4 µs instead of 10.
    training_step.__signature__ = signature(training_step)  # pyright: ignore

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes accumulated gradients those of one mean. Lightning clips them after this."""
        if (micro_batches := self.trainer.accumulate_grad_batches) > 1:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            self.gradient_mean.correct(parameters, micro_batches)

    def read_new_losses(self) -> None:
        """Reads the losses that are still on the device. Raises DivergedError."""
        if not self._losses:
            return
        # Over all processes, so that all of them stop at the same step if it diverges.
        new = torch.stack([self._sum(self._losses), torch.stack(self._counts).cpu().double()])
        losses = new[0] / new[1].clamp(min=1)
        self.check_losses(losses)
        self.train_loss = losses[-1].item()
        self.add_losses(new)
        self._losses.clear()
        self._counts.clear()

    def add_losses(self, new: Tensor) -> None:
        """Adds the sums and counts (2, batches) of the newest batches to the totals."""
        # Batch after batch (cumsum), not `new.sum(1)`, so that the totals are the same to the last
        # bit however often they are read: a checkpoint reads them too, and comes at any time.
        self.loss_totals = torch.column_stack([self.loss_totals, new]).cumsum(1)[:, -1].clone()
        self.epoch_totals = torch.column_stack([self.epoch_totals, new]).cumsum(1)[:, -1].clone()

    @property
    def epoch_loss(self) -> Tensor:
        """The mean training loss of the epoch so far, over all targets that were read."""
        loss_sum, count = self.epoch_totals
        return loss_sum / count.clamp(min=1)

    def _sum(self, tensors: list[Tensor]) -> Tensor:
        """Numbers of the newest batches, each summed over processes, in CPU memory (batches,)."""
        return self.trainer.strategy.reduce(torch.stack(tensors), reduce_op="sum").cpu().double()

    def check_losses(self, losses: Tensor) -> None:
        """Raises DivergedError if a training loss is infinite or NaN.

        `losses` (batches,) are those of the newest batches of the epoch.
        """
        if not (finite := losses.isfinite()).all():
            first_bad, steps = int(finite.int().argmin()), self.trainer.num_training_batches
            before = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - len(losses)
            raise DivergedError(
                f"{self.prefix}train/loss became {losses[first_bad].item()} in epoch "
                f"{self.current_epoch + 1}, step {before + first_bad + 1} of {steps}; "
                f"a smaller learning rate (now {self.optimizer.lr:g}) or "
                "trainer.gradient_clip_val may keep it finite"
            )

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's mean training loss, over all its targets, and forgets it."""
        self.read_new_losses()
        self.log_dict({f"{self.prefix}train/loss": self.epoch_loss, **self.step_and_epoch()})
        self.epoch_totals = torch.zeros_like(self.epoch_totals)

    def on_validation_epoch_start(self) -> None:
        """Forgets the losses and metrics of the validation before."""
        self._val_losses.clear()
        self._val_counts.clear()
        self.reset_metrics()

    def reset_metrics(self) -> None:
        """Sets the metrics to what they are before a first batch.

        Out of inference mode: a confusion matrix made in it, as Lightning does at the end of a
        validation, could not be added to in a training's next one.
        """
        with torch.inference_mode(False):
            for metric in self.metrics.values():
                metric.reset()  # pyright: ignore
            if self.forgetting is not None:
                self.forgetting.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the validation loss and metrics; one of `Data.known` to `forgetting`."""
        inputs, targets = batch
        if dataloader_idx:
            if self.forgetting is not None:
                self.forgetting.add(self.model, inputs, targets)
            return
        output = self(inputs)
        self._val_losses.append(self.task.loss_sum(output, targets))
        self._val_counts.append(self.task.count(targets))
        if row_count(inputs):  # a process has none where there are fewer rows than processes
            for metric in self.metrics.values():
                metric.update(output, targets)  # pyright: ignore

    def on_validation_epoch_end(self) -> None:
        """Logs the losses and metrics as means over all targets, with step and epoch."""
        self._log_evaluation("val")
        if self.forgetting is not None:
            row = self.forgetting.row(self._sum).items()
            self.log_dict({f"{self.prefix}forget/{name}": value for name, value in row})
        self.log_dict(self.step_and_epoch())

    # A test is computed as a validation is.
    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        """Logs the same of the test, as `test/…`."""
        self._log_evaluation("test")
        self.log_dict(self.step_and_epoch())

    def _log_evaluation(self, split: str) -> None:
        loss = self._sum(self._val_losses).sum() / self._sum(self._val_counts).sum()
        self.check_val_loss(loss, split)
        row = {"loss": loss, **self.metrics_of_loss(loss), **dict(self.metrics.items())}
        self.log_dict({f"{self.prefix}{split}/{name}": value for name, value in row.items()})

    def check_val_loss(self, loss: Tensor, split: str = "val") -> None:
        """Raises DivergedError if the loss of a validation, or of the test, is infinite or NaN."""
        if not loss.isfinite():
            raise DivergedError(
                f"{self.prefix}{split}/loss is {loss.item()} after epoch {self.epochs_done:g}, "
                f"step {self.global_step} of the run"
                + ("" if self.global_step else ": the base or the data holds it, no step was taken")
            )

    def metrics_of_loss(self, loss: Tensor) -> dict[str, Tensor]:
        """The metrics that follow from the mean validation loss, as perplexity."""
        functions = self.task.of_loss
        return {n: functions[n](loss) for n in self.metric_names if n in functions}

    def configure_optimizers(self) -> Any:
        """The configured optimizer, with its learning rate scheduled over all steps of training."""
        arguments = self.optimizer.arguments
        if arguments.get("fused") and self.trainer.gradient_clip_val:
            # Lightning clips no gradients of a fused optimizer in mixed precision.
            arguments["fused"] = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = self.optimizer.callee(self.optimizer_groups(), **arguments)
        if self.has_constant_rate:
            return optimizer
        factor = self.lr_factor(int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    @property
    def has_constant_rate(self) -> bool:
        """Whether the learning rate is the same in all steps."""
        return self.optimizer.schedule == "constant" and not self.optimizer.warmup

    def lr_factor(self, steps: int) -> Callable[[int], float]:
        """The factor on the learning rate by step, in a training of so many steps."""
        warmup = warmup_steps(self.optimizer.warmup, steps)
        return partial(lr_factor, self.optimizer.schedule, warmup, steps)
