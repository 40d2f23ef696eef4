"""Checkpoints from which an interrupted training goes on, bit for bit as if it had not stopped."""

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lora_lab import adapters
from lora_lab.adapters.files import is_adapter_key
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule

log = logging.getLogger(__name__)

SHARE = 0.05
"""The largest share of the training time that writing checkpoints may take."""


class Checkpoint(Callback):
    """Writes a checkpoint of the last complete epoch, once `interval` seconds have passed.

    An epoch is complete once its last row is logged. That is after Lightning's hooks for an epoch's
    end, so the checkpoint is written as the next epoch starts. It holds the optimizer, its
    schedule, the callbacks' state, the random streams, all rows logged so far, and the weights: of
    a model with adapters only theirs, with the hash of the `base` they belong to. With `interval` 0
    each epoch is written, as long as writing takes at most SHARE of the time. The end of training
    counts as the start of an epoch.

    `identity` is the hash of all settings that can change the training. This callback comes last in
    the Trainer's list, so that the others have done their part of the epoch.
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
        self.saved_epochs = 0
        """The number of epochs in the newest checkpoint."""
        self.due = 0.0
        """When the next checkpoint may be written, on time.monotonic()'s clock."""
        self.streams: dict[str, Any] | None = None
        """Random streams to set when a resumed training begins."""

    @cached_property
    def requirements(self) -> dict[str, str]:
        """What must be equal to go on from a checkpoint, by its name in a warning."""
        return {
            "config": self.identity,
            "base": adapters.weights_hash(dict(self.base.items())) if self.base else "",
            "version of torch": version("torch"),
            "version of lightning": version("lightning"),
        }

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
            stored = content["fits"]
            if differ := [n for n, value in self.requirements.items() if stored.get(n) != value]:
                raise ValueError(f"it is of another {', another '.join(differ)}")
            rows, histograms = json.loads(content["rows"])
            _ = content["loss_totals"]  # earlier versions stored none
        except (
            *(OSError, EOFError, UnpicklingError, RuntimeError),
            *(ValueError, TypeError, LookupError, AttributeError, BadZipFile),
        ) as error:
            reason = str(error).partition("\n")[0]
            log.warning("cannot go on from %s (%s): beginning again", self.path, reason)
            shutil.rmtree(self.path.parent, ignore_errors=True)
            return None
        self.tracking.replay(rows[len(self.tracking.rows) :], histograms)
        return self.path

    def resume_epoch(self) -> int:
        """The number of epochs to go on from, after logging their rows again; 0 if none."""
        path = self.resume_path()
        return torch.load(path, "cpu", weights_only=True)["lora_lab"]["epochs"] if path else 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Allows a checkpoint with the adapters' weights alone, if the model has adapters."""
        assert isinstance(pl_module, BaseModule)
        pl_module.strict_loading = not adapters.names(pl_module.model)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds rows, counts and random streams; removes the base's weights and Lightning's loops.

        At an epoch's end the loops' state is counts of epochs, batches and steps, stored here.
        """
        assert isinstance(pl_module, BaseModule)
        del checkpoint["loops"]
        if not pl_module.strict_loading:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if is_adapter_key(k)}
        checkpoint["lora_lab"] = {
            "fits": self.requirements,
            # As text, because torch's safe loading (weights_only) of many Python objects is slow.
            "rows": json.dumps([self.tracking.rows, self.tracking.histograms_by_row]),
            "epochs": trainer.current_epoch,
            "batches": trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            "steps": trainer.global_step,
            "loss_totals": pl_module.loss_totals,
            "streams": _streams(trainer, pl_module.device),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets Lightning's counts of epochs and steps, so that it begins with the next epoch."""
        content, loop = checkpoint["lora_lab"], trainer.fit_loop
        assert isinstance(pl_module, BaseModule)
        pl_module.loss_totals = content["loss_totals"]
        loop.epoch_progress.increment_by(content["epochs"])
        steps_loop = loop.epoch_loop
        if pl_module.automatic_optimization:
            optimizer_progress = steps_loop.automatic_optimization.optim_progress.optimizer
            optimizer_progress.step.increment_by(content["steps"])
        else:
            steps_loop.manual_optimization.optim_step_progress.increment_by(content["steps"])
        steps_loop.batch_progress.total.increment_by(content["batches"])
        self.saved_epochs = content["epochs"]
        # There is a stream for each process; with more processes than before some are shared.
        self.streams = content["streams"][trainer.global_rank % len(content["streams"])]
        log.info("%s resumed from epoch %d of %s", self.kind, self.saved_epochs, trainer.max_epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the first interval."""
        self.due = time.monotonic() + self.interval

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a checkpoint if one is due; a resumed training gets its random streams first."""
        if self.streams is not None:
            _set_streams(self.streams, pl_module.device)
            self.streams = None
        self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the last epoch if it is due: what follows training can take long too."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        started = time.monotonic()
        due = trainer.current_epoch > self.saved_epochs and started >= self.due
        # Process 0 decides for all: clocks differ, and all processes take part in a checkpoint.
        if not trainer.strategy.broadcast(due):
            return
        self._save_epoch(trainer)
        self.saved_epochs, now = trainer.current_epoch, time.monotonic()
        self.due = now + max(self.interval, (now - started) / SHARE) if self.interval else now

    def _save_epoch(self, trainer: Trainer) -> None:
        self._replace(lambda path: trainer.save_checkpoint(path, weights_only=False), trainer)

    def save(self, content: dict[str, Any]) -> None:
        """Writes `content` as the newest checkpoint."""
        self._replace(lambda path: torch.save(content, path))

    def _replace(self, write: Callable[[Path], None], trainer: Trainer | None = None) -> None:
        """Calls `write` with a new file and puts it in the place of the checkpoint.

        The file is on the disk (fsync) before it takes the place, so that a complete checkpoint
        exists at each moment, also after a power cut.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        write(part)
        if trainer is None or trainer.is_global_zero:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path)


def _streams(trainer: Trainer, device: torch.device) -> list[dict[str, Any]]:
    """The state of the global random streams, one dict for each process."""
    kind, keys, *rest = np.random.get_state()
    streams = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), *rest],  # pyright: ignore
        "python": random.getstate(),
    }
    by_process = [streams] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(by_process, streams)
    return by_process


def _set_streams(streams: dict[str, Any], device: torch.device) -> None:
    """Sets this process's global random streams."""
    torch.set_rng_state(streams["torch"])
    if device.type == "cuda" and streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"], device)
    np.random.set_state(tuple(streams["numpy"]))
    random.setstate(streams["python"])
