"""What the first step sees and does: the factors' gradient beside the dense one; its descent."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from lora_lab.analysis.updates import Updates
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule, Batch


class FirstStep(pl.Callback):
    """Logs the two figures that the scaling of an adapter decides.

    `first_step/gradient_ratio` is ‖∇_Z‖ / ‖G‖, `first_step/descent` ⟨−G, ΔW⟩ / (η Σ‖G_o‖): Z are
    the factors (LoRA-XS: the cores) that start at zero, G = ∂L/∂W the dense gradients of the first
    batch with rows G_o, ΔW what the first step made, η the learning rate of Z; sums are over all
    sites.
    """

    def __init__(self, updates: Updates, tracking: Tracking):
        self.updates, self.tracking = updates, tracking
        self.dense: dict[str, Tensor] = {}
        self.ratio = self.lr = 0.0
        self.done = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Takes both gradients, without a trace in the model or in dropout's stream."""
        if self.dense or trainer.global_step:
            return
        assert isinstance(pl_module, BaseModule)
        sites = self.updates.sites
        made = self.updates.adapters_by_site
        weights = {site: pl_module.model.get_parameter(sites[site].key) for site in sites}
        factors = [
            made[site].core
            if made[site].core is not None
            else getattr(made[site], made[site].zero_factor)
            for site in sites
        ]
        x, y = batch
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.random.fork_rng(), trainer.precision_plugin.train_step_context():
            loss = pl_module.task.loss(pl_module.model(x), y)
            asked = [*weights.values(), *factors]
            found = torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True)
        for weight in weights.values():
            weight.requires_grad_(False)
        found = tuple(trainer.strategy.reduce(gradient, reduce_op="mean") for gradient in found)
        dense, low = found[: len(weights)], found[len(weights) :]
        self.dense = {s: self.updates.as_matrix(s, G) for s, G in zip(sites, dense, strict=True)}
        self.ratio = _norm(low) / _norm(tuple(self.dense.values()))
        groups = trainer.optimizers[0].param_groups  # LoRA+ has two
        self.lr = next(g["lr"] for g in groups if any(p is factors[0] for p in g["params"]))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Logs both once the step is taken."""
        if trainer.global_step != 1 or self.done:
            return
        self.done = True
        descent = -sum(
            (G * self.updates.delta_matrix(s)).sum().item() for s, G in self.dense.items()
        )
        rows = sum(torch.linalg.vector_norm(G, dim=1).sum().item() for G in self.dense.values())
        row = {"gradient_ratio": self.ratio}
        if self.lr and rows:  # not in a warm-up's first step, which goes nowhere
            row["descent"] = descent / (self.lr * rows)
        self.tracking.log({f"first_step/{name}": value for name, value in row.items()}, 1)


def _norm(tensors: tuple[Tensor, ...]) -> float:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm().item()
