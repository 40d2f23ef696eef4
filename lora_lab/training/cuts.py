"""Validation losses of many models in one pass over the data: runs of a pack, or ΔW cut to ranks.

Cutting ΔW to rank k replaces it by its best rank-k approximation, the first k singular triples
(Eckart & Young 1936).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Adapter, Recipe, Site
from lora_lab.adapters.model_call import split_rows
from lora_lab.adapters.pack import Pack, copy_sharing_weights
from lora_lab.analysis.spectra import SVD
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Optimizer
from lora_lab.data import Data
from lora_lab.training.modules import BaseModule, Batch

log = logging.getLogger(__name__)

CUTS_PER_PASS = 64
"""The most cuts of ΔW that are computed as one pack."""


class PackValidationModule(BaseModule):
    """Computes many runs' validation losses in one pass over the data. `packs` hold all runs."""

    def __init__(self, model: nn.Module, data: Data, optimizer: Optimizer):
        super().__init__(model, data.task, data.sizes["out_features"], optimizer)
        self.eval_rows = data.eval_rows
        self.packs: list[Pack] = []
        self.loss_sums: list[Tensor] = []
        """Of each batch, the losses summed over its targets (runs,)."""
        self.target_count = 0
        """The number of these targets that count."""

    def on_validation_epoch_start(self) -> None:
        """Starts the sums at zero."""
        self.loss_sums, self.target_count = [], 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to each run's loss.

        A pack of n runs gets the batch in pieces of 1/n of the rows that one run gets, so that all
        runs' outputs take no more memory than one run's.
        """
        inputs, targets = batch
        batch_sums, first_run = [], 0
        for pack in self.packs:
            rows = max(1, self.eval_rows // len(pack.runs))
            total = torch.zeros(len(pack.runs), dtype=torch.float64)
            # outputs (runs, piece, …), loss sums (runs,)
            for piece, ys in zip(split_rows(inputs, rows), targets.split(rows), strict=True):
                outputs = pack(piece)
                total += self.loss_sums_by_run(outputs, ys).double().cpu()
                self.update_metrics(first_run, outputs, ys)
            batch_sums.append(total)
            first_run += len(pack.runs)
        self.loss_sums.append(torch.cat(batch_sums))  # (runs of all packs,)
        self.target_count += int(self.task.count(targets))

    def loss_sums_by_run(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of each run (runs,), from outputs (runs, rows, …) and shared targets.

        Computed run by run: vmap of a loss takes several passes over all outputs.
        """
        return torch.stack([self.task.loss_sum(output, targets) for output in outputs])

    def update_metrics(self, first_run: int, outputs: Tensor, targets: Tensor) -> None:
        """Updates the metrics of the runs from `first_run` on; none here."""

    def mean_losses(self) -> Tensor:
        """Each run's mean loss over all targets that count (runs,)."""
        return torch.stack(self.loss_sums).sum(0) / self.target_count

    def on_validation_epoch_end(self) -> None:
        """Logs nothing: `mean_losses` is read instead."""


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
            yield from packed.mean_losses().tolist()
            return
        except (RuntimeError, ValueError, TypeError) as error:
            log.info("ΔW is cut to one rank after another: %s", error)
    with updates.cut_weights(svds) as cut:
        for ranks in cuts:
            cut(ranks)
            (result,) = trainer.validate(module, data, verbose=False)
            yield result[f"{module.prefix}val/loss"]
