"""`python -m tests.adapters.compiled`: adapters under torch.compile, without a break.

All layers with LoRA, called, and also read without a call, and all variants of the first layer,
called; with `all`, all pairs of them, both ways. The truth is the same model without compilation.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters.watch import KINDS_ON_READING
from tests.adapters.cases import CASES, move, trained
from tests.adapters.test_read_weights import build as build_reading

LAYERS = ("linear-3d", "gpt2-conv1d", "conv2d-grouped", "conv2d-same", "embedding")
LAYERS += ("experts-looped", "experts-gathered")
VARIANTS = ("lora", "pissa", "lora-xs", "dora")


def check(model: nn.Module, x: tuple[Tensor, ...]) -> None:
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, plain = compiled(*x), model(*x)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(y.square().sum(), trained(model))
    expected = torch.autograd.grad(plain.square().sum(), trained(model))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    with adapters.disabled(model):
        torch.testing.assert_close(compiled(*x), model(*x), rtol=1e-12, atol=1e-12)


class ThreeLayers(nn.Module):
    """An embedding, a linear layer, and one whose weight is adapted where it is read."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.mix = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Bilinear(8, 8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fc(self.embed(tokens))
        return self.mix(x, x)


def check_what_was_compiled_before_is_not_used() -> None:
    """Adapters that come, go and come again, on two models of one class in one process."""
    torch._dynamo.reset()
    for seed in range(2):
        model = ThreeLayers()
        compiled: Any = torch.compile(model, backend="aot_eager")
        x = torch.tensor([[1, 2, 6]])
        steps: list[dict[str, Any]] = [
            {},
            {"r": 2},
            {},
            {"r": 2, "seed": 5},
            {"r": 3, "alpha": 9},
            {},
        ]
        for settings in steps:
            if settings:
                adapters.attach(model, "all", **settings)
                move(model, seed)
            y, plain = compiled(x), model(x)
            torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
            gradients = [torch.autograd.grad(z.sum(), trained(model)) for z in (y, plain)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
            adapters.detach(model)


if __name__ == "__main__":
    for case in CASES:
        if case.layer.name not in LAYERS or case.variant not in VARIANTS:
            continue
        if case.layer.name != LAYERS[0] and case.variant != VARIANTS[0] and "all" not in sys.argv:
            continue
        torch._dynamo.reset()
        check(case.build(), case.inputs())
        if case.layer.kind in KINDS_ON_READING:
            continue  # it is read already
        if case.variant != VARIANTS[0] and "all" not in sys.argv:
            continue
        reads = build_reading(case)
        case.attach(reads)
        move(reads)
        check(reads, case.inputs())
    check_what_was_compiled_before_is_not_used()
