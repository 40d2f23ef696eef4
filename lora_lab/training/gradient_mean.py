"""The gradient of one optimizer step as that of one mean loss, however its targets are split."""

from collections.abc import Iterable

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn


class GradientMean:
    """Makes the gradient of a step ∇(Σ loss sums / Σ counts), over micro-batches and processes.

    Lightning adds up the gradients of k = `accumulate_grad_batches` micro-batches, each divided by
    k, and averages over P processes. That is the mean over targets only where all micro-batches
    have equally many. Two micro-batches of 30 and 10 tokens, whose losses add up to S₁ and S₂: all
    are divided by the first count, C₁ = 30, so that what Lightning adds up is (S₁/30 + S₂/30) / 2.
    Times k · C₁ / ΣC = 2 · 30 / 40 that is (S₁ + S₂) / 40. An epoch's last group of fewer than k
    micro-batches comes out right likewise. Where k is 1 there is nothing to correct.

    A micro-batch in which no target counts adds nothing. A step in which none counts at all has a
    gradient of zero: the optimizer takes it, so that steps and rates go on as planned.
    """

    def __init__(self) -> None:
        self.first = torch.tensor(1)
        """C₁, the count that all losses of the current step are divided by; at least 1."""
        self.total = torch.tensor(0)
        """ΣC, the counts of the step's micro-batches so far."""

    def scaled(
        self, loss_sum: Tensor, count: Tensor, strategy: Strategy, processes: int, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        """A micro-batch's loss for Lightning to work with, and its count over all processes.

        `is_first`: it is the first micro-batch of a step.
        """
        if processes > 1:
            count = strategy.reduce(count, reduce_op="sum")  # pyright: ignore
            loss_sum = loss_sum * processes
        if is_first:
            self.first, self.total = count.clamp(min=1).to(loss_sum.dtype), count
        else:
            self.total = self.total + count
        return loss_sum / self.first, count

    def correct(self, parameters: Iterable[nn.Parameter], micro_batches: int) -> None:
        """Multiplies the gradients by k · C₁ / ΣC, before they are clipped."""
        factor = micro_batches * self.first / self.total.clamp(min=1)
        if gradients := [p.grad for p in parameters if p.grad is not None]:
            torch._foreach_mul_(gradients, factor)  # pyright: ignore
