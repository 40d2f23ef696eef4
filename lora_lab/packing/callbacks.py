"""Callbacks of a pack's Trainer: each run's ΔW is measured and its checkpoint written as usual."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lora_lab.adapters.files import is_adapter_key
from lora_lab.packing.member import Member
from lora_lab.packing.module import PackedModule
from lora_lab.training.callbacks.checkpoint import Checkpoint, load_losses
from lora_lab.training.modules import DivergedError


class EachRun(pl.Callback):
    """Passes the pack's training hooks on to the callback that measures each run's ΔW.

    A run whose ΔW is not finite fails, and the others go on.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each run's ΔW before the first step."""
        self._call_each("on_train_start", trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Measures each run's ΔW after the steps that spectra.every_n_steps names."""
        # A pack's runs have one schedule, so one is asked and not each of them in each step.
        if pl_module.members[0].trial.spectra_callback.schedule.every_n_steps is not None:
            self._call_each("on_train_batch_end", trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each run's ΔW after the epochs that spectra.every_n_epochs names."""
        self._call_each("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures each run's ΔW after the last step."""
        self._call_each("on_train_end", trainer, pl_module)

    def _call_each(self, hook: str, trainer: Any, pack: Any, *args: Any, **kwargs: Any) -> None:
        for member in list(pack.members):  # a copy, since a run that fails leaves the list
            try:
                call = getattr(member.trial.spectra_callback, hook)
                call(trainer, member.module, *args, **kwargs)
            except DivergedError as error:
                pack.fail(member, error)


# A run of a pack writes the checkpoint that it would write by itself: its adapters, its part of
# the optimizer's state, its rows. So a run can leave a pack or join one between two tries. Three of
# Checkpoint's hooks are about the module of the Trainer, here the pack, and are replaced:
#   - `setup` and `on_save_checkpoint` do nothing, since the pack itself is never saved or loaded;
#   - `__init__` loads each run's weights, and later hooks its loop counters and optimizer state,
#     in place of Trainer.fit's ckpt_path, which knows one file for one module.
# When a checkpoint is due, and the random streams, are Checkpoint's own affair.
class PackedCheckpoint(Checkpoint):
    """Saves each run of a pack in its own directory, and resumes each from there.

    The runs' checkpoints are all of one place in training, or none has one.
    """

    def __init__(self, members: Sequence[Member]):
        first = members[0].trial.checkpoint
        super().__init__(first.path.parent, "", first.interval, first.tracking)
        self.kind = "run"
        self.contents: dict[Member, dict[str, Any]] = {}
        """Each run's checkpoint as it was read; empty where training starts afresh."""
        for member in members:
            member.module.strict_loading = False  # a checkpoint holds the adapters' weights alone
            if path := member.trial.checkpoint.resume_path():
                content = torch.load(path, "cpu", weights_only=True)
                member.module.load_state_dict(content["state_dict"], strict=False)
                load_losses(member.module, content)
                for callback in _callbacks(member):
                    if state := content["callbacks"].get(callback.state_key):
                        callback.load_state_dict(state)
                self.contents[member] = content

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Does nothing: the pack itself is neither saved nor loaded."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets Lightning's loops to the batch that the runs resume from."""
        assert isinstance(pl_module, PackedModule)
        if self.contents:
            self.set_counts(trainer, pl_module, next(iter(self.contents.values()))["lora_lab"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads each run's optimizer state into the stacks, which exist by now."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PackedModule)
        if self.contents:
            members = pl_module.members  # in the order of the stacks
            states = [self.contents[member]["optimizer_states"][0] for member in members]
            pl_module.packed_optimizer.load_run_states([m.module for m in members], states)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the runs whose early stopping says so; the others go on.

        For such a run by itself, its epoch and its training would end here. It is written at once:
        if the pack is interrupted later, this run is not trained again.
        """
        assert isinstance(pl_module, PackedModule)
        if trainer.state.fn != TrainerFn.FITTING or not pl_module.stopped:
            return
        # Lightning validates in inference mode, and tensors made in it cannot be trained.
        with torch.inference_mode(False):
            pl_module.read_new_losses()
            for member in pl_module.stopped:
                spectra_callback = member.trial.spectra_callback
                spectra_callback.on_train_epoch_end(trainer, member.module)
                pl_module.log_epoch_loss(member)
                spectra_callback.on_train_end(trainer, member.module)
                self._save_run(member, trainer, pl_module)
                pl_module.end(member)

    def on_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `_save_run` calls this hook of each run's own checkpoint."""

    def _save(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, PackedModule)
        module.read_new_losses()
        for member in module.members:
            self._save_run(member, trainer, module)

    def _save_run(self, member: Member, trainer: pl.Trainer, module: PackedModule) -> None:
        content = self._content(member, module, trainer)
        member.trial.checkpoint.on_save_checkpoint(trainer, member.module, content)
        member.trial.checkpoint.save(content)

    def _content(self, member: Member, module: PackedModule, trainer: pl.Trainer) -> dict[str, Any]:
        """What Lightning would write for the run by itself, with the keys in its order."""
        run_module, optimizer, step = member.module, module.packed_optimizer, trainer.global_step
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
            "callbacks": {
                c.state_key: state for c in _callbacks(member) if (state := c.state_dict())
            },
            "optimizer_states": [optimizer.run_state(run_module, step)],
            "lr_schedulers": optimizer.scheduler_states(run_module, step),
        }


def _callbacks(member: Member) -> list[pl.Callback]:
    """A run's callbacks that remember something, in the order that they have in a run by itself."""
    trial = member.trial
    callbacks = (trial.spectra_callback, trial.selection, trial.step_log, trial.cost)
    return [callback for callback in callbacks if callback]
