"""The LightningModule of a pack: many LoRA runs over one base, each trained as if by itself."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lora_lab.adapters.pack import Pack
from lora_lab.adapters.stacks import unstack
from lora_lab.data import Data
from lora_lab.packing.clipping import clip_gradients
from lora_lab.packing.member import Member
from lora_lab.packing.optimizer import PackedOptimizer, optimizer_settings
from lora_lab.packing.recorded_step import RecordedStep
from lora_lab.training.cuts import PackValidationModule
from lora_lab.training.modules import LOSS_READ_INTERVAL, Batch, DivergedError
from lora_lab.training.pack_losses import PackLosses

log = logging.getLogger(__name__)


class PackedModule(PackValidationModule):
    """Trains the runs of `members` together over one base `model`, each with its own adapters.

    A step is a forward and backward in passes of `runs_per_pass` runs (a Pack each), and one step
    of an optimizer over the stacked parameters of all of them. Learning rates, clipping, metrics
    and logs are each run's own. A run that diverges fails, and the others go on without it.
    """

    def __init__(self, model: nn.Module, data: Data, members: Sequence[Member]):
        super().__init__(model, data, members[0].module.optimizer)
        # A step has as many losses as runs, and gradients are clipped and rates set run by run.
        self.automatic_optimization = False
        self.members = sorted(members, key=Member.sort_key)
        self.run_modules = nn.ModuleList(member.module for member in self.members)
        self.runs_per_pass = len(members)
        self.recorded_steps: list[RecordedStep] = []
        """For each pack of `packs`, its losses and gradients."""
        self.clipping: tuple[float, str] | None = None
        """The most that a run's gradient may be, and by what: `norm` or `value`."""
        self.batches_per_step = 1
        """The micro-batches of one optimizer step; the last step of an epoch may have fewer."""
        self.micro_batches: list[Batch] = []
        """Those of the coming step, so far."""
        self.known_losses = PackLosses(data.known) if data.known else None
        """The losses on what the base knew; None where forgetting is not measured."""

    def stack_runs(self, members: Sequence[Member]) -> Pack:
        """One pass of some of the runs, with their parameters stacked, in this module's mode."""
        settings = [optimizer_settings(member.module) for member in members]
        adapters, in_full = [m.adapters for m in members], [m.in_full for m in members]
        return Pack(self.model, adapters, settings, in_full).train(self.training)

    def _build_passes(self) -> None:
        """Stacks the runs' parameters in packs of `runs_per_pass` runs."""
        first, n = range(0, len(self.members), self.runs_per_pass), self.runs_per_pass
        # Lightning validates in inference mode. Parameters made in it could never be trained.
        with torch.inference_mode(False):
            self.packs = [self.stack_runs(self.members[i : i + n]) for i in first]
        loss_sum = self.members[0].module.training_loss_sum
        self.recorded_steps = [RecordedStep(pack, loss_sum) for pack in self.packs]

    def _rebuild_passes(self) -> None:
        """Stacks the runs anew after their number, or that of a pass, has changed."""
        self._build_passes()
        if self.trainer.optimizers:
            modules = [member.module for member in self.members]
            self.packed_optimizer.restack(modules, self.packs, self.global_step)

    def unstack_runs(self) -> None:
        """Gives each run tensors of its own in place of views of the stacks."""
        for member in self.members:
            unstack({**member.adapters, **member.in_full})

    def setup(self, stage: str) -> None:
        """Gives each run's module the shared Trainer, from which it reads step and epoch."""
        for member in self.members:
            member.module.trainer = self.trainer
        if stage == "fit":
            # Lightning refuses it as an argument where a module steps its optimizer itself. Set by
            # now it decides which batches end a step, and how many steps an epoch has.
            self.trainer.accumulate_grad_batches = self.batches_per_step

    def teardown(self, stage: str) -> None:
        """Splits stacked parameters into one tensor a run.

        Whatever comes next moves each run's weights to its device by themselves. A view that is
        moved is a copy, and no longer part of its stack: passes are built anew when needed.
        """
        self.packs, self.recorded_steps = [], []
        self.unstack_runs()

    def on_validation_start(self) -> None:
        """Turns dropout off in the passes, which Lightning does not know: they are a plain list.

        Before the first step they are built here.
        """
        if not self.packs:
            self._build_passes()
        for pack in self.packs:
            pack.eval()

    def on_validation_end(self) -> None:
        """Turns dropout on again: training follows."""
        for pack in self.packs:
            pack.train()

    def configure_optimizers(self) -> Any:
        """One torch optimizer for all runs; `training_step` sets each run's learning rate."""
        self._build_passes()
        total_steps = int(self.trainer.estimated_stepping_batches)
        modules = [member.module for member in self.members]
        self.packed_optimizer = PackedOptimizer(modules, self.packs, total_steps)
        return self.packed_optimizer.torch_optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # pyright: ignore
        """Trains all runs one step, with the last of its micro-batches."""
        self.micro_batches.append(batch)
        if self.trainer.fit_loop.epoch_loop._should_accumulate():
            return
        optimizer: Any = self.optimizers()
        counts = [self.task.count(targets) for _, targets in self.micro_batches]
        self._losses += self._backward(sum(counts))  # pyright: ignore
        self._counts += counts
        self.micro_batches.clear()
        self.packed_optimizer.set_learning_rates(self.global_step)
        if self.clipping is not None:
            clip_gradients(self.packs, *self.clipping)
        optimizer.step()
        if len(self._losses) >= LOSS_READ_INTERVAL or self.trainer.is_last_batch:
            self.read_new_losses()
        step_log = self.members[0].trial.step_log  # all runs have one interval
        if step_log and self.global_step % step_log.interval == 0:
            self._log_steps()

    def _log_steps(self) -> None:
        """Logs each run's mean training loss since the row before, and its learning rate."""
        self.read_new_losses()
        for member in self.members:
            step_log = member.trial.step_log
            assert step_log is not None
            step_log.lr = self.packed_optimizer.learning_rate(member.module)
            step_log.on_train_batch_end(self.trainer, member.module)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the gradients as they are: `_backward` makes them those of one mean."""

    def _backward(self, count: Tensor) -> Sequence[Tensor]:
        """The summed losses (runs,) of each micro-batch of a step.

        The parameters' `grad` is the gradient of the step's mean loss, the sums over `count`. Out
        of memory it tries again with passes of half as many runs.
        """
        while True:
            try:
                passes = [self._backward_of_pass(step, count) for step in self.recorded_steps]
                return torch.cat(passes, 1).unbind()
            except RuntimeError as error:  # torch.OutOfMemoryError is one, too
                if self.runs_per_pass == 1 or not is_out_of_memory(error):
                    raise
            # Outside of `except`, whose traceback would keep the failed pass's tensors in memory.
            self.runs_per_pass = -(-self.runs_per_pass // 2)
            log.warning("out of memory: going on with %d runs at once", self.runs_per_pass)
            torch.cuda.empty_cache()  # does nothing where no GPU is in use
            self._rebuild_passes()

    def _backward_of_pass(self, step: RecordedStep, count: Tensor) -> Tensor:
        """The summed losses of the runs of one pass (micro-batches, runs of it)."""
        sums = [step(*batch, add=i > 0) for i, batch in enumerate(self.micro_batches)]
        divisor = count.clamp(min=1)
        for parameter in step.trained:
            if parameter.grad is not None:
                parameter.grad /= divisor
        return torch.stack(sums)

    def read_new_losses(self) -> None:
        """Gives each run's module its losses that are still on the device.

        Fails the runs whose losses are not finite.
        """
        if not self._losses:
            return
        # (batches, 1 + runs): counts, and each run's summed losses
        new = torch.column_stack([torch.stack(self._counts), torch.stack(self._losses)])
        new = new.cpu().double()
        self._losses.clear()
        self._counts.clear()
        losses = new[:, 1:] / new[:, :1].clamp(min=1)  # (batches, runs)
        are_finite = losses.isfinite().all(0).tolist()
        self.train_loss = losses[-1].nanmedian().item()
        for i, member in enumerate(list(self.members)):  # a copy: a run that fails leaves the list
            member.module.add_losses(new[:, [1 + i, 0]].T)
            if not are_finite[i]:
                try:
                    member.module.check_losses(losses[:, i])
                except DivergedError as error:
                    self.fail(member, error)

    def fail(self, member: Member, error: Exception) -> None:
        """Ends one run as failed; the others go on. Raises its error if no run is left."""
        member.fail(error)
        self._remove(member)
        if not self.members:
            raise error

    @property
    def stopped(self) -> list[Member]:
        """The runs whose early stopping says that their training is to end."""
        return [member for member in self.members if member.trial.selection.ends_training]

    def end(self, member: Member) -> None:
        """Ends one run's training with the weights that it has; the others go on."""
        member.module.final_step = self.step_and_epoch()
        unstack({**member.adapters, **member.in_full})  # or its views would keep the old stacks
        self._remove(member)
        self.trainer.should_stop |= not self.members

    def on_train_start(self) -> None:
        """Ends the runs that were interrupted after early stopping had ended their training."""
        for member in self.stopped:
            self.end(member)

    def _remove(self, member: Member) -> None:
        """Takes a run, and its numbers, out of what the others go on with."""
        i = self.members.index(member)
        del self.members[i]
        remaining = [j for j in range(len(self.members) + 1) if j != i]
        self._losses = [losses[remaining] for losses in self._losses]
        if self.members:
            self._rebuild_passes()

    def on_train_epoch_end(self) -> None:
        """Logs each run's mean training loss of the epoch, and forgets it."""
        self.read_new_losses()
        for member in self.members:
            self.log_epoch_loss(member)
            member.module.epoch_totals = torch.zeros_like(member.module.epoch_totals)

    def log_epoch_loss(self, member: Member) -> None:
        """Logs a run's mean training loss of the epoch, of what was read of it."""
        self._log_row(member, {"train/loss": member.module.epoch_loss.item()})

    def on_validation_epoch_start(self) -> None:
        """Starts the sums at zero."""
        super().on_validation_epoch_start()
        if self.known_losses is not None:
            self.known_losses.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to each run's validation loss, or to that on what the base knew."""
        losses = self.known_losses if dataloader_idx else self.val_losses
        if losses is not None:
            modules = [member.module for member in self.members]
            measured = [m.forgetting for m in modules] if dataloader_idx else modules
            losses.add(self.packs, batch, partial(_update_metrics, measured))

    def on_validation_epoch_end(self) -> None:
        """Logs each run's validation loss and metrics; a run whose loss is not finite fails."""
        known = self.known_losses.means() if self.known_losses and self.known_losses.sums else None
        means = self.val_losses.means()
        for i, (member, mean) in enumerate(zip(list(self.members), means, strict=True)):
            row = _metrics_row("val/", member.module, mean)
            if known is not None:
                row |= _metrics_row("forget/", member.module.forgetting, known[i])
            member.module.reset_metrics()
            try:
                member.module.check_val_loss(mean)
                self._log_row(member, row)
            except DivergedError as error:
                self.fail(member, error)
                continue
            if self.trainer.state.fn == TrainerFn.FITTING:
                member.trial.selection.observe(member.module, row, **self.step_and_epoch())
        self.log("val/loss of the runs, median", means.nanmedian())

    def _log_row(self, member: Member, row: dict[str, float]) -> None:
        now = self.step_and_epoch()
        member.trial.tracking.log({**row, "epoch": now["epoch"]}, int(now["step"]))


def _update_metrics(
    measured: Sequence[Any], first_run: int, outputs: Tensor, targets: Tensor
) -> None:
    """Updates each run's metrics with its outputs of a batch, from the run `first_run` on.

    `measured` are all runs' modules, or their `forgetting`.
    """
    for one, output in zip(measured[first_run:], outputs, strict=False):
        for metric in one.metrics.values():
            metric.update(output, targets)


def _metrics_row(prefix: str, measured: Any, loss: Tensor) -> dict[str, float]:
    """The loss and the metrics of one run, by the names under which they are logged."""
    metrics = {name: metric.compute() for name, metric in measured.metrics.items()}
    row = {"loss": loss, **measured.metrics_of_loss(loss), **metrics}
    return {f"{prefix}{name}": value.item() for name, value in row.items()}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that a device, or the machine, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
