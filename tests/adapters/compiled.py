"""`python -m tests.adapters.compiled`: factored adapters under torch.compile, without a break.

All layers with LoRA, and all variants of the first layer, called, and also read without a call;
with `all`, all pairs of them. The truth is the same model without compilation.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab import adapters
from tests.adapters.cases import CASES, move, trained
from tests.adapters.test_read_weights import build as build_reading

LAYERS = ("linear-3d", "gpt2-conv1d", "conv2d-grouped", "conv2d-same", "embedding")
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


if __name__ == "__main__":
    for case in CASES:
        if case.layer.name not in LAYERS or case.variant not in VARIANTS:
            continue
        if case.layer.name != LAYERS[0] and case.variant != VARIANTS[0] and "all" not in sys.argv:
            continue
        torch._dynamo.reset()
        check(case.build(), case.inputs())
        reads = build_reading(case)
        case.attach(reads)
        move(reads)
        check(reads, case.inputs())
