"""AdaLoRA's allocation: in training, the least important triplets of all sites are pruned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lora_lab.adapters import Adapter
from lora_lab.config.components import warmup_steps
from lora_lab.config.lora import Allocation
from lora_lab.config.schema import ConfigError
from lora_lab.tracking.tracking import Tracking


def final_triplets(budget: float | None, ranks: Sequence[int]) -> int:
    """How many triplets sites of these ranks have at the end together: `budget` for each site.

    None is two thirds of those at the start, as in the paper; at least one.
    """
    return round(budget * len(ranks)) if budget else max(1, round(2 / 3 * sum(ranks)))


class RankAllocation(Callback):
    """Prunes the triplets of AdaLoRA's adapters down to a budget (Zhang et al. 2023, section 3).

    `adapters` are those of all sites, which share a budget (`final_triplets`). The sensitivity of
    a number w at a step is |w · ∂L/∂w|. Its importance is the running mean of the sensitivity (with
    β₁) times that of how far the sensitivity is from its mean (with β₂). The importance of a
    triplet is that of its λ, plus the means over its column of P and over its row of Q. Where it
    is least, λ is set to zero. That λ trains on, and can be kept at the next allocation.

    After `warmup` steps the number of triplets falls as a cubic, each `interval` steps, and is at
    the budget `final` steps before the end. From there on the pruned ones stay zero.

    As in the authors' code and in PEFT, w is the number after the step, and the gradient is that
    which the optimizer has seen.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        budget: float | None,
        schedule: Allocation,
        tracking: Tracking | None = None,
    ):
        self.adapters, self.schedule, self.tracking = adapters, schedule, tracking
        ranks = [adapter.r for adapter in adapters.values()]
        self.triplets, self.target = sum(ranks), final_triplets(budget, ranks)
        self.warmup = self.last = 0
        """The last step before triplets are pruned, and that of the last allocation."""
        self.interval = 1
        self.step = 0
        """The last step that was taken note of."""
        self.is_logged = False
        self.sensitivity: dict[str, Tensor] = {}
        """By site and tensor, as `body.0/A`: the running mean of |w · ∂L/∂w|, in its shape."""
        self.uncertainty: dict[str, Tensor] = {}
        """The running mean of how far |w · ∂L/∂w| is from its own."""
        self.kept: dict[str, Tensor] = {}
        """By site, which triplets (r,) the last allocation kept; {} before the first."""

    def set_length(self, steps: int) -> None:
        """Lays the schedule over a training's steps. Raises ConfigError where it has no room."""
        schedule = self.schedule
        self.warmup = int(warmup_steps(schedule.warmup, steps))
        self.last = steps - int(warmup_steps(schedule.final, steps))
        self.interval = max(1, int(warmup_steps(schedule.interval, steps)))
        if self.warmup >= self.last:
            raise ConfigError(
                f"adapter.allocation: warmup={schedule.warmup:g} and final={schedule.final:g} "
                f"leave no step of the run's {steps} between them in which ranks could be allocated"
            )

    def budget(self, step: int) -> int:
        """How many triplets are kept after `step`."""
        done = (step - self.warmup) / (self.last - self.warmup)
        left = 1 - min(max(done, 0.0), 1.0)
        return int((self.triplets - self.target) * left**3 + self.target)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Takes note of a step's gradients, and prunes if it is time to."""
        self.step = step
        if step < self.last:
            self._observe()
        is_due = self.warmup < step < self.last and step % self.interval == 0
        if is_due or step == self.last:
            self._allocate(self.budget(step))
        if is_due or step >= self.last:
            for site, kept in self.kept.items():
                values = self.adapters[site].get_parameter("lambdas")
                values.masked_fill_(~kept.to(values.device), 0.0)

    def _observe(self) -> None:
        """Updates the running means of all numbers by their gradients."""
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        for site, adapter in self.adapters.items():
            for name, w in adapter.form_tensors().items():
                key, gradient = f"{site}/{name}", torch.zeros_like(w) if w.grad is None else w.grad
                new, zero = (w * gradient).abs(), torch.zeros_like(w)
                mean = beta1 * self.sensitivity.get(key, zero).to(w.device) + (1 - beta1) * new
                spread = beta2 * self.uncertainty.get(key, zero).to(w.device)
                self.sensitivity[key] = mean
                self.uncertainty[key] = spread + (1 - beta2) * (new - mean).abs()

    def importance(self, site: str) -> Tensor:
        """The importance of a site's triplets (r,)."""
        A, B, of_values = (
            self.sensitivity[f"{site}/{name}"] * self.uncertainty[f"{site}/{name}"]
            for name in ("A", "B", "lambdas")
        )
        return of_values + A.mean(1) + B.mean(0)

    def _allocate(self, count: int) -> None:
        """Keeps the `count` most important triplets of all sites together."""
        order = torch.cat([self.importance(site) for site in self.adapters]).argsort(
            descending=True, stable=True
        )
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept[order[:count]] = True
        ranks = [adapter.r for adapter in self.adapters.values()]
        self.kept = dict(zip(self.adapters, kept.split(ranks), strict=True))

    def ranks(self) -> dict[str, int]:
        """By site, how many triplets are not pruned."""
        whole = {site: adapter.r for site, adapter in self.adapters.items()}
        return whole | {site: int(kept.sum()) for site, kept in self.kept.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the schedule."""
        self.set_length(int(trainer.estimated_stepping_batches))

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Acts after each optimizer step, whose gradients are still there."""
        if trainer.global_step != self.step:  # several micro-batches end at the same step
            self.after_step(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the rank of each site, once."""
        if self.tracking and not self.is_logged:
            row = {f"spectra/{site}/allocated_rank": rank for site, rank in self.ranks().items()}
            self.tracking.log(row, trainer.global_step)
        self.is_logged = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to know."""
        names = ("step", "is_logged", "sensitivity", "uncertainty", "kept")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint knows."""
        for name, value in state_dict.items():
            setattr(self, name, value)
