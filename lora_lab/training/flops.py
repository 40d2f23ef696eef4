"""Counts the floating-point operations (FLOPs) of a training step, by torch's own counter."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Formula = Callable[..., int]
"""The FLOPs of an operation, of the shapes of its arguments and of its result `out_shape`."""


def flop_counter() -> FlopCounterMode:
    """A context that counts the FLOPs of matrix products, convolutions and attention in it.

    A multiplication and an addition are two. What torch's counter leaves out is counted too:
    attention on a CPU, the products of experts in groups of tokens, and those of bitsandbytes.
    Elementwise operations and recurrent layers are left out, as torch does.
    """
    return FlopCounterMode(display=False, custom_mapping=dict(_more_formulas()))


def _more_formulas() -> Iterator[tuple[Any, Formula]]:
    """The formulas of operations that torch's counter does not know, where torch has these."""
    aten = torch.ops.aten
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_grouped_mm": _grouped_product,
    }
    of_bitsandbytes = dict.fromkeys(("gemm_4bit", "gemv_4bit", "int8_linear_matmul"), _product)
    for namespace, by_name in ((aten, formulas), (torch.ops.bitsandbytes, of_bitsandbytes)):
        for name, formula in by_name.items():
            if hasattr(namespace, name):
                yield getattr(namespace, name), formula


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Q Kᵀ and its product with V: query (…, T, d), key (…, S, d), value (…, S, d)."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    """Q Kᵀ once more, and the gradients of V, of the scores, of Q and of K: five products."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _grouped_product(left: Any, right: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """A product for each group of rows: left (rows, in), right (groups, in, out).

    Or, for the gradient of `right`: left (in, rows), right (rows, out), each group a part of rows.
    """
    return 2 * prod(left) * right[-1]


def _product(left: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """A product with a quantized weight: left (…, in), the result (…, out)."""
    return 2 * prod(left) * out_shape[-1]
