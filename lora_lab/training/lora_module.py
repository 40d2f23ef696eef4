"""The LightningModule of training adapters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lora_lab.adapters import attached, parameter_groups
from lora_lab.adapters.adalora import add_penalty_gradients
from lora_lab.config.lora import Restarts
from lora_lab.training.modules import BaseModule
from lora_lab.training.schedule import jagged


class LoRAModule(BaseModule):
    """Trains the adapters on a model; its base stays frozen.

    Base weights take no gradient and are not in the optimizer; running statistics do not change.
    Weight decay pulls the adapted model toward the base, so it is 0 unless the config sets it.
    `lr_ratio` is LoRA+'s: the learning rate of the factor that starts at zero (B; of an embedding,
    A) divided by that of the other (Hayou et al. 2024). `orthogonality` is the weight of AdaLoRA's
    penalty, of which the gradients are added and the losses that are logged know nothing. After
    each of ReLoRA's `restarts` the learning rate rises from 0 again.
    """

    def __init__(
        self,
        *arguments: Any,
        lr_ratio: float = 1.0,
        orthogonality: float = 0.0,
        restarts: Restarts | None = None,
        **settings: Any,
    ):
        """`arguments` and `settings` are BaseModule's."""
        super().__init__(*arguments, **settings)
        self.lr_ratio, self.orthogonality, self.restarts = lr_ratio, orthogonality, restarts

    @property
    def has_constant_rate(self) -> bool:
        """As BaseModule's, without restarts."""
        return self.restarts is None and super().has_constant_rate

    def lr_factor(self, steps: int) -> Callable[[int], float]:
        """As BaseModule's, with a warm-up after each restart."""
        factor = super().lr_factor(steps)
        if self.restarts is None:
            return factor
        return partial(jagged, factor, *self.restarts.lengths(steps))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the penalty's gradients once they are those of one mean."""
        super().on_before_optimizer_step(optimizer)
        if self.orthogonality:
            for adapter in attached(self.model).values():
                add_penalty_gradients(adapter.B, adapter.A, self.orthogonality)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The adapters' parameters: one group, or two where LoRA+ gives B another rate."""
        decay = self.optimizer.arguments.get("weight_decay", 0.0)
        return parameter_groups(self.model, self.optimizer.lr, self.lr_ratio, decay)
