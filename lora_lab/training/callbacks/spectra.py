"""When ΔW is measured, and where its spectrum goes."""

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lora_lab.adapters import Site
from lora_lab.analysis.spectra import Spectrum, spectrum_of_blocks
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Spectra
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule, DivergedError

CORNER = 64
"""Rows and columns of ΔW that spectra.npz keeps for its picture."""


class SpectraCallback(pl.Callback):
    """Measures every site's ΔW before training, every so many epochs or steps, and at the end.

    Scalars and histograms are logged as they come, by site, of all and, of several sites, by kind
    and by depth; `arrays` gives what spectra.npz holds.
    """

    def __init__(self, updates: Updates, schedule: Spectra, tracking: Tracking):
        self.updates, self.schedule, self.tracking = updates, schedule, tracking
        self.epochs: list[float] = []
        self.step = 0
        """The optimizer's step at the last measurement."""
        self.history: dict[str, list[Spectrum]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures what the adapters start from, unless the run was resumed."""
        if not self.epochs:
            self._measure(trainer, 0)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Measures every `every_n_steps`, but for a step that ends an epoch which is measured."""
        every, step = self.schedule.every_n_steps, trainer.global_step
        if every is None or step % every or step == self.step:  # a step may take several batches
            return
        epoch = trainer.current_epoch + (batch_idx + 1) / int(trainer.num_training_batches)
        if not (epoch.is_integer() and epoch % self.schedule.every_n_epochs == 0):
            self._measure(trainer, epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures every `every_n_epochs`."""
        assert isinstance(pl_module, BaseModule)
        if pl_module.epochs_done % self.schedule.every_n_epochs == 0:
            self._measure(trainer, pl_module.epochs_done)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the end, unless it has been."""
        if self.epochs[-1] != trainer.current_epoch:
            self._measure(trainer, trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """What has been measured so far: a checkpoint keeps it."""
        first = {site: spectra[0] for site, spectra in self.history.items()}
        return {
            "epochs": self.epochs,
            "step": self.step,
            "shapes": {site: spectrum.shape for site, spectrum in first.items()},
            "eps": {site: spectrum.eps for site, spectrum in first.items()},
            "values": {
                site: torch.stack([spectrum.singular_values for spectrum in spectra])
                for site, spectra in self.history.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.epochs, self.step = list(state_dict["epochs"]), state_dict["step"]
        for site, values in state_dict["values"].items():
            about = state_dict["shapes"][site], state_dict["eps"][site]
            self.history[site] = [Spectrum(row, *about) for row in values]

    def _measure(self, trainer: pl.Trainer, epoch: float) -> None:
        try:
            spectra = self.updates.spectra_by_site()
        except ValueError as error:
            raise DivergedError(
                f"after epoch {epoch:g}, step {trainer.global_step} of the run: {error}"
            ) from error
        self.epochs.append(epoch)
        self.step = trainer.global_step
        for site, spectrum in spectra.items():
            self.history.setdefault(site, []).append(spectrum)
        wholes = groups(spectra, self.updates.sites)
        self.tracking.log_spectra(spectra, wholes, epoch, trainer.global_step)

    def arrays(self) -> dict[str, np.ndarray]:
        """`epochs`, and by site the singular values (time × k), the shape and a corner of ΔW.

        The values' course is also charted in W&B.
        """
        arrays = {"epochs": np.array(self.epochs)}
        for site, spectra in self.history.items():
            values = np.stack([s.singular_values.numpy() for s in spectra])
            arrays[f"{site}/singular_values"] = values
            self.tracking.log_line_series(
                f"spectra/{site}/chart",
                f"ΔW of {site}: singular values",
                self.epochs,
                {f"σ{i + 1}": column for i, column in enumerate(values.T)},
                "epoch",
            )
            arrays[f"{site}/shape"] = np.array(spectra[-1].shape)
            corner = self.updates.delta_matrix(site)[:CORNER, :CORNER]
            arrays[f"{site}/delta"] = corner.cpu().float().numpy()
        return arrays


def groups(spectra: Mapping[str, Spectrum], sites: Mapping[str, Site]) -> dict[str, Spectrum]:
    """The spectra of several sites' ΔW as one: of all, by kind and by depth; of one site `all`.

    Runs of one site and of many are thus charted by one name. Depth is the first number in a
    site's name, as 3 in `layers.3.attn.q`.
    """
    if len(spectra) == 1:
        return {"all": spectrum_of_blocks(spectra.values())}
    members: dict[str, list[Spectrum]] = {}
    for name, spectrum in spectra.items():
        depth = re.search(r"(?<![^.])\d+(?![^.])", name)
        of = ["all", f"kind/{sites[name].kind}", *([f"depth/{depth[0]}"] if depth else [])]
        for group in of:
            members.setdefault(group, []).append(spectrum)
    return {group: spectrum_of_blocks(own) for group, own in members.items()}
