"""The losses of the runs of packs, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.model_call import Inputs, split_rows
from lora_lab.data import Data
from lora_lab.training.modules import Batch
from lora_lab.training.tasks import TASKS, Loss

UpdateMetrics = Callable[[int, Tensor, Tensor], None]
"""Takes the index of a pack's first run, its runs' outputs for some rows, and their targets."""


class PackLosses:
    """The losses of many runs on the validation rows of `data`, summed batch by batch."""

    def __init__(self, data: Data):
        self.task, self.eval_rows = TASKS[data.task], data.eval_rows
        self.outputs_of = data.outputs_of
        self.sums: list[Tensor] = []
        """Of each batch, the losses summed over its targets (runs,)."""
        self.target_count = 0
        """The number of these targets that count."""

    def reset(self) -> None:
        """Starts the sums at zero."""
        self.sums, self.target_count = [], 0

    def add(self, packs: Sequence[Any], batch: Batch, update_metrics: UpdateMetrics) -> None:
        """Adds a batch to each run's loss. `packs` hold all runs.

        A pack of n runs gets the batch in pieces of 1/n of the rows that one run gets, so that all
        runs' outputs take no more memory than one run's.
        """
        inputs, targets = batch
        batch_sums, first_run = [], 0
        for pack in packs:
            rows = max(1, self.eval_rows // len(pack.runs))
            total = torch.zeros(len(pack.runs), dtype=torch.float64)
            # outputs (runs, piece, …), loss sums (runs,)
            for outputs, ys in self._pieces(pack, inputs, targets, rows):
                total += loss_sums_by_run(self.task.loss_sum, outputs, ys).double().cpu()
                update_metrics(first_run, outputs, ys)
            batch_sums.append(total)
            first_run += len(pack.runs)
        self.sums.append(torch.cat(batch_sums))  # (runs of all packs,)
        self.target_count += int(self.task.count(targets))

    def _pieces(
        self, pack: Any, inputs: Inputs, targets: Tensor, rows: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The outputs and targets of a batch, in pieces of at most so many rows.

        Computed piece by piece, and given as one where the losses of rows depend on each other.
        """
        outputs = (pack(x, outputs_of=self.outputs_of) for x in split_rows(inputs, rows))
        if self.task.compares_rows:
            return iter([(torch.cat([*outputs], 1), targets)])
        return zip(outputs, targets.split(rows), strict=True)

    def means(self) -> Tensor:
        """Each run's mean loss over all targets that count (runs,)."""
        return torch.stack(self.sums).sum(0) / self.target_count


def loss_sums_by_run(loss_sum: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of each run (runs,), from outputs (runs, rows, …) and shared targets.

    Computed run by run: vmap of a loss takes several passes over all outputs.
    """
    return torch.stack([loss_sum(output, targets) for output in outputs])
