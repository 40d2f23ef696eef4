"""Losses and metrics of the tasks.

Independent truth: scikit-learn's and scipy's functions, over rows and tokens that count alone.

Run: make test ARGS=tests/training/test_tasks.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_lab.report.epochs import goal_of
from lora_lab.training.tasks import IGNORED, TASKS, metric_names, metrics_of

CASES: dict[str, tuple[str, str, tuple[int, ...], int, Callable[..., Any]]] = {
    "accuracy": ("classification", "accuracy", (9,), 5, accuracy_score),
    "accuracy of tokens": ("language", "accuracy", (4, 6), 5, accuracy_score),
    "f1 of class 1": ("classification", "f1", (9,), 2, f1_score),
    "f1 of many": ("classification", "f1", (9,), 5, lambda y, p: f1_score(y, p, average="macro")),
    "f1 of tokens": ("language", "f1", (4, 6), 3, lambda y, p: f1_score(y, p, average="macro")),
    "matthews": ("classification", "matthews", (9,), 2, matthews_corrcoef),
    "matthews of tokens": ("language", "matthews", (4, 6), 4, matthews_corrcoef),
    "pearson": ("regression", "pearson", (9,), 1, lambda y, p: pearsonr(y, p)[0]),
    "spearman": ("regression", "spearman", (9,), 1, lambda y, p: spearmanr(y, p)[0]),
}


def batches(shape: tuple[int, ...], outputs: int, is_regression: bool) -> list[tuple[Tensor, ...]]:
    """Two batches of outputs and targets; one target in four does not count."""
    rng = torch.Generator().manual_seed(3)
    made = []
    for _ in range(2):
        predicted = torch.randn(*shape, outputs, generator=rng)
        if is_regression:
            made.append((predicted, torch.randn(shape, generator=rng) + predicted[..., 0]))
            continue
        targets = torch.randint(outputs, shape, generator=rng)
        targets[torch.rand(shape, generator=rng) < 0.25] = IGNORED
        made.append((predicted, targets))
    return made


@pytest.mark.parametrize("case", CASES)
def test_metrics(case: str):
    task, name, shape, outputs, truth = CASES[case]
    data = batches(shape, outputs, task == "regression")
    metric = metrics_of(task, [name], outputs)[name]
    for predicted, targets in data:
        metric.update(predicted, targets)
    predicted, targets = (
        torch.cat(parts).flatten(0, len(shape) - 1) for parts in zip(*data, strict=True)
    )
    if task == "regression":
        expected = truth(targets, predicted[:, 0])
    else:
        counts = targets.flatten() != IGNORED
        expected = truth(targets.flatten()[counts], predicted.argmax(-1)[counts])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    assert goal_of(f"val/{name}") == "maximize"


def test_perplexity_is_the_exponential_of_the_mean_loss_over_tokens():
    (logits, targets), _ = batches((4, 6), 5, False)
    loss = TASKS["language"].loss(logits, targets)
    perplexity = TASKS["language"].of_loss["perplexity"](loss)
    assert perplexity.log().item() == pytest.approx(
        cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-6
    )
    assert goal_of("val/perplexity") == "minimize"


@pytest.mark.parametrize("task", ["classification", "language"])
def test_smoothed_labels(task: str):
    (logits, targets), _ = batches((9,) if task == "classification" else (4, 6), 5, False)
    counts = targets != IGNORED
    smooth = 0.9 * torch.eye(5)[targets[counts]] + 0.1 / 5
    by_hand = -(smooth * logits[counts].log_softmax(-1)).sum()
    assert TASKS[task].training_loss(0.1)(logits, targets).item() == pytest.approx(by_hand.item())


def test_what_is_chosen():
    assert metric_names("classification", None) == ("accuracy",)
    assert metric_names("regression", None) == ()
    assert metric_names("language", ["perplexity", "f1"]) == ("perplexity", "f1")
    with pytest.raises(ValueError, match=r"metrics=acuracy: language has .*; nearest: accuracy"):
        metric_names("language", ["acuracy"])
    with pytest.raises(ValueError, match="no classes"):
        TASKS["regression"].training_loss(0.1)


def test_outputs_of_one_column_are_as_targets_without_one():
    outputs, targets = torch.randn(5, 1), torch.randn(5)
    error = TASKS["regression"].loss(outputs, targets)
    assert error.item() == pytest.approx((outputs[:, 0] - targets).square().mean().item())
