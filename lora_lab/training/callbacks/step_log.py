"""Logs the training loss and the learning rate every so many optimizer steps."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule


class StepLog(Callback):
    """Logs `train/loss_step` and `lr` after each `interval` optimizer steps.

    The loss is the mean over all targets of the steps since the row before; the rate is the one of
    the last of them. Reading the loss makes the CPU wait for a GPU.
    """

    def __init__(self, interval: int, tracking: Tracking):
        self.interval, self.tracking = interval, tracking
        self.step = 0
        """The step of the last row."""
        self.totals = torch.zeros(2, dtype=torch.float64)
        """The module's `loss_totals` at that step."""
        self.lr = 0.0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the rate: the schedule changes it before the step's end."""
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Logs a row where one is due."""
        step = trainer.global_step
        if step % self.interval or step == self.step:  # several micro-batches end at one step
            return
        assert isinstance(pl_module, BaseModule)
        pl_module.read_new_losses()
        loss_sum, count = pl_module.loss_totals - self.totals
        self.step, self.totals = step, pl_module.loss_totals
        loss = (loss_sum / count.clamp(min=1)).item()
        row = {"train/loss_step": loss, "lr": self.lr, "epoch": float(pl_module.epochs_done)}
        self.tracking.log(row, step)

    def state_dict(self) -> dict[str, Any]:
        """What the next row needs."""
        return {"step": self.step, "totals": self.totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint knows."""
        self.step, self.totals = state_dict["step"], state_dict["totals"]
