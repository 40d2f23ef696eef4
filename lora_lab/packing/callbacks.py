"""What is done for each run of a pack as it would be alone: measuring ΔW, keeping checkpoints."""

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
    """Measures every run's ΔW when its own callback, in `spectral`, would alone."""

    def __init__(self, spectral: Mapping[Member, SpectraCallback]):
        self.spectral = spectral

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first step."""
        self._all("on_train_start", trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After so many steps."""
        if next(iter(self.spectral.values())).schedule.every_n_steps is not None:
            self._all("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After so many epochs."""
        self._all("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last."""
        self._all("on_train_end", trainer, pl_module)

    def _all(
        self, hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule, *given: Any
    ) -> None:
        assert isinstance(pl_module, PackedModule)
        for member in list(pl_module.members):
            try:
                getattr(self.spectral[member], hook)(trainer, member.module, *given)
            except DivergedError as error:
                pl_module.fail(member, error)


class PackedCheckpoint(Checkpoint):
    """Keeps every run in its own directory, as it would be kept alone, and goes on from there.

    `own` are the runs' checkpoints, all of one epoch or none, and what measures their ΔW.
    """

    def __init__(self, own: Mapping[Member, tuple[Checkpoint, SpectraCallback]]):
        first, member = next(iter(own.values()))[0], next(iter(own))
        super().__init__(first.path.parent, "", first.interval, member.tracking)
        self.kind, self.own = "run", own
        self.contents: dict[Member, dict[str, Any]] = {}
        for member, (checkpoint, spectral) in own.items():
            member.module.strict_loading = False  # weights that are loaded are the adapters' alone
            if kept := checkpoint.resume_path():
                content = torch.load(kept, "cpu", weights_only=True)
                member.module.load_state_dict(content["state_dict"], strict=False)
                spectral.load_state_dict(content["callbacks"][spectral.state_key])
                self.contents[member] = content

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing: the pack as a whole is neither kept nor loaded."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the loops begin where the runs are."""
        if self.contents:
            self.on_load_checkpoint(trainer, pl_module, next(iter(self.contents.values())))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the optimizer what it knew."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PackedModule)
        if self.contents:
            members = pl_module.members  # in the order of the stacks
            states = [self.contents[member]["optimizer_states"][0] for member in members]
            pl_module.packed_optimizer.load([member.module for member in members], states)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing: `_save_epoch` asks each run's own."""

    def _save_epoch(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, PackedModule)
        for member in module.members:
            checkpoint, spectral = self.own[member]
            of = member.module, trainer.global_step
            content: dict[str, Any] = {
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                "pytorch-lightning_version": version("lightning"),
                "state_dict": {
                    # Of its own: a view would be written with the tensors of all runs.
                    key: value.clone(memory_format=torch.contiguous_format)
                    for key, value in member.module.state_dict().items()
                    if is_adapter_key(key)
                },
                "loops": None,
                "callbacks": {spectral.state_key: spectral.state_dict()},
                "optimizer_states": [module.packed_optimizer.state(*of)],
                "lr_schedulers": module.packed_optimizer.schedulers(*of),
            }
            checkpoint.on_save_checkpoint(trainer, member.module, content)
            checkpoint.save(content)
