"""ReLoRA's restarts: in training, the factors are kept as they are and new ones begin."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lora_lab.adapters import Adapter
from lora_lab.adapters.relora import ReLoRA
from lora_lab.config.lora import Restarts
from lora_lab.config.schema import ConfigError
from lora_lab.seeding import generator


class MergeAndRestart(Callback):
    """Ends a round of ReLoRA every so many steps (Lialin et al. 2023, algorithm 1).

    `adapters` are those of all sites. The factors that trained are kept, and new ones drawn by a
    generator of (seed, site, r, number of the restart). The moments that the optimizer holds of A
    and B are pruned by a share (`prune`): those of the factors before would turn the new ones to
    where they were. The learning rate is LoRAModule's.

    A last round that would begin with the last step does not.
    """

    def __init__(self, adapters: Mapping[str, Adapter], schedule: Restarts, seed: int):
        self.adapters, self.schedule, self.seed = adapters, schedule, seed
        self.every = self.steps = 0
        """The steps of a round, and those of the training."""
        self.step = 0
        """The last step that was taken note of."""

    def set_length(self, steps: int) -> None:
        """Lays the rounds over a training's steps. Raises ConfigError where they do not fit."""
        self.every, warmup = self.schedule.lengths(steps)
        self.steps = steps
        if self.every >= steps:
            raise ConfigError(
                f"adapter.restarts.every={self.schedule.every:g}: must be less than the run's "
                f"{steps} steps, after which there is nothing to begin anew"
            )
        if warmup >= self.every:
            raise ConfigError(
                f"adapter.restarts.warmup={self.schedule.warmup:g}: must be less than the "
                f"{self.every} steps from one restart to the next"
            )

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Ends a round, if it is time to."""
        self.step = step
        if step % self.every or step == self.steps:
            return
        for site, adapter in self.adapters.items():
            assert isinstance(adapter.form, ReLoRA)
            rng = generator(self.seed, site, adapter.r, step // self.every)
            adapter.form.restart(adapter.form_tensors(), rng)
            for parameter in (adapter.A, adapter.B):
                state = optimizer.state[parameter].values()
                tensors = [value for value in state if isinstance(value, Tensor)]
                moments = [tensor for tensor in tensors if tensor.shape == parameter.shape]
                prune(moments, self.schedule.prune)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the rounds."""
        self.set_length(int(trainer.estimated_stepping_batches))

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Acts after each optimizer step."""
        if trainer.global_step != self.step:  # several micro-batches end at the same step
            self.after_step(trainer.global_step, trainer.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to know."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint knows."""
        self.step = state_dict["step"]


@torch.no_grad()
def prune(moments: Sequence[Tensor], share: float) -> None:
    """Sets a share of the numbers of all `moments` to zero, where the first is of least magnitude.

    The authors' code prunes each moment by its own magnitude. Adam's first moment of a number is
    then kept where its second is zero, and the next step, m / √v, has no bound.
    """
    for first in moments[:1]:
        pruned = first.abs().flatten().argsort(stable=True)[: round(share * first.numel())]
        for moment in moments:
            moment.view(-1)[pruned] = 0
