"""Callbacks of a pack's Trainer: each run's ΔW is measured and its checkpoint written as usual."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch

from lora_lab.adapters.files import is_adapter_key
from lora_lab.packing.module import Member, PackedModule
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.spectra import SpectraCallback
from lora_lab.training.modules import DivergedError


class EachRun(pl.Callback):
    """Passes the pack's training hooks on to the callback that measures each run's ΔW.

    A run whose ΔW is not finite fails, and the others go on.
    """

    def __init__(self, spectra_callbacks: Mapping[Member, SpectraCallback]):
        self.spectra_callbacks = spectra_callbacks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each run's ΔW before the first step."""
        self._call_each("on_train_start", trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures each run's ΔW after the steps that spectra.every_n_steps names."""
        # A pack's runs have one schedule, so one is asked and not each of them in each step.
        if next(iter(self.spectra_callbacks.values())).schedule.every_n_steps is not None:
            self._call_each("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each run's ΔW after the epochs that spectra.every_n_epochs names."""
        self._call_each("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each run's ΔW after the last step."""
        self._call_each("on_train_end", trainer, pl_module)

    def _call_each(
        self, hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        assert isinstance(pl_module, PackedModule)
        for member in list(pl_module.members):  # a copy, since a run that fails leaves the list
            try:
                getattr(self.spectra_callbacks[member], hook)(trainer, member.module, *arguments)
            except DivergedError as error:
                pl_module.fail(member, error)


# A run of a pack writes the checkpoint that it would write by itself: its adapters, its part of
# the optimizer's state, its rows. So a run can leave a pack or join one between two tries. Three of
# Checkpoint's hooks are about the module of the Trainer, here the pack, and are replaced:
#   - `setup` and `on_save_checkpoint` do nothing, since the pack itself is never saved or loaded;
#   - `__init__` loads each run's weights, and later hooks its loop counters and optimizer state,
#     in place of Trainer.fit's ckpt_path, which knows one file for one module.
# When an epoch is to be saved, and the random streams, are Checkpoint's own affair.
class PackedCheckpoint(Checkpoint):
    """Saves each run of a pack in its own directory, and resumes each from there.

    `callbacks` are each run's checkpoint and the callback that measures its ΔW. The runs'
    checkpoints are all of one epoch, or none has one.
    """

    def __init__(self, callbacks: Mapping[Member, tuple[Checkpoint, SpectraCallback]]):
        first_member, (first_checkpoint, _) = next(iter(callbacks.items()))
        directory, interval = first_checkpoint.path.parent, first_checkpoint.interval
        super().__init__(directory, "", interval, first_member.tracking)
        self.kind, self.callbacks = "run", callbacks
        self.contents: dict[Member, dict[str, Any]] = {}
        """Each run's checkpoint as it was read; empty where training starts afresh."""
        for member, (checkpoint, spectra_callback) in callbacks.items():
            member.module.strict_loading = False  # a checkpoint holds the adapters' weights alone
            if path := checkpoint.resume_path():
                content = torch.load(path, "cpu", weights_only=True)
                member.module.load_state_dict(content["state_dict"], strict=False)
                spectra_callback.load_state_dict(content["callbacks"][spectra_callback.state_key])
                self.contents[member] = content

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Does nothing: the pack itself is neither saved nor loaded."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets Lightning's loops to the epoch that the runs resume from."""
        if self.contents:
            self.on_load_checkpoint(trainer, pl_module, next(iter(self.contents.values())))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads each run's optimizer state into the stacks, which exist by now."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PackedModule)
        if self.contents:
            members = pl_module.members  # in the order of the stacks
            states = [self.contents[member]["optimizer_states"][0] for member in members]
            pl_module.packed_optimizer.load_run_states([m.module for m in members], states)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Does nothing: `_save_epoch` calls this hook of each run's own checkpoint."""

    def _save_epoch(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, PackedModule)
        for member in module.members:
            checkpoint, _ = self.callbacks[member]
            content = self._content(member, module, trainer)
            checkpoint.on_save_checkpoint(trainer, member.module, content)
            checkpoint.save(content)

    def _content(self, member: Member, module: PackedModule, trainer: pl.Trainer) -> dict[str, Any]:
        """What Lightning would write for the run by itself, with the keys in its order."""
        _, spectra_callback = self.callbacks[member]
        optimizer, run_module, step = module.packed_optimizer, member.module, trainer.global_step
        return {
            "epoch": trainer.current_epoch,
            "global_step": step,
            "pytorch-lightning_version": version("lightning"),
            "state_dict": {
                # A copy: torch.save would write a view with the tensors of all runs in its stack.
                key: value.clone(memory_format=torch.contiguous_format)
                for key, value in run_module.state_dict().items()
                if is_adapter_key(key)
            },
            "loops": None,
            "callbacks": {spectra_callback.state_key: spectra_callback.state_dict()},
            "optimizer_states": [optimizer.run_state(run_module, step)],
            "lr_schedulers": optimizer.scheduler_states(run_module, step),
        }
