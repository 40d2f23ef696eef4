"""When a training is kept, and what of it, so that it goes on where it was stopped, bit for bit."""

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

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lora_lab import adapters
from lora_lab.adapters.files import is_adapter_key
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule

log = logging.getLogger(__name__)

SHARE = 0.05
"""Of a training's time that its checkpoints may take, at most."""


class Checkpoint(pl.Callback):
    """Keeps the newest whole epoch of a training in `directory`, every so many seconds.

    An epoch is whole once its last row is logged, which is after Lightning's own hooks for its
    end: it is kept as the next one starts. With it go the optimizer, its schedule, what callbacks
    have measured, the random streams and every row so far; of the weights the adapters', where
    there are any, and the hash of the `base` they fit. `interval` 0 keeps each epoch. `identity` is
    of all that can change the training. Comes last of a Trainer's callbacks.
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
        """Whole epochs that are kept."""
        self.due = 0.0
        self.streams: dict[str, Any] | None = None

    @cached_property
    def fits(self) -> dict[str, str]:
        """What must be the same for a training to go on from a checkpoint, by name."""
        return {
            "config": self.identity,
            "base": adapters.weights_hash(dict(self.base)) if self.base else "",
            "version of torch": version("torch"),
            "version of lightning": version("lightning"),
        }

    def resume_path(self) -> Path | None:
        """The checkpoint to go on from, its rows logged again; None where there is none to use."""
        if not self.path.exists():
            return None
        try:
            with ZipFile(self.path) as file:  # torch does not look at the checksums it wrote
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
            kept = torch.load(self.path, "cpu", weights_only=True)["lora_lab"]
            other = [name for name, value in self.fits.items() if kept["fits"].get(name) != value]
            if other:
                raise ValueError(f"it is of another {', another '.join(other)}")
            rows, histograms = json.loads(kept["rows"])
        except (
            *(OSError, EOFError, UnpicklingError, RuntimeError),
            *(ValueError, TypeError, LookupError, AttributeError, BadZipFile),
        ) as error:
            says = str(error).partition("\n")[0]
            log.warning("cannot go on from %s (%s): beginning again", self.path, says)
            shutil.rmtree(self.path.parent, ignore_errors=True)
            return None
        self.tracking.replay(rows[len(self.tracking.rows) :], histograms)
        return self.path

    def resume_epoch(self) -> int:
        """How many epochs there are to go on from, their rows logged again."""
        kept = self.resume_path()
        return torch.load(kept, "cpu", weights_only=True)["lora_lab"]["epochs"] if kept else 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets weights be loaded that are the adapters' alone."""
        assert isinstance(pl_module, BaseModule)
        pl_module.strict_loading = not adapters.names(pl_module.model)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leaves out the base and Lightning's loops, which at an epoch's end are two counts."""
        del checkpoint["loops"]
        if not pl_module.strict_loading:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if is_adapter_key(k)}
        checkpoint["lora_lab"] = {
            "fits": self.fits,
            # As text: reading Python's objects back, and nothing but data, is slow.
            "rows": json.dumps([self.tracking.rows, self.tracking.histograms_by_row]),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "streams": _streams(trainer, pl_module.device),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes the loops begin with the next epoch, as if they had run all before."""
        kept, loop = checkpoint["lora_lab"], trainer.fit_loop
        loop.epoch_progress.increment_by(kept["epochs"])
        of = loop.epoch_loop
        if pl_module.automatic_optimization:
            of.automatic_optimization.optim_progress.optimizer.step.increment_by(kept["steps"])
        else:
            of.manual_optimization.optim_step_progress.increment_by(kept["steps"])
        self.saved_epochs = kept["epochs"]
        # Another number of processes than before has no streams of its own.
        self.streams = kept["streams"][trainer.global_rank % len(kept["streams"])]
        log.info("%s resumed from epoch %d of %s", self.kind, self.saved_epochs, trainer.max_epochs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time runs from here."""
        self.due = time.monotonic() + self.interval

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the epochs that are whole; of a resumed training, puts the random streams back."""
        if self.streams is not None:
            _set_streams(self.streams, pl_module.device)
            self.streams = None
        self._save_if_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the last epoch: what comes after a training can be long too."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        due = trainer.current_epoch > self.saved_epochs and began >= self.due
        if not trainer.strategy.broadcast(due):
            return
        self._save_epoch(trainer)
        self.saved_epochs, now = trainer.current_epoch, time.monotonic()
        self.due = now + max(self.interval, (now - began) / SHARE) if self.interval else now

    def _save_epoch(self, trainer: pl.Trainer) -> None:
        self._replace(lambda part: trainer.save_checkpoint(part, weights_only=False), trainer)

    def save(self, content: dict[str, Any]) -> None:
        """Makes `content` the checkpoint that is kept."""
        self._replace(lambda part: torch.save(content, part))

    def _replace(self, write: Callable[[Path], None], trainer: pl.Trainer | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        write(part)
        if trainer is None or trainer.is_global_zero:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path)


def _streams(trainer: pl.Trainer, device: torch.device) -> list[dict[str, Any]]:
    """Where the global random streams of every process are."""
    kind, keys, *rest = np.random.get_state()
    own = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), *rest],  # pyright: ignore
        "python": random.getstate(),
    }
    every = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(every, own)
    return every


def _set_streams(streams: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(streams["torch"])
    if device.type == "cuda" and streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"], device)
    np.random.set_state(tuple(streams["numpy"]))
    random.setstate(streams["python"])
