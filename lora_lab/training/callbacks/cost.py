"""Measures what a training costs: the time of a step, its FLOPs, and the peak memory."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lab.adapters.model_call import row_count, token_count
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.spectra import SpectraCallback
from lora_lab.training.flops import flop_counter
from lora_lab.training.modules import Batch
from lora_lab.training.peak_memory import PeakMemory
from lora_lab.training.step_clock import StepClock


class Cost(Callback):
    """Measures seconds, rows, tokens and FLOPs of a step, and the peak memory of training.

    Seconds are the median over all windows of steps between two validations, ends of an epoch,
    measurements of ΔW or checkpoints, without these and without the first five steps (`StepClock`).
    A run that was resumed has those of the process that ended it. FLOPs are those of forward and
    backward of the run's first step, over all its micro-batches and processes. They are counted
    once, and a checkpoint keeps them. Memory is that of the device that takes most (`PeakMemory`).

    It comes after the callbacks that compute something before a batch, as FirstStep, and before
    Checkpoint.
    """

    def __init__(self) -> None:
        self.clock: StepClock | None = None
        """None until training begins."""
        self.memory: PeakMemory | None = None
        self.flops: int | None = None
        """FLOPs of the first step; None until it is done."""
        self.earlier: dict[str, Any] = {}
        """What was measured before, by another process or by the run's pack."""
        self.trainer: Trainer | None = None
        self._batch_flops = 0
        self._counting = ExitStack()
        self._peaks: list[int] = []
        """The peak of the training that has ended, over all processes."""

    def pause_for(self, spectra_callback: SpectraCallback, checkpoint: Checkpoint) -> None:
        """Has the clock pause while ΔW is measured, and while a checkpoint is written."""
        spectra_callback.before_measuring = checkpoint.before_saving = self.pause

    def pause(self) -> None:
        """Ends a window of the clock."""
        if self.clock and self.trainer:
            self.clock.pause(self.trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to measure."""
        device = trainer.strategy.root_device
        self.trainer, self.clock = trainer, StepClock(device, trainer.global_step)
        self.memory = PeakMemory(device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Starts the clock where it does not run; in the first step counts FLOPs."""
        assert self.clock is not None
        if self.flops is None:
            self._count(trainer, pl_module, batch)
        processes = trainer.world_size  # which share each batch
        sizes = row_count(batch[0]) * processes, token_count(batch[0]) * processes
        self.clock.batch(trainer.global_step, *sizes, self._runs(pl_module))

    def _runs(self, module: LightningModule) -> int:
        """How many runs are trained at once."""
        return 1

    def _count(self, trainer: Trainer, module: LightningModule, batch: Batch) -> None:
        """Counts from here to the end of this batch's backward."""
        self._counter = self._counting.enter_context(flop_counter())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the count of a batch."""
        if self.flops is None:
            self._counting.close()
            self._batch_flops += self._counter.get_total_flops()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Notes the FLOPs of the first step once all its micro-batches are done."""
        assert self.clock is not None
        if self.flops is None and trainer.global_step > self.clock.first_step:
            self.flops = _over_processes(self._batch_flops, "sum", trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pauses the clock."""
        self.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pauses the clock."""
        self.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the measurement."""
        assert self.memory is not None
        self.pause()
        self._peaks = [_over_processes(self.memory.bytes, "max", trainer, pl_module)]

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the count of a batch that failed."""
        self._counting.close()

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured so far: metrics, whose names begin with `cost/`, and how they came.

        `steps` were timed, in a pass of `runs` runs on `processes` devices; the memory is that of
        `memory_of`. Empty before any step was timed.
        """
        speed = self.clock.speed if self.clock else None
        if speed is None or self.memory is None or self.trainer is None:
            return self.earlier
        seconds = speed.seconds_per_step
        costs: dict[str, Any] = {"cost/seconds_per_step": seconds}
        costs["cost/rows_per_second"] = speed.rows_per_step / seconds
        if speed.tokens_per_step:
            costs["cost/tokens_per_second"] = speed.tokens_per_step / seconds
        if self.flops:
            costs["cost/flops_per_step"] = self.flops
        costs["cost/peak_memory_bytes"] = self._peaks[0] if self._peaks else self.memory.bytes
        about = {"steps": speed.steps, "runs": speed.runs, "processes": self.trainer.world_size}
        return {**costs, **about, "memory_of": self.memory.of}

    def state_dict(self) -> dict[str, Any]:
        """The FLOPs, and what was measured so far."""
        return {"flops": self.flops, "measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint knows: its times count where this process takes no step."""
        self.flops, self.earlier = state_dict["flops"], state_dict["measured"]


def _over_processes(number: int, how: str, trainer: Trainer, module: LightningModule) -> int:
    """The `sum` or the `max` of a number over the run's processes."""
    if trainer.world_size == 1:
        return number
    here = torch.tensor(number, dtype=torch.float64, device=module.device)
    reduced: Any = trainer.strategy.reduce(here, reduce_op=how)
    return int(reduced.item())
