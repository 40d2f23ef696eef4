"""Measures the singular values of ΔW during training and logs them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_lab.adapters import Site
from lora_lab.analysis.spectra import Spectrum, spectrum_of_blocks
from lora_lab.analysis.updates import Updates, split
from lora_lab.config.schema import Spectra
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.modules import BaseModule, DivergedError

CORNER = 64
"""The most rows and columns of ΔW that spectra.npz holds, for a picture of it."""


class SpectraCallback(Callback):
    """Measures the ΔW of each site before the first step, as `schedule` says, and at the end.

    Each measurement is logged at once, for each site and for groups of sites (see `groups`).
    `arrays` gives what spectra.npz holds.
    """

    def __init__(self, updates: Updates, schedule: Spectra, tracking: Tracking):
        self.updates, self.schedule, self.tracking = updates, schedule, tracking
        self.epochs: list[float] = []
        """The epoch of each measurement, with a fraction within an epoch."""
        self.step = 0
        """The optimizer step of the last measurement."""
        self.before_measuring: Callable[[], None] = lambda: None
        """Called before each measurement, which is no part of a step."""
        self.history: dict[str, list[Spectrum]] = {}
        """By matrix (a site's, or one of its experts'), the spectrum at each measurement."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures before the first step, unless the run was resumed."""
        if not self.epochs:
            self._measure(0, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures each `every_n_steps`; not at an epoch's end that is measured anyway."""
        interval, step = self.schedule.every_n_steps, trainer.global_step
        # With accumulated gradients several batches end at the same step.
        if interval is None or step % interval or step == self.step:
            return
        epoch = trainer.current_epoch + (batch_idx + 1) / int(trainer.num_training_batches)
        if not (epoch.is_integer() and epoch % self.schedule.every_n_epochs == 0):
            self._measure(epoch, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures each `every_n_epochs`."""
        assert isinstance(pl_module, BaseModule)
        if pl_module.epochs_done % self.schedule.every_n_epochs == 0:
            self._measure(pl_module.epochs_done, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures at the end, unless the last epoch has been measured."""
        if self.step != trainer.global_step:
            assert isinstance(pl_module, BaseModule)
            self._measure(pl_module.epochs_done, trainer.global_step)

    def end_at(self, epoch: float, step: int) -> None:
        """Takes the model's ΔW as the last: that of an earlier `epoch`, which was selected.

        Measurements of later epochs are left out.
        """
        count = sum(measured <= epoch for measured in self.epochs)
        del self.epochs[count:]
        for spectra in self.history.values():
            del spectra[count:]
        if self.epochs[-1] != epoch:
            self._measure(epoch, step)

    def state_dict(self) -> dict[str, Any]:
        """All measurements so far, for a checkpoint."""
        first = {site: spectra[0] for site, spectra in self.history.items()}
        return {
            "epochs": self.epochs,
            "step": self.step,
            "shapes": {site: spectrum.shape for site, spectrum in first.items()},
            "eps": {site: spectrum.eps for site, spectrum in first.items()},
            "values": {site: stacked(spectra) for site, spectra in self.history.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the measurements of a checkpoint."""
        self.epochs, self.step = list(state_dict["epochs"]), state_dict["step"]
        for site, values in state_dict["values"].items():
            shape, eps = state_dict["shapes"][site], state_dict["eps"][site]
            self.history[site] = [Spectrum(row, shape, eps) for row in values]

    def _measure(self, epoch: float, step: int) -> None:
        """Measures and logs all sites. Raises DivergedError if ΔW is infinite or NaN."""
        self.before_measuring()
        try:
            by_site = self.updates.spectra_by_site()
        except ValueError as error:
            when = f"after epoch {epoch:g}, step {step} of the run"
            raise DivergedError(f"{when}: {error}") from error
        self.epochs.append(epoch)
        self.step = step
        for site, spectra in by_site.items():
            for matrix, spectrum in zip(self.updates.sites[site].matrices, spectra, strict=True):
                self.history.setdefault(matrix, []).append(spectrum)
        grouped = groups(by_site, self.updates.sites)
        self.tracking.log_spectra(by_site, grouped, epoch, step)

    def arrays(self) -> dict[str, np.ndarray]:
        """What spectra.npz holds: `epochs`, and for each matrix singular values, shape and ΔW.

        A matrix is named by its site, or of experts as `<site>.<expert>`; `experts` has the names
        of such sites. `<matrix>/singular_values` is (measurements, k), `<matrix>/shape` that of ΔW,
        and `<matrix>/delta` ΔW's first rows and columns, CORNER at most. The singular values of
        each site over epochs, of experts their means, are also charted in W&B.
        """
        arrays = {"epochs": np.array(self.epochs)}
        for name, site in self.updates.sites.items():
            deltas = split(site, self.updates.delta_matrix(name))
            of_site = []
            for matrix, delta in zip(site.matrices, deltas, strict=True):
                spectra = self.history[matrix]
                of_site.append(stacked(spectra).numpy())
                arrays[f"{matrix}/singular_values"] = of_site[-1]
                arrays[f"{matrix}/shape"] = np.array(spectra[-1].shape)
                arrays[f"{matrix}/delta"] = delta[:CORNER, :CORNER].cpu().float().numpy()
            self._chart(name, np.mean(of_site, 0))
        if experts := self.updates.experts:
            arrays["experts"] = np.array(experts)
        return arrays

    def _chart(self, site: str, values: np.ndarray) -> None:
        """Has W&B draw a site's singular values (measurements, k) over epochs."""
        lines = {f"σ{i + 1}": column for i, column in enumerate(values.T)}
        title = f"ΔW of {site}: singular values"
        self.tracking.log_line_series(f"spectra/{site}/chart", title, self.epochs, lines, "epoch")


def stacked(spectra: Sequence[Spectrum]) -> Tensor:
    """The singular values of several measurements (measurements, k).

    ReLoRA's ΔW gets more of them in training: the earlier measurements have zeros for these.
    """
    return pad_sequence([spectrum.singular_values for spectrum in spectra], batch_first=True)


def groups(
    spectra: Mapping[str, Sequence[Spectrum]], sites: Mapping[str, Site]
) -> dict[str, Spectrum]:
    """The spectra of groups of sites: `all` of them, and the sites of each kind and of each depth.

    `spectra` has those of each site's matrices.

    A group's spectrum is that of the block-diagonal matrix of its ΔW. Depth is the first number in
    a site's name, as 3 in `layers.3.attn.q`. A run with a single site has the group `all` alone,
    so that runs of one and of many sites share a chart.
    """
    if len(spectra) == 1:
        return {"all": spectrum_of_blocks(*spectra.values())}
    members: dict[str, list[Spectrum]] = {}
    for name, matrices in spectra.items():
        depth = re.search(r"(?<![^.])\d+(?![^.])", name)
        names = ["all", f"kind/{sites[name].kind}", *([f"depth/{depth[0]}"] if depth else [])]
        for group in names:
            members.setdefault(group, []).extend(matrices)
    return {group: spectrum_of_blocks(blocks) for group, blocks in members.items()}
