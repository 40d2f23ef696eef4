"""Generates texts during training, every so many steps, and logs their metrics."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lab.config.generate import Generate
from lora_lab.data.language import Language
from lora_lab.data.prompts import prompts
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.generation import generate
from lora_lab.training.modules import BaseModule


class GenerationCallback(Callback):
    """Logs `generate/…` before the first step and after every `every_n_steps` optimizer steps.

    The prompts are always the same, of the validation set. The texts themselves are not kept.
    `before_generating` is called each time: a clock of steps pauses then.
    """

    def __init__(
        self,
        settings: Generate,
        data: Language,
        tracking: Tracking,
        before_generating: Callable[[], None],
    ):
        assert settings.every_n_steps is not None
        self.settings, self.interval = settings, settings.every_n_steps
        self.data, self.tracking = data, tracking
        self.before_generating = before_generating
        self.prompts = prompts(data, "val", settings.step_rows or settings.rows)
        self.step = 0
        """The step after which texts were generated last, or at which training went on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates by the model as it is before the first step."""
        self.step = trainer.global_step
        if not self.step:
            self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Generates after a step where it is due."""
        step = trainer.global_step
        if step % self.interval == 0 and step != self.step:  # micro-batches share a step
            self.step = step
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BaseModule)
        self.before_generating()
        arguments = self.data, self.prompts, self.settings
        _, metrics = generate(trainer, pl_module.model, *arguments)
        row = {f"generate/{name}": value for name, value in metrics.items()}
        self.tracking.log({**row, "epoch": float(pl_module.epochs_done)}, trainer.global_step)
