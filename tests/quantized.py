"""bitsandbytes and torchao for the tests that need them, and layers quantized by them."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@contextmanager
def quantized_libraries() -> Iterator[None]:
    """A context in which bitsandbytes and torchao are importable; skips the test where they cannot.

    They are installed in a folder of their own: where bitsandbytes is importable, PEFT and
    transformers import it, which takes seconds in each process. Both libraries keep the answer
    whether it is importable, so it is asked again here and afterwards.
    """
    folder = str(Path(sys.prefix) / "quantized")
    sys.path.append(folder)
    try:
        for library in ("bitsandbytes", "torchao"):
            pytest.importorskip(library)
        _ask_again()
        yield
    finally:
        sys.path.remove(folder)
        _ask_again()


def _ask_again() -> None:
    from peft import import_utils as of_peft
    from transformers.utils import import_utils as of_transformers

    for module in (of_peft, of_transformers):
        for name in ("is_bnb_available", "is_bnb_4bit_available", "is_bitsandbytes_available"):
            if hasattr(answer := getattr(module, name, None), "cache_clear"):
                answer.cache_clear()  # pyright: ignore[reportOptionalMemberAccess]


def nf4(layer: nn.Linear, **settings: Any) -> nn.Module:
    """The layer in 4 bits, as QLoRA holds it."""
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    held = Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4", **settings)
    held.load_state_dict(layer.state_dict())
    return held.to("cpu")  # which quantizes


def int8(layer: nn.Linear) -> nn.Module:
    """The layer in 8 bits, as LLM.int8 holds it."""
    from bitsandbytes.nn import Linear8bitLt  # pyright: ignore[reportMissingImports]

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    held = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    held.load_state_dict(layer.state_dict())
    return held.to("cpu")


def torchao(layer: nn.Linear, config: str, **settings: Any) -> nn.Module:
    """The layer with a weight that torchao quantized."""
    from torchao import quantization  # pyright: ignore[reportMissingImports]

    holder = nn.Sequential(layer)
    quantization.quantize_(holder, getattr(quantization, config)(**settings))
    return holder[0]


QUANTIZED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": nf4,
    "nf4-in-fp16": functools.partial(nf4, quant_storage=torch.float16),
    "int8": int8,
    "torchao-int8": functools.partial(torchao, config="Int8WeightOnlyConfig"),
    "torchao-int4": functools.partial(
        torchao,
        config="IntxWeightOnlyConfig",
        weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
    ),
}
"""Ways to quantize an nn.Linear, by name."""
