"""What is forgotten: the loss of an adapted model on the data that its base knew.

It is measured at each validation, on the validation rows of `Data.known`, and logged as
`forget/loss`, with the metrics of these rows' task. At a run's end `forget/increase` is logged.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_lab.adapters.model_call import Inputs, row_count
from lora_lab.data import Data
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.tasks import TASKS, metric_names, metrics_of


class Forgetting(nn.Module):
    """Sums the losses of a model, and updates metrics, on the validation rows of `data`.

    Where processes share the rows, sums and counts are each process's.
    """

    def __init__(self, data: Data):
        super().__init__()
        self.task, self.outputs_of = TASKS[data.task], data.outputs_of
        self.metric_names = metric_names(data.task, data.metrics)
        self.metrics = nn.ModuleDict(
            metrics_of(data.task, self.metric_names, data.sizes["out_features"])
        )
        self.loss_sums: list[Tensor] = []
        """Of each batch of this validation, the summed losses, on the device."""
        self.counts: list[Tensor] = []
        """How many targets count in each of them."""

    def reset(self) -> None:
        """Forgets the batches of the validation before."""
        self.loss_sums.clear()
        self.counts.clear()
        for metric in self.metrics.values():
            metric.reset()  # pyright: ignore

    def add(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> None:
        """Adds a batch."""
        outputs = self.outputs_of(model, inputs)
        self.loss_sums.append(self.task.loss_sum(outputs, targets))
        self.counts.append(self.task.count(targets))
        if row_count(inputs):  # a process has none where there are fewer rows than processes
            for metric in self.metrics.values():
                metric.update(outputs, targets)  # pyright: ignore

    def row(self, total: Callable[[list[Tensor]], Tensor]) -> dict[str, Any]:
        """The loss and the metrics over all batches; {} before the first.

        `total` adds up numbers over processes, and gives those of the batches (batches,).
        """
        if not self.counts:
            return {}
        loss = total(self.loss_sums).sum() / total(self.counts).sum()
        return {"loss": loss, **self.metrics_of_loss(loss), **dict(self.metrics.items())}

    def metrics_of_loss(self, loss: Tensor) -> dict[str, Tensor]:
        """The metrics that follow from the mean loss, as perplexity."""
        functions = self.task.of_loss
        return {name: functions[name](loss) for name in self.metric_names if name in functions}


def log_increase(tracking: Tracking) -> None:
    """Logs by how much the loss on what the base knew is higher at a run's end than before it.

    Nothing where that loss was not measured.
    """
    if rows := [row for row in tracking.rows if "forget/loss" in row]:
        increase = rows[-1]["forget/loss"] - rows[0]["forget/loss"]
        tracking.log({"forget/increase": increase}, rows[-1]["step"])
