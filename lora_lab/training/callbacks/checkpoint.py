"""Checkpoints from which an interrupted training goes on, bit for bit as if it had not stopped."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lora_lab import adapters
from lora_lab.adapters.files import is_adapter_key
from lora_lab.config.hashes import content_hash
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.base_weights import BaseWeights
from lora_lab.training.loop import TrainingLoop
from lora_lab.training.modules import BaseModule
from lora_lab.training.random_streams import set_streams, streams_of_processes

log = logging.getLogger(__name__)

SHARE = 0.05
"""The largest share of the training time that writing checkpoints may take."""

Place = tuple[int, int]
"""How far a training is: the complete epochs, and the batches done of the one after them."""


class Checkpoint(Callback):
    """Writes a checkpoint between two optimizer steps, once `interval` seconds have passed.

    It is written before the first batch of a step is read. By then the step before is complete: all
    its micro-batches are taken, the validation that comes after it is done, and the rows of both
    are logged; after an epoch's last step the epoch's rows too. An epoch's end is no special case:
    none of the next epoch's batches are done. With `interval` 0 a checkpoint is written at each
    epoch's end, and only there. The end of training counts as an epoch's end. At the end of a run's
    training one is written in any case: what follows it can fail, and begins again from there.

    It holds how many epochs and batches are done, the optimizer, its schedule, the callbacks'
    state, the sums of the training losses, the random streams, all rows logged so far, and the
    weights: of a model with adapters only theirs, with a hash of the `base` they belong to.
    Writing takes at most SHARE of the time, unless `interval` is 0, and but for the last.

    `identity` is the hash of all settings that can change the training. This callback comes last in
    the Trainer's list, so that at the end of training the others have done their part.
    """

    def __init__(
        self,
        directory: Path,
        identity: str,
        interval: float,
        tracking: Tracking,
        base: Mapping[str, Tensor] | None = None,
    ):
        self.path = directory / "last.ckpt"
        self.identity, self.interval, self.tracking, self.base = identity, interval, tracking, base
        self.kind = "base" if base is None else "run"
        self.saved_place: Place = (0, 0)
        """How far training is in the newest checkpoint."""
        self.due = 0.0
        """When the next checkpoint may be written, on time.monotonic()'s clock."""
        self.asked: tuple[int, float] = (0, 0.0)
        """Step and time at which process 0 was asked last whether a checkpoint is due."""
        self.next_question = 0
        """The step from which on it is asked again."""
        self.before_saving: Callable[[], None] = lambda: None
        """Called before a checkpoint is written, which is no part of a step."""
        self.streams: dict[str, Any] | None = None
        """Random streams to set when a resumed training begins."""

    @cached_property
    def requirements(self) -> dict[str, str]:
        """What must be equal to go on from a checkpoint, by its name in a warning."""
        return {
            "config": self.identity,
            "base": self._base_hash(),
            "version of torch": version("torch"),
            "version of lightning": version("lightning"),
        }

    def _base_hash(self) -> str:
        """A hash of the base before the first step. At the end no process may hold all of it."""
        if isinstance(self.base, BaseWeights):
            return content_hash(dict(self.base.digests))
        return adapters.weights_hash(dict(self.base)) if self.base else ""

    def _differences(self, stored: dict[str, str]) -> list[str]:
        """The names of the requirements that differ from those `stored` in a checkpoint."""
        names = [name for name, value in self.requirements.items() if stored.get(name) != value]
        if "base" in names and self.base:  # earlier versions hashed the weights themselves
            of_weights = adapters.weights_hash(dict(self.base.items()))
            return [n for n in names if n != "base" or stored.get(n) != of_weights]
        return names

    def resume_path(self) -> Path | None:
        """The checkpoint to go on from, after logging its rows again; None if none is usable.

        One that is damaged, or of another config, base or version, is deleted.
        """
        if not self.path.exists():
            return None
        try:
            with ZipFile(self.path) as file:  # torch writes checksums but does not compare them
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
            content = torch.load(self.path, "cpu", weights_only=True)["lora_lab"]
            if differ := self._differences(content["fits"]):
                raise ValueError(f"it is of another {', another '.join(differ)}")
            rows, histograms = json.loads(content["rows"])
            _ = content["loss_totals"]  # earlier versions stored none
        except (
            *(OSError, EOFError, UnpicklingError, RuntimeError),
            *(ValueError, TypeError, LookupError, AttributeError, BadZipFile),
        ) as error:
            reason = str(error).partition("\n")[0]
            log.warning("cannot go on from %s (%s): beginning again", self.path, reason)
            self.path.unlink(missing_ok=True)
            return None
        self.tracking.replay(rows[len(self.tracking.rows) :], histograms)
        return self.path

    def resume_place(self) -> Place:
        """How far training is in the checkpoint, after logging its rows again; (0, 0) if none."""
        if (path := self.resume_path()) is None:
            return 0, 0
        return _stored_place(torch.load(path, "cpu", weights_only=True)["lora_lab"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Allows a checkpoint with the adapters' weights alone, if the model has adapters."""
        assert isinstance(pl_module, BaseModule)
        pl_module.strict_loading = not adapters.names(pl_module.model)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds rows, counts and random streams; removes the base's weights and Lightning's loops.

        Between two steps the loops' state is counts of epochs, batches and steps, stored here.
        """
        assert isinstance(pl_module, BaseModule)
        del checkpoint["loops"]
        epochs, batches = _place(trainer)
        if not pl_module.strict_loading:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if is_adapter_key(k)}
        checkpoint["lora_lab"] = {
            "fits": self.requirements,
            # As text, because torch's safe loading (weights_only) of many Python objects is slow.
            "rows": json.dumps([self.tracking.rows, self.tracking.histograms_by_row]),
            "epochs": epochs,
            "batches_of_epoch": batches,
            "batches": trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            "steps": trainer.global_step,
            "loss_totals": pl_module.loss_totals,
            "epoch_totals": pl_module.epoch_totals,
            "streams": streams_of_processes(trainer, pl_module.device),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets the losses so far and the counts of Lightning's loops."""
        assert isinstance(pl_module, BaseModule)
        load_losses(pl_module, checkpoint)
        self.set_counts(trainer, pl_module, checkpoint["lora_lab"])

    def set_counts(self, trainer: Trainer, module: BaseModule, content: dict[str, Any]) -> None:
        """Sets Lightning's counts, so that it begins with the first batch that is not done.

        `content` is what `on_save_checkpoint` has added to the checkpoint.
        """
        epochs, batches = self.saved_place = _stored_place(content)
        trainer.fit_loop.epoch_progress.increment_by(epochs)
        steps_loop = trainer.fit_loop.epoch_loop
        assert isinstance(steps_loop, TrainingLoop)
        steps_loop.batches_to_skip, steps_loop.steps_seen = batches, content["steps"]
        if module.automatic_optimization:
            optimizer_progress = steps_loop.automatic_optimization.optim_progress.optimizer
            optimizer_progress.step.increment_by(content["steps"])
        else:
            steps_loop.manual_optimization.optim_step_progress.increment_by(content["steps"])
        steps_loop.batch_progress.total.increment_by(content["batches"])
        # There is a stream for each process; with more processes than before some are shared.
        self.streams = content["streams"][trainer.global_rank % len(content["streams"])]
        place = f"{epochs} of {trainer.max_epochs}" + (f", batch {batches}" if batches else "")
        log.info("%s resumed from epoch %s", self.kind, place)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the first interval, and asks the loop to call `before_step`."""
        now = time.monotonic()
        self.due, self.asked = now + self.interval, (trainer.global_step, now)
        loop = trainer.fit_loop.epoch_loop
        assert isinstance(loop, TrainingLoop)
        loop.before_step = partial(self.before_step, trainer)

    def before_step(self, trainer: Trainer) -> None:
        """Writes a checkpoint if one is due; a resumed training gets its random streams first."""
        if self.streams is not None:
            set_streams(self.streams, trainer.lightning_module.device)
            self.streams = None
        if self.interval or not trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the end of a run's training. A base itself is stored right after its training.

        A disk without room for a checkpoint may have room for the result, which is smaller.
        """
        if self.kind == "base":
            self.next_question = 0
            return self._save_if_due(trainer)
        if _place(trainer) <= self.saved_place:
            return
        try:
            self._save(trainer)
        except OSError as error:
            if trainer.world_size > 1:
                raise  # the other processes are beyond the checkpoint
            log.warning("no checkpoint of the end of training: %s", error)

    def _save_if_due(self, trainer: Trainer) -> None:
        if not self._is_due(trainer) or (place := _place(trainer)) <= self.saved_place:
            return
        self.before_saving()
        started = time.monotonic()
        self._save(trainer)
        self.saved_place, now = place, time.monotonic()
        self.due = now + max(self.interval, (now - started) / SHARE) if self.interval else now

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the time for a checkpoint has come; the same in all processes."""
        now = time.monotonic()
        if trainer.world_size == 1:
            return now >= self.due
        # Process 0 decides for all: clocks differ, and all processes take part in a checkpoint. To
        # ask it can take as long as a small step. So it says after how many steps it wants to be
        # asked again: half of those that fit into the time left, at the speed since it was asked
        # last. 60 s at 10 ms a step are 6000 steps, in which it is asked some 20 times.
        step = trainer.global_step
        if step < self.next_question:
            return False
        (asked_step, asked_at), left = self.asked, self.due - now
        speed = (step - asked_step) / max(now - asked_at, 1e-9)  # steps a second
        wait = max(1, int(left * speed / 2)) if left > 0 else 0
        wait = trainer.strategy.broadcast(wait)
        self.asked, self.next_question = (step, now), step + wait
        return wait == 0

    def _save(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, BaseModule)
        module.read_new_losses()
        self._replace(lambda path: trainer.save_checkpoint(path, weights_only=False), trainer)

    def save(self, content: dict[str, Any]) -> None:
        """Writes `content` as the newest checkpoint."""
        buffer = BytesIO()
        torch.save(content, buffer)  # to a full disk torch raises RuntimeError, Python OSError
        self._replace(lambda path: path.write_bytes(buffer.getbuffer()))

    def _replace(self, write: Callable[[Path], object], trainer: Trainer | None = None) -> None:
        """Calls `write` with a new file and puts it in the place of the checkpoint.

        The file is on the disk (fsync) before it takes the place, so that a complete checkpoint
        exists at each moment, also after a power cut.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        is_writer = trainer is None or trainer.is_global_zero
        try:
            write(part)
            if is_writer:
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(self.path)
        finally:
            if is_writer:
                part.unlink(missing_ok=True)  # it is left where the disk is full


def _place(trainer: Trainer) -> Place:
    """How far training is; an epoch that has ended counts as the start of the next."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    return divmod(batches, int(trainer.num_training_batches))


def _stored_place(content: dict[str, Any]) -> Place:
    """How far training is in a checkpoint. Earlier versions wrote one at epochs' ends only."""
    return content["epochs"], content.get("batches_of_epoch", 0)


def load_losses(module: BaseModule, checkpoint: dict[str, Any]) -> None:
    """Gives a module the sums of its training losses so far, out of its checkpoint."""
    content = checkpoint["lora_lab"]
    module.loss_totals = content["loss_totals"]
    module.epoch_totals = content.get("epoch_totals", torch.zeros_like(module.loss_totals))
