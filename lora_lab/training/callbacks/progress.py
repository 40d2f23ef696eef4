"""One bar for a whole training: epochs, loss, time left."""

import logging
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lora_lab.training.modules import LOSS_READ_INTERVAL, BaseModule

log = logging.getLogger(__name__)


class ProgressBar(pl.Callback):
    """A rich bar on a terminal; elsewhere, and in the log, a line at every validation."""

    def __init__(self, label: str, console: Console):
        self.label, self.console = label, console
        self.progress: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the bar."""
        self.progress = Progress(
            TextColumn("{task.description:<6}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs · loss {task.fields[loss]} ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            # Drawing takes a millisecond: at rich's ten times a second 1% of all training.
            refresh_per_second=2,
        )
        done, total = trainer.current_epoch, trainer.max_epochs
        self.task = self.progress.add_task(self.label, completed=done, total=total, loss="–")
        self.progress.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves the bar whenever a loss has been read."""
        if (batch_idx + 1) % LOSS_READ_INTERVAL == 0:
            part = (batch_idx + 1) / trainer.num_training_batches
            self._show(pl_module, trainer.current_epoch + part)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the bar by one epoch."""
        self._show(pl_module, trainer.current_epoch + 1)

    def _show(self, module: pl.LightningModule, epochs: float) -> None:
        assert isinstance(module, BaseModule)
        if self.progress is not None and module.train_loss is not None:
            self.progress.update(self.task, completed=epochs, loss=f"{module.train_loss:.4g}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the line."""
        assert isinstance(pl_module, BaseModule)
        values = {
            name.removeprefix(pl_module.prefix): float(value)
            for name, value in trainer.logged_metrics.items()
            if name.startswith(f"{pl_module.prefix}val/")
        }
        shown = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
        label = pl_module.prefix.rstrip("/") or self.label
        log.info("%s epoch %d/%s  %s", label, pl_module.epochs_done, trainer.max_epochs, shown)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the bar full."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the bar where it stopped."""
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
