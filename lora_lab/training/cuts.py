"""The validation losses of many models in one pass over the data: a pack's, and of ΔW cut."""

import logging
from collections.abc import Iterator, Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Adapter, Recipe, Site
from lora_lab.adapters.pack import Pack, copy_sharing_weights
from lora_lab.analysis.spectra import SVD
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Optimizer
from lora_lab.data import Data
from lora_lab.training.modules import BaseModule, Batch

log = logging.getLogger(__name__)

CUTS_PER_PASS = 64
"""Cuts of ΔW that are measured in one pass, at most."""


class PackValidationModule(BaseModule):
    """Many runs' validation losses in one pass over the data; `packs` are all of them."""

    def __init__(self, model: nn.Module, data: Data, optimizer: Optimizer):
        super().__init__(model, data.task, data.sizes["out_features"], optimizer)
        self.eval_rows = data.eval_rows
        self.packs: list[Pack] = []
        self.sums: list[Tensor] = []
        self.rows = 0

    def on_validation_epoch_start(self) -> None:
        """Starts the sums."""
        self.sums, self.rows = [], 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds every run's loss, with no more memory than one run takes."""
        x, y = batch
        sums, place = [], 0
        for pack in self.packs:
            rows = max(1, self.eval_rows // len(pack.runs))
            total = torch.zeros(len(pack.runs), dtype=torch.float64)
            for xs, ys in zip(x.split(rows), y.split(rows), strict=True):
                outputs = pack(xs)
                losses = self.losses_by_run(outputs, ys)
                total += losses.double().cpu() * len(xs)
                self.update_metrics(place, outputs, ys)
            sums.append(total)
            place += len(pack.runs)
        self.sums.append(torch.cat(sums))
        self.rows += len(x)

    def losses_by_run(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Every run's loss: one by one, which vmap would do in several passes over all outputs."""
        return torch.stack([self.task.loss(output, y) for output in outputs])

    def update_metrics(self, place: int, outputs: Tensor, y: Tensor) -> None:
        """What else is measured of the runs from `place` on."""

    def mean_losses(self) -> Tensor:
        """The mean losses (runs,)."""
        return torch.stack(self.sums).sum(0) / self.rows

    def on_validation_epoch_end(self) -> None:
        """Logs nothing."""


class CutsModule(PackValidationModule):
    """A model with ΔW cut to its best approximations: a run for each of `every` ranks by site.

    `found` are the SVDs of ΔW at all sites, `model` is without adapters. Raises AdapterError where
    the runs cannot be one pack.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optimizer: Optimizer,
        sites: Sequence[Site],
        found: Mapping[str, SVD],
        every: Sequence[Mapping[str, int]],
    ):
        super().__init__(model, data, optimizer)
        runs = [
            {s.name: _cut(model, s, found[s.name].first(k[s.name])) for s in sites} for k in every
        ]
        self.own = nn.ModuleList(adapter for run in runs for adapter in run.values())
        first = range(0, len(runs), CUTS_PER_PASS)
        self.packs = [Pack(model, runs[i : i + CUTS_PER_PASS]) for i in first]
        self.stacks = nn.ModuleList(self.packs)


def _cut(model: nn.Module, site: Site, svd: SVD) -> Adapter:
    """The adapter whose ΔW is the product of these singular triples."""
    layer, r = model.get_submodule(site.layer), max(1, len(svd.S))
    adapter = adapters.adapter_class(layer)(layer, site.parameter, site.rows, Recipe(r, r))
    dtype = torch.promote_types(adapter.weight_of(layer).dtype, torch.float32)
    A, B = svd.Vh.to(dtype), (svd.U * svd.S).to(dtype)
    if not len(svd.S):
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)
    if (padding := getattr(layer, "padding_idx", None)) is not None:
        A[:, padding] = 0  # but for rounding it is
    return adapter.fill({"A": A, "B": B})


def val_loss(quiet: pl.Trainer, module: BaseModule, data: Data) -> float:
    """The validation loss of the model as it is now, by a Trainer that logs nothing."""
    (result,) = quiet.validate(module, data, verbose=False)
    return result[f"{module.prefix}val/loss"]


def cut_losses(
    quiet: pl.Trainer,
    module: BaseModule,
    data: Data,
    updates: Updates,
    found: Mapping[str, SVD],
    every: Sequence[Mapping[str, int]],
) -> Iterator[float]:
    """The validation losses of the model with ΔW cut to each of `every` ranks by site.

    Of adapters whose ΔW is a product all in one pass, as the runs of a pack are; of others, and
    where the model cannot be computed so, with each cut written into the weights.
    """
    if all(map(updates.is_product, updates.sites)):
        try:
            bare = copy_sharing_weights(module.model)
            adapters.detach(bare)
            sites = list(updates.sites.values())
            cuts = CutsModule(bare, data, module.optimizer, sites, found, every)
            quiet.validate(cuts, data, verbose=False)
            yield from cuts.mean_losses().tolist()
            return
        except (RuntimeError, ValueError, TypeError) as error:
            log.info("ΔW is cut to one rank after another: %s", error)
    with updates.cut_weights(found) as cut:
        for ranks in every:
            cut(ranks)
            yield val_loss(quiet, module, data)
