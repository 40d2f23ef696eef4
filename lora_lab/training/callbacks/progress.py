"""The progress of a training on the terminal: epochs or steps, loss, speed, time left."""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import progress
from rich.console import Console

from lora_lab.adapters.model_call import row_count, token_count
from lora_lab.training.modules import LOSS_READ_INTERVAL, BaseModule, Batch

log = logging.getLogger(__name__)

QUIET = 60.0
"""Seconds without a line in the log after which one tells how far training is."""


class ProgressBar(Callback):
    """Shows one progress bar on a terminal, and logs a line at each validation, or each QUIET
    seconds where validations are further apart.

    `label` names what is trained, as `base` or `lora`. The bar counts epochs, or steps where
    `trainer.max_steps` is the length. Its speed is in tokens a second for inputs of token indices
    (B, T), in rows for others.
    """

    def __init__(self, label: str, console: Console):
        self.label, self.console = label, console
        self.bar: progress.Progress | None = None
        self.unit = "rows"
        self.units = 0
        """Rows or tokens since `since`."""
        self.since = self.logged = 0.0
        """When the speed was shown last, and when a line was logged last."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar; where a training is resumed, at the place from which it goes on."""
        assert isinstance(pl_module, BaseModule)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description:<6}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[place]} · loss {task.fields[loss]}"),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("· left"),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            # Drawing takes a millisecond: at rich's ten times a second 1% of training time.
            refresh_per_second=2,
        )
        done, total = self._progress(trainer, pl_module)
        fields: dict[str, Any] = {
            "place": self._place(trainer, pl_module),
            "loss": "–",
            "speed": "",
        }
        self.task = self.bar.add_task(self.label, total=total, **fields)
        self.bar.update(self.task, completed=done)
        self.bar.start()
        self.units, self.since = 0, time.monotonic()
        self.logged = self.since

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Moves the bar each time the training loss was read from the device."""
        tokens = token_count(batch[0])
        self.unit = "tokens" if tokens else "rows"
        self.units += tokens or row_count(batch[0])
        if (batch_idx + 1) % LOSS_READ_INTERVAL == 0:
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the bar to the end of the epoch."""
        self._show(trainer, pl_module)

    def _progress(self, trainer: Trainer, module: BaseModule) -> tuple[float, int | None]:
        """How far training is, and its length: in steps, or in epochs."""
        if trainer.max_steps != -1:
            return trainer.global_step, trainer.max_steps
        return module.epochs_done, trainer.max_epochs

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, BaseModule)
        if self.bar is None or module.train_loss is None:
            return
        now = time.monotonic()
        rate = self.units * trainer.world_size / max(now - self.since, 1e-9)
        speed = f"{rate:,.0f} {self.unit}/s"
        self.units, self.since = 0, now
        fields: dict[str, Any] = {"loss": f"{module.train_loss:.4g}", "speed": speed}
        fields["place"] = self._place(trainer, module)
        done, _ = self._progress(trainer, module)
        self.bar.update(self.task, completed=done, **fields)
        if now - self.logged >= QUIET:
            loss = f"train/loss {module.train_loss:.6g}  {speed}"
            log.info("%s %s  %s", self._name(module), self._place(trainer, module), loss)
            self.logged = now

    def _name(self, module: BaseModule) -> str:
        return module.prefix.rstrip("/") or self.label

    def _place(self, trainer: Trainer, module: BaseModule) -> str:
        """How far training is, in words: `epoch 2/4` or `step 120/500`."""
        done, total = self._progress(trainer, module)
        return f"{'step' if trainer.max_steps != -1 else 'epoch'} {round(done, 3):.10g}/{total}"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the place and the validation metrics in one line."""
        assert isinstance(pl_module, BaseModule)
        values = {
            name.removeprefix(pl_module.prefix): float(value)
            for name, value in trainer.logged_metrics.items()
            if name.startswith(f"{pl_module.prefix}val/")
        }
        metrics = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
        log.info("%s %s  %s", self._name(pl_module), self._place(trainer, pl_module), metrics)
        self.logged = time.monotonic()

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
