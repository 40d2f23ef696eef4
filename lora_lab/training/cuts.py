"""Validation losses of many models in one pass over the data: runs of a pack, or ΔW cut to ranks.

Cutting ΔW to rank k replaces it by its best rank-k approximation, the first k singular triples
(Eckart & Young 1936).
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Adapter, Recipe, Site
from lora_lab.adapters.model_call import Inputs
from lora_lab.adapters.pack import Pack, copy_sharing_weights
from lora_lab.analysis.spectra import SVD
from lora_lab.analysis.truncation import CutLosses
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Optimizer
from lora_lab.data import Data
from lora_lab.training.modules import BaseModule, Batch
from lora_lab.training.pack_losses import PackLosses

log = logging.getLogger(__name__)

CUTS_PER_PASS = 64
"""The most cuts of ΔW that are computed as one pack."""


def _no_metrics(first_run: int, outputs: Tensor, targets: Tensor) -> None:
    """Updates no metrics."""


class PackValidationModule(BaseModule):
    """Computes many runs' validation losses in one pass over the data. `packs` hold all runs."""

    def __init__(self, model: nn.Module, data: Data, optimizer: Optimizer):
        super().__init__(model, data.task, data.sizes["out_features"], optimizer)
        self.packs: list[Any] = []
        self.val_losses = PackLosses(data)

    def on_validation_epoch_start(self) -> None:
        """Starts the sums at zero."""
        self.val_losses.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to each run's loss."""
        self.val_losses.add(self.packs, batch, _no_metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs nothing: the means of `val_losses` are read instead."""


class OneModel(nn.Module):
    """A model in the place of a pack: its outputs are those of one run, (1, …)."""

    runs = (None,)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs, outputs_of: Callable[..., Tensor]) -> Tensor:
        """The outputs (1, rows, …)."""
        return outputs_of(self.model, inputs)[None]


class CutsModule(PackValidationModule):
    """Validates a model with ΔW cut to several ranks, one run of a pack for each cut.

    `runs` are each cut's adapters by site, whose ΔW is cut. `model` has no adapters. Raises
    AdapterError if the cuts cannot be one pack.
    """

    def __init__(
        self, model: nn.Module, data: Data, optimizer: Optimizer, runs: list[dict[str, Adapter]]
    ):
        super().__init__(model, data, optimizer)
        self.adapters = nn.ModuleList(adapter for run in runs for adapter in run.values())
        first = range(0, len(runs), CUTS_PER_PASS)
        self.packs = [Pack(model, runs[i : i + CUTS_PER_PASS]) for i in first]
        # Registered as submodules, so that they move to the device with the model.
        self.stacks = nn.ModuleList(self.packs)


def _cut(model: nn.Module, site: Site, svd: SVD, kind: type[Adapter]) -> Adapter:
    """An adapter whose ΔW is U diag(S) Vh: A = Vh (k × in), B = U diag(S) (out × k), scale 1."""
    layer, r = model.get_submodule(site.layer), max(1, svd.k)
    adapter = kind(layer, site.parameter, site.rows, Recipe(r, r))
    dtype = torch.promote_types(adapter.weight_of(layer).dtype, torch.float32)
    A, B = svd.Vh.to(dtype), (svd.U * svd.S[..., None, :]).to(dtype)
    if not svd.k:  # rank 0 as a zero of rank 1
        A, B = F.pad(A, (0, 0, 0, 1)), F.pad(B, (0, 1))
    if (padding := getattr(layer, "padding_idx", None)) is not None:
        A[:, padding] = 0  # ΔW of the padding token is zero, but the SVD has rounding errors
    return adapter.fill({"A": A, "B": B})


def _without_adapters(model: nn.Module) -> nn.Module:
    """A copy without adapters, over the base's weights and the values trained in full."""
    bare = copy_sharing_weights(model)
    adapters.detach(bare)
    for key, parameter in adapters.also_trained(model).items():
        path, _, name = key.rpartition(".")
        weight = bare.get_parameter(key)
        value = nn.Parameter(parameter.value.detach().to(weight.dtype), requires_grad=False)
        # Not `weight.copy_`, which would write to the base that the copy shares.
        bare.get_submodule(path)._parameters[name] = value
    return bare


def cut_losses(
    trainer: pl.Trainer,
    module: BaseModule,
    data: Data,
    updates: Updates,
    svds: Mapping[str, SVD],
    cuts: Sequence[Mapping[str, int]],
) -> Iterator[float]:
    """Yields the validation loss of the model with ΔW cut to the ranks by site of each of `cuts`.

    `svds` are those of ΔW by site. If all ΔW are products of two factors, the cuts are computed in
    one pass, as the runs of a pack. Otherwise, and if the model cannot be computed under vmap, each
    cut in turn is written into the weights.
    """
    data = copy.copy(data)
    data.known = None  # the loss on it is asked for by itself
    if all(map(updates.is_product, updates.sites)):
        try:
            bare = _without_adapters(module.model)
            kinds = {name: type(adapter) for name, adapter in updates.adapters_by_site.items()}
            sites = updates.sites.items()
            runs = [
                {n: _cut(bare, s, svds[n].first(ranks[n]), kinds[n]) for n, s in sites}
                for ranks in cuts
            ]
            packed = CutsModule(bare, data, module.optimizer, runs)
            trainer.validate(packed, data, verbose=False)
            yield from packed.val_losses.means().tolist()
            return
        except (RuntimeError, ValueError, TypeError) as error:
            log.info("ΔW is cut to one rank after another: %s", error)
    one_by_one = PackValidationModule(module.model, data, module.optimizer)
    one_by_one.packs = [OneModel(module.model)]
    with updates.cut_weights(svds) as cut:
        for ranks in cuts:
            cut(ranks)
            trainer.validate(one_by_one, data, verbose=False)
            yield one_by_one.val_losses.means().item()


def losses_of_cuts(
    trainer: pl.Trainer, module: BaseModule, data: Data, updates: Updates
) -> dict[str, CutLosses]:
    """`cut_losses` of the validation, as `loss`, and of what the base knew, as `forget_loss`.

    The latter is left out where what it knew is not known.
    """
    losses: dict[str, CutLosses] = {"loss": partial(cut_losses, trainer, module, data, updates)}
    if data.known is not None:
        losses["forget_loss"] = partial(cut_losses, trainer, module, data.known, updates)
    return losses
