"""Clipping of gradients in a pack: each run's by itself."""

from collections.abc import Sequence

from torch import nn

from lora_lab.adapters.pack import Pack


def clip_gradients(packs: Sequence[Pack], limit: float, algorithm: str) -> None:
    """Clips each run's gradient, all its parameters together, to `limit` by its norm, or by value.

    As torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do for one run. Runs 2 and 3 of a pack,
    stacked on a site, have one gradient A.grad (2, r, in): its two sums of squares are added to
    entries 2 and 3 of `squared_norms` (runs,).
    """
    for pack in packs:
        if algorithm == "value":
            nn.utils.clip_grad_value_(pack.parameters(), limit)
            continue
        gradients = [
            (slice(start, start + len(p.grad)), p.grad)  # the stack's runs, (runs of it, …)
            for start, stack in pack.stacks
            for p in stack.adapter.parameters()
            if p.grad is not None
        ]
        squared_norms = gradients[0][1].new_zeros(len(pack.runs))
        for runs, gradient in gradients:
            squared_norms[runs] += gradient.flatten(1).square().sum(1)
        factors = (limit / (squared_norms.sqrt() + 1e-6)).clamp(max=1)  # (runs,)
        for runs, gradient in gradients:
            gradient.mul_(factors[runs].view(-1, *[1] * (gradient.dim() - 1)))
