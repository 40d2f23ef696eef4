"""Losses are means over targets, however a step's rows are split and padded.

Independent truth: plain SGD on one batch of all rows of a step, in float64.

Run: make test ARGS=tests/training/test_gradient_mean.py
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lora_lab.config.schema import Optimizer
from lora_lab.training.modules import BaseModule

SGD = {"_target_": "torch.optim.SGD", "lr": 0.5, "schedule": "constant", "warmup": 0.0}
WORDS, CLASSES, IGNORED = 11, 7, -100

Batch = tuple[Tensor, Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(WORDS, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    return layers.double()


def micro_batches(padding: int, counted: tuple[int, ...]) -> list[Batch]:
    """Micro-batches of 4 rows, row i of micro-batch b has counted[b] + i targets that count.

    The others, and `padding` tokens at each row's end, do not; with counted 0 none does.
    """
    rng = torch.Generator().manual_seed(1)
    batches = []
    for most in counted:
        inputs = torch.randint(WORDS, (4, 12), generator=rng)
        targets = torch.randint(CLASSES, (4, 12), generator=rng)
        for i, row in enumerate(targets):
            row[most + i if most else 0 :] = IGNORED
        pad = torch.full((4, padding), IGNORED)
        batches.append((torch.cat([inputs, pad.clamp(min=3)], 1), torch.cat([targets, pad], 1)))
    return batches


class Shares(pl.LightningDataModule):
    """Gives each process its rows of each batch: the first process the first ones."""

    def __init__(self, batches: list[Batch]):
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        share, n = self.trainer.global_rank, self.trainer.world_size
        parts: Any = [(x.chunk(n)[share], y.chunk(n)[share]) for x, y in self.batches]
        return DataLoader(parts, batch_size=None)


def trained(batches: list[Batch], **settings: Any) -> tuple[dict[str, Tensor], float]:
    """Weights and training loss after an epoch by Lightning."""
    module = BaseModule(model(), "language", CLASSES, Optimizer.model_validate(SGD))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", use_distributed_sampler=False, **quiet, **settings
    )
    trainer.fit(module, Shares(batches))
    return module.model.state_dict(), trainer.callback_metrics["train/loss"].item()


def expected(batches: list[Batch], per_step: int) -> tuple[dict[str, Tensor], float]:
    """Likewise by plain SGD, on one batch of all rows of each step."""
    truth, losses, counts = model(), [], []
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.5)
    for i in range(0, len(batches), per_step):
        inputs, targets = (torch.cat(t) for t in zip(*batches[i : i + per_step], strict=True))
        counted = targets != IGNORED
        logits, labels = truth(inputs)[counted], targets[counted]
        if len(labels):
            optimizer.zero_grad()
            cross_entropy(logits, labels).backward()
            optimizer.step()
            losses.append(cross_entropy(logits, labels, reduction="sum").item())
        counts.append(len(labels))
    return truth.state_dict(), sum(losses) / sum(counts)


CASES = {
    "padded": ((3, 3, 3), 1, 1),
    "unequal": ((1, 8, 2), 3, 1),
    "accumulated": ((1, 8, 2, 5), 3, 2),
    "with a remainder of 1": ((1, 8, 2, 5, 7), 0, 2),
    "with a remainder of 2": ((1, 8, 2, 5, 7), 2, 3),
    "one of a step counts for nothing": ((0, 8, 3, 0), 1, 2),
    "a step counts for nothing": ((4, 0, 0, 0, 6), 1, 2),
}


# With two processes, cases that other ones contain are left out.
PROCESSES = [(case, 1) for case in CASES]
PROCESSES += [(case, 2) for case in CASES if case not in ("padded", "accumulated")]


@pytest.mark.parametrize(("case", "processes"), PROCESSES)
def test_as_one_batch_of_all_rows(case: str, processes: int):
    counted, padding, per_step = CASES[case]
    settings: dict[str, Any] = {"accumulate_grad_batches": per_step, "devices": processes}
    settings |= {"strategy": "ddp_fork"} if processes > 1 else {}
    weights, loss = trained(micro_batches(padding, counted), **settings)
    truth, mean = expected(micro_batches(0, counted), per_step)
    for key, value in truth.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-12)
    assert loss == pytest.approx(mean, rel=1e-6)  # Lightning logs in float32


def test_it_is_clipped_after_it_was_made_a_mean():
    batches = micro_batches(0, (1, 8, 2))
    weights, _ = trained(batches, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    truth = model()
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.5)
    for part in (batches[:2], batches[2:]):
        inputs, targets = (torch.cat(t) for t in zip(*part, strict=True))
        optimizer.zero_grad()
        cross_entropy(truth(inputs).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(truth.parameters(), 1e-3)
        optimizer.step()
    for key, value in truth.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-12)
