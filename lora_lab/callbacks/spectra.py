"""When ΔW is measured, and where its spectrum goes."""

import io
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from lora_lab.modules import BaseModule, DivergedError
from lora_lab.runs import write_atomic
from lora_lab.spectra import Spectrum
from lora_lab.tracking import Tracking

CORNER = 64
"""Rows and columns of ΔW that spectra.npz keeps for its picture."""


class SpectraCallback(pl.Callback):
    """Measures every site's ΔW before training, every so many epochs, and at the end.

    `measure` gives the spectra by site, `delta` one site's ΔW as a matrix. Scalars and histograms
    are logged as they come; `write` puts everything into one spectra.npz.
    """

    def __init__(
        self,
        measure: Callable[[], dict[str, Spectrum]],
        delta: Callable[[str], Tensor],
        every_n_epochs: int,
        tracking: Tracking,
    ):
        self.measure, self.delta, self.every, self.tracking = (
            measure,
            delta,
            every_n_epochs,
            tracking,
        )
        self.epochs: list[int] = []
        self.history: dict[str, list[Spectrum]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures what the adapters start from."""
        self._measure(trainer, 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures every `every_n_epochs`."""
        assert isinstance(pl_module, BaseModule)
        if pl_module.epochs_done % self.every == 0:
            self._measure(trainer, pl_module.epochs_done)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the end, unless it has been."""
        if self.epochs[-1] != trainer.current_epoch:
            self._measure(trainer, trainer.current_epoch)

    def _measure(self, trainer: pl.Trainer, epoch: int) -> None:
        try:
            spectra = self.measure()
        except ValueError as error:
            raise DivergedError(
                f"after epoch {epoch}, step {trainer.global_step} of the run: {error}"
            ) from error
        self.epochs.append(epoch)
        for site, spectrum in spectra.items():
            self.history.setdefault(site, []).append(spectrum)
        self.tracking.log_spectra(spectra, epoch, trainer.global_step)

    def write(self, path: Path) -> None:
        """spectra.npz: `epochs`, and by site the singular values (time × k), shape and corner.

        The values' course is also charted in W&B.
        """
        arrays = {"epochs": np.array(self.epochs)}
        for site, spectra in self.history.items():
            values = np.stack([s.singular_values.numpy() for s in spectra])
            arrays[f"{site}/singular_values"] = values
            self.tracking.log_spectrum_chart(site, self.epochs, values)
            arrays[f"{site}/shape"] = np.array(spectra[-1].shape)
            corner = self.delta(site)[:CORNER, :CORNER]
            arrays[f"{site}/delta"] = corner.detach().cpu().float().numpy()
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_atomic(path, content.getvalue())
