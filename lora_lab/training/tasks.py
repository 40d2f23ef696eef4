"""What a model's outputs are trained for: a loss and validation metrics for each task.

A data module names its task (`Data.task`, a key of TASKS) and may choose metrics by name
(`Data.metrics`). To add a metric, add it to the task's `metrics`: it can then be logged as
`val/<name>` for a base, for each run and for a pack. To add a task, add an entry to TASKS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from lora_lab.config.schema import nearest

IGNORED = -100
"""The target of a token that counts for nothing, in the loss and in metrics; torch's default."""

PAIR_SCALE = 20.0
"""What cosines of embeddings are multiplied with, to be logits."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes outputs and targets and gives the sum of their losses."""


@dataclass(frozen=True)
class Task:
    """The loss and the validation metrics of one kind of task.

    A loss is a sum with a count. Sums and counts are added up over whatever one step or one
    validation is computed in (micro-batches, processes, batches of padded rows), and divided once:
    the mean loss does not depend on how the rows were split.

    `count` takes targets and says how many losses their sum has. `metrics` gives for each metric's
    name a function from the number of outputs (classes, or tokens of a vocabulary) to a
    torchmetrics Metric, which is updated with the outputs and targets of each validation batch.
    `of_loss` has metrics that are a function of the mean validation loss. `default_metrics` are
    logged where the data chooses none. `smoothed` gives the loss with label smoothing, for training
    alone; None where a task has no such thing.
    """

    loss_sum: Loss
    count: Callable[[Tensor], Tensor]
    metrics: dict[str, Callable[[int], Metric]]
    default_metrics: tuple[str, ...] = ()
    of_loss: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    smoothed: Callable[[float], Loss] | None = None
    compares_rows: bool = False
    """Whether a row's loss depends on the others of its batch, which must come as one."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of one batch by itself; NaN where none of its targets counts."""
        return self.loss_sum(outputs, targets) / self.count(targets)

    def training_loss(self, label_smoothing: float) -> Loss:
        """The summed loss that is trained on. Raises ValueError for a task without smoothing."""
        if not label_smoothing:
            return self.loss_sum
        if self.smoothed is None:
            raise ValueError("the task has no classes to be smoothed")
        return self.smoothed(label_smoothing)


def _in_float32(outputs: Tensor) -> Tensor:
    """Outputs of half precision in float32, others as they are."""
    return outputs.float() if outputs.dtype.itemsize < 4 else outputs


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of squared differences, over all numbers.

    Outputs of another shape are taken as the targets', as (B, 1) for targets (B,).
    """
    return F.mse_loss(_in_float32(outputs).reshape(targets.shape), targets, reduction="sum")


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The sum of cross-entropies, in nats, of logits (…, C) with class indices (…).

    Rows or tokens whose target is IGNORED are left out. Logits of half precision are computed with
    in float32. With `label_smoothing` ε a target is 1 − ε + ε/C at its class and ε/C at each other.
    """
    return F.cross_entropy(
        _in_float32(logits.flatten(0, -2)),  # (N, C)
        targets.flatten(),
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def smoothed_cross_entropy(label_smoothing: float) -> Loss:
    """Cross-entropy with smoothed labels."""
    return partial(cross_entropy, label_smoothing=label_smoothing)


def scores_of_pairs(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How like each first text is to each second one (B, B), as logits, and where its own stands.

    `outputs` (2 B, d) are the embeddings of the B first texts, and then of the second ones. The
    scores are cosines × 20, as sentence-transformers trains its models.
    """
    first, second = F.normalize(_in_float32(outputs), dim=-1).chunk(2)  # (B, d) each
    return PAIR_SCALE * first @ second.T, targets[: len(first)]


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over B pairs of the cross-entropy of a first text's scores with all second ones.

    This is InfoNCE with the others of a batch as negatives (van den Oord et al. 2018), also named
    MultipleNegativesRankingLoss. `targets` (2 B,) are 0 … B − 1, and IGNORED for the second texts.
    """
    return cross_entropy(*scores_of_pairs(outputs, targets))


def count_numbers(targets: Tensor) -> Tensor:
    """How many numbers there are to be predicted."""
    # Filled on the device: a number that is copied there would make the CPU wait for a GPU.
    return torch.full((), targets.numel(), device=targets.device)


def count_classes(targets: Tensor) -> Tensor:
    """How many rows or tokens have a class to be predicted."""
    return (targets != IGNORED).sum()


class OfTokens(Metric):
    """Mixed into a metric of classes: logits (…, C) and targets (…) of any shape are flattened.

    Rows (B, C) stay as they are; tokens (B, T, C) become rows.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds one batch."""
        super().update(preds.flatten(0, -2), target.flatten())


class Accuracy(OfTokens, MulticlassAccuracy):
    """The share of rows, or of tokens, whose class has the largest logit."""


class MacroF1(OfTokens, MulticlassF1Score):
    """The mean over classes of F1."""


class Matthews(OfTokens, MulticlassMatthewsCorrCoef):
    """The correlation of classes and predictions (Matthews 1975; CoLA's metric)."""


class F1OfClass1(BinaryF1Score):
    """F1 of class 1 of two (MRPC's and QQP's metric)."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds one batch: logits (…, 2), targets (…)."""
        super().update(preds.argmax(-1).flatten(), target.flatten())


def f1(classes: int) -> Metric:
    """F1 of class 1 where there are two classes, else the mean of all classes' F1."""
    if classes == 2:
        return F1OfClass1(ignore_index=IGNORED)
    return MacroF1(classes, average="macro", ignore_index=IGNORED)


class MeanOverOutputs(Metric):
    """Mixed into a correlation: outputs (B, n) give the mean of their n correlations."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds one batch: outputs (B, n) or (B,), targets of as many numbers."""
        n: Any = self.num_outputs
        shape = (-1, n) if n > 1 else (-1,)
        super().update(preds.float().reshape(shape), target.float().reshape(shape))

    def compute(self) -> Tensor:
        """The mean correlation."""
        return super().compute().mean()


class Pearson(MeanOverOutputs, PearsonCorrCoef):
    """The linear correlation of outputs and targets (STS-B's metric)."""


class Spearman(MeanOverOutputs, SpearmanCorrCoef):
    """The correlation of the ranks of outputs and targets. Keeps all outputs of a validation."""


class PairAccuracy(MeanMetric):
    """The share of first texts whose own second text is the most like them of its batch."""

    def update(self, value: Tensor, weight: Tensor) -> None:  # pyright: ignore
        """Adds one batch: embeddings (2 B, d), and targets as `contrastive` takes them."""
        scores, own = scores_of_pairs(value, weight)
        super().update((scores.argmax(1) == own).float())


OF_CLASSES: dict[str, Callable[[int], Metric]] = {
    "accuracy": partial(Accuracy, average="micro", ignore_index=IGNORED),
    "f1": f1,
    "matthews": partial(Matthews, ignore_index=IGNORED),
}

TASKS = {
    "regression": Task(
        squared_error,
        count_numbers,
        {
            "pearson": lambda n: Pearson(num_outputs=n),
            "spearman": lambda n: Spearman(num_outputs=n),
        },
    ),
    "classification": Task(
        cross_entropy,
        count_classes,
        OF_CLASSES,
        default_metrics=("accuracy",),
        smoothed=smoothed_cross_entropy,
    ),
    "language": Task(
        cross_entropy,
        count_classes,
        OF_CLASSES,
        default_metrics=("accuracy",),
        of_loss={"perplexity": torch.exp},
        smoothed=smoothed_cross_entropy,
    ),
    "pairs": Task(
        contrastive,
        count_classes,
        {"accuracy": lambda _: PairAccuracy()},
        default_metrics=("accuracy",),
        compares_rows=True,
    ),
}
"""The tasks by the name that a data module gives in `Data.task`."""


def metric_names(task: str, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the metrics that a data module's `metrics` choose; None: the task's defaults.

    Raises ValueError for a name that the task does not have.
    """
    if chosen is None:
        return TASKS[task].default_metrics
    known = [*TASKS[task].metrics, *TASKS[task].of_loss]
    for name in chosen:
        if name not in known:
            raise ValueError(f"metrics={name}: {task} has {', '.join(known)}{nearest(name, known)}")
    return tuple(chosen)


def metrics_of(task: str, names: Sequence[str], outputs: int) -> dict[str, Metric]:
    """New torchmetrics of a task by name, for a model with so many outputs."""
    makers: dict[str, Any] = TASKS[task].metrics
    return {name: makers[name](outputs) for name in names if name in makers}
