"""Compares the first step of LoRA with gradient descent on the full weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lora_lab.adapters import Adapter
from lora_lab.analysis.updates import Updates
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule, Batch


class FirstStep(Callback):
    """Logs two numbers of the first step that depend on the adapter's scaling.

    Z are the factors that start at zero (B; of LoRA-XS the cores), η their learning rate,
    G = ∂L/∂W the dense gradients of the first batch, G_o their rows, ΔW the update after the step.
    Sums and norms are over all sites.

    `first_step/gradient_ratio` is ‖∇_Z‖ / ‖G‖, the size of the factors' gradient over that of the
    dense gradient. `first_step/descent` is ⟨−G, ΔW⟩ / (η Σ‖G_o‖), how far the step goes down the
    loss.
    """

    def __init__(self, updates: Updates, tracking: Tracking):
        self.updates, self.tracking = updates, tracking
        self.dense: dict[str, Tensor] = {}
        self.ratio = self.lr = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Computes both gradients of the first batch; model and random streams do not change."""
        if self.dense or trainer.global_step:
            return
        assert isinstance(pl_module, BaseModule)
        sites = self.updates.sites
        adapters = self.updates.adapters_by_site
        # Not `get_parameter`, which reads W + ΔW.
        parameters = dict(pl_module.model.named_parameters(remove_duplicate=False))
        weights = {site: parameters[sites[site].key] for site in sites}
        factors = [_zero_factor(adapters[site]) for site in sites]
        inputs, targets = batch
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.random.fork_rng(), trainer.precision_plugin.train_step_context():
            loss = pl_module.task.loss(pl_module(inputs), targets)
            gradients = torch.autograd.grad(
                loss, [*weights.values(), *factors], allow_unused=True, materialize_grads=True
            )
        for weight in weights.values():
            weight.requires_grad_(False)
        gradients = tuple(trainer.strategy.reduce(g, reduce_op="mean") for g in gradients)
        dense, factored = gradients[: len(weights)], gradients[len(weights) :]
        self.dense = {s: self.updates.as_matrix(s, G) for s, G in zip(sites, dense, strict=True)}
        self.ratio = _norm(factored) / _norm(tuple(self.dense.values()))
        groups = trainer.optimizers[0].param_groups  # with LoRA+ the factor has its group
        self.lr = next(g["lr"] for g in groups if any(p is factors[0] for p in g["params"]))

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Logs both numbers once the first step is taken."""
        if trainer.global_step != 1 or not self.dense:
            return
        delta_matrix = self.updates.delta_matrix
        descent = -sum((G * delta_matrix(s)).sum().item() for s, G in self.dense.items())
        rows = sum(torch.linalg.vector_norm(G, dim=-1).sum().item() for G in self.dense.values())
        row = {"gradient_ratio": self.ratio}
        if self.lr and rows:  # not in a warm-up's first step, which goes nowhere
            row["descent"] = descent / (self.lr * rows)
        self.tracking.log({f"first_step/{name}": value for name, value in row.items()}, 1)
        self.dense.clear()


def _zero_factor(adapter: Adapter) -> Tensor:
    """The parameter that starts at zero: LoRA-XS's core, else B (of an embedding or MiCA A)."""
    return adapter.core if adapter.core is not None else getattr(adapter, adapter.starts_at_zero)


def _norm(tensors: tuple[Tensor, ...]) -> float:
    """The Frobenius norm of all tensors together."""
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm().item()
