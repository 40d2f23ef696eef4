"""The loop over batches: Lightning's, with validation by steps, and resumed within an epoch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler


class TrainingLoop(_TrainingEpochLoop):
    """Lightning's loop over an epoch's batches, which decides otherwise when to validate.

    Lightning counts batches, and does not validate where training ends between two validations.
    Here it is after each `interval` optimizer steps, whatever is accumulated and wherever epochs
    end; with None, after each `check_val_every_n_epoch` epochs. An `interval` below 1 is a share of
    an epoch's steps. In any case it is after the last step.

    Where a training is resumed within an epoch, Lightning reads the epoch's data from its start.
    Here the batches that are done are skipped. The sampler, of data/module.py, leaves them out.
    """

    def __init__(self, trainer: pl.Trainer, interval: float | None):
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        self.interval = interval
        self.steps_seen = 0
        """The number of optimizer steps when validation was last considered."""
        self.batches_to_skip = 0
        """The batches that are done of the epoch within which a training is resumed."""
        self.before_step: Callable[[], None] | None = None
        """Called before the first batch of each optimizer step is read.

        What came before is complete by then: the step, its validation, and the rows of both.
        """

    def reset(self) -> None:
        """Begins an epoch, at its first batch that is not done. Lightning's hook."""
        super().reset()
        if self.batches_to_skip:
            loader: Any = self.trainer.train_dataloader
            loader.sampler.skip(self.batches_to_skip)
            self.batch_progress.current.increment_by(self.batches_to_skip)
            self.batches_to_skip = 0

    def advance(self, data_fetcher: Any) -> None:
        """Trains on the next batch. Lightning's hook."""
        done = self.batch_progress.current.ready
        if self.before_step and done % self.trainer.accumulate_grad_batches == 0:
            self.before_step()
        super().advance(data_fetcher)

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        """Whether to validate now; Lightning asks after each batch."""
        trainer = self.trainer
        has_stepped, self.steps_seen = self.global_step != self.steps_seen, self.global_step
        ends_epoch, epoch = self._num_ready_batches_reached(), trainer.current_epoch + 1
        if not trainer.enable_validation:
            return False
        if self._is_last_step(ends_epoch, epoch):
            return True
        if self.interval is not None:
            return has_stepped and self.global_step % self._steps_between() == 0
        epochs = trainer.check_val_every_n_epoch
        return ends_epoch and epochs is not None and epoch % epochs == 0

    def _is_last_step(self, ends_epoch: bool, epoch: int) -> bool:
        if self.max_steps != -1:
            return self.global_step >= self.max_steps
        return ends_epoch and epoch == self.trainer.max_epochs

    def _steps_between(self) -> int:
        """Optimizer steps from one validation to the next."""
        assert self.interval is not None
        if self.interval >= 1:
            return int(self.interval)
        batches, per_step = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        return max(1, int(ceil(batches / per_step) * self.interval))


def trainer_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Lightning's Trainer for those of the config.

    Where `max_steps` is set, `max_epochs` does not count: Lightning would end at the first of them.
    """
    counted_here = ("val_check_interval", "log_every_n_steps")
    arguments = {key: value for key, value in settings.items() if key not in counted_here}
    if arguments.get("max_steps", -1) != -1:
        arguments["max_epochs"] = -1
    return arguments


NO_OPERATION = nullcontext()


class Unprofiled(PassThroughProfiler):
    """Lightning's default of no profiler, without its cost.

    Lightning wraps some 35 hooks a step in `profile`, by default a generator of 0.9 µs each. One
    context that does nothing takes 0.2 µs, which saves 7% of Lightning's overhead.
    """

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # pyright: ignore
        """A context that does nothing."""
        return NO_OPERATION
