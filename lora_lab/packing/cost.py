"""Measures what a pack's training costs, and gives each of its runs its share."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from lora_lab.packing.member import Member
from lora_lab.packing.module import PackedModule
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.cost import Cost
from lora_lab.training.flops import flop_counter
from lora_lab.training.modules import Batch


class PackCost(Cost):
    """Measures a pack as `Cost` measures a run, for the `cost` of each run's trial.

    A run's seconds are the pack's, divided by the runs that were trained at once. The peak memory
    is the pack's, undivided. FLOPs are those of the run by itself: its own model is computed once
    more on the first step's batches, without a step of the optimizer. In the pass of a pack the
    runs share a part of the base's, so that theirs add up to fewer.
    """

    def __init__(self, members: Sequence[Member], checkpoint: Checkpoint):
        super().__init__()
        self.flops_by_run = dict.fromkeys(members, 0)
        """Those of the first step's batches so far."""
        for member in members:
            self.pause_for(member.trial.spectra_callback, checkpoint)
        checkpoint.before_saving = self._pause_and_share

    def _runs(self, module: pl.LightningModule) -> int:
        assert isinstance(module, PackedModule)
        return len(module.members)

    def _count(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> None:
        """Adds the FLOPs of a batch to those of each run. Runs of equal shapes are counted once."""
        assert isinstance(module, PackedModule)
        by_shapes: dict[Any, int] = {}
        for member in module.members:
            trained = [p.shape for p in member.module.parameters() if p.requires_grad]
            if (shapes := tuple(trained)) not in by_shapes:
                by_shapes[shapes] = _flops_alone(member, batch, trainer)
            self.flops_by_run[member] += by_shapes[shapes]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Gives each run its FLOPs once all micro-batches of the first step are done."""
        super().on_train_batch_end(trainer, pl_module)
        if self.flops is not None and self.flops_by_run:
            for member, flops in self.flops_by_run.items():
                if member.trial.cost.flops is None:  # else it was resumed, and has them
                    member.trial.cost.flops = flops
            self.flops_by_run = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the runs that end here, by early stopping, what was measured so far."""
        assert isinstance(pl_module, PackedModule)
        if pl_module.stopped:
            self._share(pl_module.stopped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the other runs what was measured."""
        super().on_train_end(trainer, pl_module)
        assert isinstance(pl_module, PackedModule)
        self._share(pl_module.members)

    def _pause_and_share(self) -> None:
        """Before a checkpoint, which holds of each run what was measured so far."""
        self.pause()
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, PackedModule)
        self._share(module.members)

    def _share(self, members: Sequence[Member]) -> None:
        if not (measured := self.measured):
            return
        for member in members:
            cost = member.trial.cost
            of_run = {} if cost.flops is None else {"cost/flops_per_step": cost.flops}
            cost.earlier = {**measured, **of_run}


def _flops_alone(member: Member, batch: Batch, trainer: pl.Trainer) -> int:
    """FLOPs of forward and backward of a run's own model; random streams do not move."""
    module, (inputs, targets) = member.module, batch
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    precision = trainer.precision_plugin.train_step_context()
    with flop_counter() as counter, torch.random.fork_rng(), precision:
        loss = module.training_loss_sum(module(inputs), targets)
        # Not autograd.grad, in which torch's counter cannot follow what trains in full.
        loss.backward()
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return counter.get_total_flops()
