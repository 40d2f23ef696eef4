"""What a model's outputs are trained for: a loss and validation metrics for each task.

A data module names its task (`Data.task`, a key of TASKS). To add a metric, add it to the task's
`metrics`: it is then logged as `val/<name>` for a base, for each run and for a pack. To add a task,
add an entry to TASKS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

IGNORED = -100
"""The target of a token that counts for nothing, in the loss and in metrics; torch's default."""


@dataclass(frozen=True)
class Task:
    """The loss and the validation metrics of one kind of task.

    A loss is a sum with a count. Sums and counts are added up over whatever one step or one
    validation is computed in (micro-batches, processes, batches of padded rows), and divided once:
    the mean loss does not depend on how the rows were split.

    `loss_sum` takes outputs and targets and gives the sum of their losses. `count` takes targets
    and says how many losses that sum has. `metrics` gives for each metric's name a function from
    the number of outputs (classes, or tokens of a vocabulary) to a torchmetrics Metric, which is
    updated with the outputs and targets of each validation batch.
    """

    loss_sum: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor]
    metrics: dict[str, Callable[[int], Metric]]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of one batch by itself; NaN where none of its targets counts."""
        return self.loss_sum(outputs, targets) / self.count(targets)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of squared differences, over all numbers."""
    return F.mse_loss(
        outputs.float() if outputs.dtype.itemsize < 4 else outputs, targets, reduction="sum"
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross-entropies, in nats, of logits (…, C) with class indices (…).

    Rows or tokens whose target is IGNORED are left out. Logits of half precision are computed with
    in float32.
    """
    logits = logits.flatten(0, -2)  # (N, C)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)


def count_numbers(targets: Tensor) -> Tensor:
    """How many numbers there are to be predicted."""
    return targets.new_tensor(targets.numel())


def count_classes(targets: Tensor) -> Tensor:
    """How many rows or tokens have a class to be predicted."""
    return (targets != IGNORED).sum()


class TokenAccuracy(MulticlassAccuracy):
    """The share of tokens (B, T) whose logit is the largest of logits (B, T, V)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts the tokens of one batch."""
        super().update(preds.flatten(0, 1), target.flatten())


TASKS = {
    "regression": Task(squared_error, count_numbers, {}),
    "classification": Task(
        cross_entropy,
        count_classes,
        {"accuracy": partial(MulticlassAccuracy, average="micro", ignore_index=IGNORED)},
    ),
    "language": Task(
        cross_entropy,
        count_classes,
        {"accuracy": partial(TokenAccuracy, average="micro", ignore_index=IGNORED)},
    ),
}
"""The tasks by the name that a data module gives in `Data.task`."""
