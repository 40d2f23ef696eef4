"""The progress of a training on the terminal: epochs, loss, time left."""

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
    """Shows one progress bar on a terminal, and logs a line at each validation.

    `label` names what is trained, as `base` or `lora`.
    """

    def __init__(self, label: str, console: Console):
        self.label, self.console = label, console
        self.progress: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the bar, after a resumed training at its epoch."""
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
            # Drawing takes a millisecond: at rich's ten times a second 1% of training time.
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
        """Moves the bar each time the training loss was read from the device."""
        if (batch_idx + 1) % LOSS_READ_INTERVAL == 0:
            epoch_share = (batch_idx + 1) / trainer.num_training_batches
            self._show(pl_module, trainer.current_epoch + epoch_share)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the bar to the end of the epoch."""
        self._show(pl_module, trainer.current_epoch + 1)

    def _show(self, module: pl.LightningModule, epochs: float) -> None:
        assert isinstance(module, BaseModule)
        if self.progress is not None and module.train_loss is not None:
            self.progress.update(self.task, completed=epochs, loss=f"{module.train_loss:.4g}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the epoch and its validation metrics in one line."""
        assert isinstance(pl_module, BaseModule)
        values = {
            name.removeprefix(pl_module.prefix): float(value)
            for name, value in trainer.logged_metrics.items()
            if name.startswith(f"{pl_module.prefix}val/")
        }
        metrics = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
        label = pl_module.prefix.rstrip("/") or self.label
        log.info("%s epoch %d/%s  %s", label, pl_module.epochs_done, trainer.max_epochs, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the bar, which stays on the terminal."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Ends the bar where training failed or was interrupted."""
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
