"""The progress of a training on the terminal: epochs, loss, time left."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import progress
from rich.console import Console

from lora_lab.training.modules import LOSS_READ_INTERVAL, BaseModule

log = logging.getLogger(__name__)


class ProgressBar(Callback):
    """Shows one progress bar on a terminal, and logs a line at each validation.

    `label` names what is trained, as `base` or `lora`.
    """

    def __init__(self, label: str, console: Console):
        self.label, self.console = label, console
        self.bar: progress.Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar; where a training is resumed, at the epoch from which it goes on."""
        self.bar = progress.Progress(
            progress.TextColumn("{task.description:<6}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("epochs · loss {task.fields[loss]} ·"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("· left"),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            # Drawing takes a millisecond: at rich's ten times a second 1% of training time.
            refresh_per_second=2,
        )
        done, total = trainer.current_epoch, trainer.max_epochs
        self.task = self.bar.add_task(self.label, completed=done, total=total, loss="–")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar each time the training loss was read from the device."""
        if (batch_idx + 1) % LOSS_READ_INTERVAL == 0:
            epoch_share = (batch_idx + 1) / trainer.num_training_batches
            self._show(pl_module, trainer.current_epoch + epoch_share)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the bar to the end of the epoch."""
        self._show(pl_module, trainer.current_epoch + 1)

    def _show(self, module: LightningModule, epochs: float) -> None:
        assert isinstance(module, BaseModule)
        if self.bar is not None and module.train_loss is not None:
            self.bar.update(self.task, completed=epochs, loss=f"{module.train_loss:.4g}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the bar, which stays on the terminal."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the bar where training failed or was interrupted."""
        self.on_train_end(trainer, pl_module)
