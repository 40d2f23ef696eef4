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


@dataclass(frozen=True)
class Task:
    """The loss and the validation metrics of one kind of task.

    `loss` takes outputs and targets and gives their mean loss. `metrics` gives for each metric's
    name a function from the number of outputs (classes, or tokens of a vocabulary) to a
    torchmetrics Metric, which is updated with the outputs and targets of each validation batch.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: dict[str, Callable[[int], Metric]]


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of logits (B, T, V) with the next tokens (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())  # (B·T, V) with (B·T,)


class TokenAccuracy(MulticlassAccuracy):
    """The share of tokens (B, T) whose logit is the largest of logits (B, T, V)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts the tokens of one batch."""
        super().update(preds.flatten(0, 1), target.flatten())


TASKS = {
    "regression": Task(F.mse_loss, {}),
    "classification": Task(
        F.cross_entropy, {"accuracy": partial(MulticlassAccuracy, average="micro")}
    ),
    "language": Task(next_token_loss, {"accuracy": partial(TokenAccuracy, average="micro")}),
}
"""The tasks by the name that a data module gives in `Data.task`."""
