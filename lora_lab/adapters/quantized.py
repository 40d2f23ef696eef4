"""Weights that a library holds in 4 or 8 bits, and the matrix W that they stand for.

Of bitsandbytes they are the weights of its layers Linear4bit and Linear8bitLt, of torchao tensors
of its classes on ordinary layers. They are known by names, so that neither library is imported
before a model has such a weight. A quantized weight is never written: W is a dense copy, made when
it is asked for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITSANDBYTES = {("bitsandbytes.nn.modules", name) for name in ("Linear4bit", "Linear8bitLt")}
"""Modules and names of the layers of bitsandbytes that multiply by a quantized weight."""


def is_bitsandbytes_linear(Layer: type[nn.Module]) -> bool:
    """Whether a class is a linear layer of bitsandbytes, or a subclass that keeps its forward."""
    bases = [base for base in Layer.__mro__ if (base.__module__, base.__name__) in BITSANDBYTES]
    return bool(bases) and Layer.forward is bases[0].forward


def is_quantized(layer: nn.Module, parameter: str = "weight") -> bool:
    """Whether the parameter is held quantized, so that it cannot be written or trained."""
    weight = layer._parameters.get(parameter)
    return weight is not None and (
        _is_torchao(weight) or _is_4bit(weight) or (parameter == "weight" and _is_8bit(layer))
    )


def is_packed(layer: nn.Module) -> bool:
    """Whether the layer's weight is bitsandbytes', which only its layer can compute with."""
    return is_quantized(layer) and not _is_torchao(layer._parameters["weight"])


def _is_torchao(weight: Any) -> bool:
    # torch.compile follows the first comparison, and not those of a class's module.
    is_plain = type(weight) in (Tensor, nn.Parameter)
    return not is_plain and type(weight).__module__.partition(".")[0] == "torchao"


def _is_4bit(weight: Any) -> bool:
    """Whether it is quantized already: that of a new Linear4bit is once it is moved."""
    return getattr(weight, "quant_state", None) is not None


def _is_8bit(layer: Any) -> bool:
    weight = layer._parameters["weight"]
    return weight.dtype == torch.int8 and is_bitsandbytes_linear(type(layer))


def dense(weight: Any) -> Tensor:
    """What a tensor of torchao stands for; any other tensor as it is."""
    return weight.dequantize() if _is_torchao(weight) else weight


def dense_weight(layer: Any, parameter: str = "weight") -> Tensor:
    """The matrix W of a quantized weight, a new tensor; of any other the parameter itself.

    Of 4 bits it has the dtype that was quantized, of bitsandbytes' 8 bits float32.
    """
    weight = layer._parameters[parameter]
    if not is_quantized(layer, parameter) or _is_torchao(weight):
        return dense(weight)
    with torch.no_grad():
        if _is_4bit(weight):
            from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

            return functional.dequantize_4bit(weight.data, weight.quant_state)
        # Each row is its largest entry (SCB) times integers / 127. The first call of the layer
        # moves SCB from the weight to the layer's state.
        largest = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return weight.data.float() * (largest / 127)[:, None]


def weight_or_shape(layer: Any, parameter: str = "weight") -> Tensor | None:
    """The parameter; where it is quantized, a tensor without memory of W's shape and dtype."""
    weight = layer._parameters.get(parameter)
    if not is_quantized(layer, parameter):
        return weight
    shape, dtype = weight.shape, weight.dtype
    if _is_4bit(weight):
        shape, dtype = weight.quant_state.shape, weight.quant_state.dtype
    elif dtype == torch.int8:
        dtype = torch.float32
    return torch.empty(shape, dtype=dtype, device="meta")


def stored_tensors(weight: Any) -> list[Tensor]:
    """The plain tensors that a tensor of torchao is made of, or the tensor itself."""
    if not _is_torchao(weight):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def shared_state(layer: Any) -> list[Any]:
    """What a layer of bitsandbytes holds of its weight beside it, and copies may share."""
    if not is_packed(layer):
        return []
    if _is_4bit(weight := layer._parameters["weight"]):
        return [weight.quant_state]
    return [value for value in vars(layer.state).values() if isinstance(value, Tensor)]


_passes: dict[tuple[type, str], bool] = {}
"""Whether tensors of torchao of a class, with these settings, pass gradients on."""


def reason_not_adaptable(layer: Any) -> str | None:
    """Why no adapter can sit on a quantized layer; None where one can."""
    weight = layer._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "a call in eval mode has packed its weight for inference, with other numbers and "
            "without gradients; attach before the first call"
        )
    if not _is_torchao(weight) or weight.is_meta or weight.dim() != 2:
        return None
    # Some kinds quantize the layer's input too, and give an output without a gradient.
    key = type(weight), repr(weight.__tensor_flatten__()[1])
    if key not in _passes:
        row = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        try:
            with torch.enable_grad():
                _passes[key] = F.linear(row.requires_grad_(), weight).requires_grad
        except (RuntimeError, NotImplementedError):  # its layer cannot be called either
            return None
    if not _passes[key]:
        return (
            f"torchao's {type(weight).__name__} with these settings passes no gradient on, so that "
            "adapters before it would not train; quantize weights only"
        )
    return None


# On CPUs with bf16 instructions bitsandbytes repacks a 4-bit weight in its first call in eval mode.
# W then has other last digits, and no gradient passes, not even once the layer is in train mode.
# And a layer's bias is cast, in place and to stay, to the dtype in which it computes: after a call
# under autocast or of a layer that was cast it would not be the base's that an adapter belongs to.
# The first call of a layer of 8 bits takes the scales (SCB) from the weight to the layer's state. A
# layer that shares the weight, as of another run, would find none, and quantize the integers again.
def keep_as_loaded(layer: Any) -> None:
    """Has a layer of bitsandbytes leave its weight and bias as they are, until `let_change`.

    It may be of any other kind, and then nothing is done.
    """
    if getattr(layer, "support_avx512bf16_for_cpu", False):
        layer.support_avx512bf16_for_cpu = False
        layer.__dict__["_packing_kept_by_lora"] = True
    is_hooked = _before_call in layer._forward_pre_hooks.values()
    if is_bitsandbytes_linear(type(layer)) and not is_hooked:
        layer.register_forward_pre_hook(_before_call)
        layer.register_forward_hook(_after_call, always_call=True)


def let_change(layer: Any) -> None:
    """Undoes `keep_as_loaded`."""
    if layer.__dict__.pop("_packing_kept_by_lora", False):
        layer.support_avx512bf16_for_cpu = True
    for hooks, hook in (
        (layer._forward_pre_hooks, _before_call),
        (layer._forward_hooks, _after_call),
    ):
        for key in [key for key, one in hooks.items() if one is hook]:
            del hooks[key]
            layer._forward_hooks_always_called.pop(key, None)


def _before_call(layer: Any, args: tuple) -> None:
    """The forward pre-hook that puts a copy in the place of a bias that would be cast."""
    if (bias := layer._parameters["bias"]) is None or not args:
        return
    dtype = args[0].dtype
    if _is_4bit(layer._parameters["weight"]) and layer.compute_type_is_set:
        dtype = layer.compute_dtype or dtype
    if bias.dtype != dtype:
        layer.__dict__["_bias_kept_by_lora"] = bias
        layer._parameters["bias"] = bias.to(dtype)


def _after_call(layer: Any, args: tuple, output: Any) -> None:
    """The forward hook that puts bias and scales back, also where the call has failed."""
    if (bias := layer.__dict__.pop("_bias_kept_by_lora", None)) is not None:
        layer._parameters["bias"] = bias
    weight = layer._parameters["weight"]
    if _is_8bit(layer) and weight.SCB is None:
        weight.CB, weight.SCB = layer.state.CB, layer.state.SCB


OF_BITSANDBYTES = {"compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "state"}
OF_BITSANDBYTES |= {"support_avx512bf16_for_cpu", "_packing_kept_by_lora", "index"}
"""Attributes that layers of bitsandbytes have and nn.Linear has not."""

OF_TRANSFORMERS = {"is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "is_quantized"}
OF_TRANSFORMERS |= {"quantization_method"}
"""Attributes by which a model of transformers says that it is quantized."""


@torch.no_grad()
def dequantize(model: Any) -> None:
    """Puts W in the place of each quantized weight; layers of bitsandbytes become nn.Linear.

    Where no other parameter of the model has W's dtype, as after `model.to(torch.bfloat16)`, which
    leaves quantized weights as they are, W takes that of the others; 8-bit weights always do.
    """
    dtypes = [
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and not ("lora" in name.split(".") or _is_torchao(parameter))
    ]
    for layer in model.modules():
        for name in [name for name in layer._parameters if is_quantized(layer, name)]:
            W = dense_weight(layer, name)
            if dtypes and (_is_8bit(layer) or W.dtype not in dtypes):
                W = W.to(dtypes[0])
            if is_packed(layer):
                layer.__class__ = nn.Linear
                for attribute in OF_BITSANDBYTES & vars(layer).keys():
                    del layer.__dict__[attribute]
            layer._parameters[name] = nn.Parameter(W, requires_grad=False)
    # A model of transformers says in its config how its weights are to be loaded.
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
    for name in OF_TRANSFORMERS & vars(model).keys():
        del model.__dict__[name]
