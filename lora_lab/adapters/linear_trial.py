"""Whether a subclass of nn.Linear computes x Wᵀ + b: it is tried on a small weight."""

import hashlib
import io
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.watch import base_class

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes in which a layer is tried, since its model may be cast after it got its adapters."""

NOT_COPIED = {*vars(nn.Module()), "in_features", "out_features"}
"""Attributes of which the small layer has its own: parameters, hooks, sizes and the like."""

_results: dict[tuple[Any, ...], bool] = {}
"""What trials gave. Layers of one class with the same attributes are one trial."""


# A forward is any code: it may count its calls, keep its inputs, draw numbers. So what is called is
# another object of the layer's class, with copies of the layer's attributes. A layer
#   Logged(nn.Linear): weight (4096, 4096), bias None, seen=[tensor], log=open(…), model=[Model()]
# is tried as
#   Logged(nn.Linear): weight (3, 5), bias None, seen=[copy of the tensor], log=..., model=...
# where `...` is Python's Ellipsis, with which no forward can do anything but fail.
def computes_as_linear(layer: nn.Linear) -> bool:
    """Whether a layer, of whatever subclass of nn.Linear, computes x Wᵀ + b when it is called.

    In training and in evaluation, in each dtype that it takes, and without random numbers. A layer
    with other parameters, buffers or modules than nn.Linear's does not: it may compute otherwise
    once these have other values.
    """
    parts = {*layer._parameters, *layer._buffers, *layer._modules}
    weight = layer._parameters.get("weight")
    if weight is None or parts - {"weight", "bias", "lora"}:
        return False
    attributes = {name: value for name, value in vars(layer).items() if name not in NOT_COPIED}
    attributes = {name: _pickled(value) for name, value in attributes.items()}
    has_bias = layer._parameters.get("bias") is not None
    digest = hashlib.sha256(pickle.dumps(attributes)).digest()
    key = (Layer := base_class(layer), has_bias, weight.dtype, digest)
    if key not in _results:
        _results[key] = _passes_trial(Layer, has_bias, weight.dtype, attributes)
    return _results[key]


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> None:
        """Refuses what a copy would hold twice: models, and the layer's own weight."""
        if isinstance(value, nn.Module | nn.Parameter):
            raise pickle.PicklingError


def _pickled(value: object) -> bytes:
    """What an attribute is, as bytes; those of Ellipsis where it cannot be copied."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
        return file.getvalue()
    except Exception:  # whatever the attributes of someone's layer raise
        return pickle.dumps(...)


def _passes_trial(
    Layer: type[nn.Module], has_bias: bool, own_dtype: torch.dtype, attributes: dict[str, bytes]
) -> bool:
    """Whether a layer of this class and with these attributes computes x Wᵀ + b.

    It may fail to be called in other dtypes than its own.
    """
    with torch.device("cpu"), _random_numbers_kept() as streams:
        for dtype in {own_dtype: None, **dict.fromkeys(DTYPES)}:
            try:
                layer = _small_layer(Layer, has_bias, dtype, attributes)
                if not all(_is_linear(layer, training) for training in (True, False)):
                    return False
            except Exception:  # whatever the forward of someone's layer raises
                if dtype == own_dtype:
                    return False
        return streams == _random_streams()


def _small_layer(
    Layer: type[Any], has_bias: bool, dtype: torch.dtype, attributes: dict[str, bytes]
) -> Any:
    """A layer with 5 inputs and 3 outputs."""
    layer = object.__new__(Layer)
    nn.Module.__init__(layer)
    layer.__dict__ |= {name: pickle.loads(value) for name, value in attributes.items()}
    layer.__dict__ |= {"in_features": 5, "out_features": 3}
    numbers = _numbers(18).to(dtype)
    weight, bias = nn.Parameter(numbers[:15].view(3, 5)), nn.Parameter(numbers[15:])
    layer._parameters.update(weight=weight, bias=bias if has_bias else None)
    return layer


def _is_linear(layer: Any, training: bool) -> bool:
    """Whether a small layer computes x Wᵀ + b of three dimensions and of two, to rounding."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    layer.__dict__["training"] = training
    x = _numbers(40).view(2, 4, 5).to(weight.dtype)
    exact = [None if one is None else one.detach().double() for one in (weight, bias)]
    bounds = [None if one is None else one.abs() for one in exact]
    for rows in (x, 1000 * x[0]):  # large ones too, which a layer may cut off
        with torch.set_grad_enabled(training), torch.autocast("cpu", enabled=False):
            output = type(layer).forward(layer, rows.clone())
        expected = F.linear(rows.double(), *exact)  # pyright: ignore
        # A sum of n products has an error of n ε times the sum of their absolute values at most.
        bound = 8 * torch.finfo(weight.dtype).eps * F.linear(rows.double().abs(), *bounds)  # pyright: ignore
        if output.dtype != weight.dtype or output.shape != expected.shape:
            return False
        if not ((output.double() - expected).abs() <= bound).all():
            return False
    return True


def _numbers(count: int) -> Tensor:
    """Numbers without a pattern, between −3 and 3."""
    return 3 * torch.arange(1.0, count + 1, dtype=torch.float64, device="cpu").sin()


def _random_streams() -> bytes:
    """The state of the random streams of Python, numpy and torch on the CPU."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()
    return pickle.dumps(states)


@contextmanager
def _random_numbers_kept() -> Iterator[bytes]:
    """A context that leaves all global random streams as they were; gives `_random_streams()`."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield _random_streams()
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
