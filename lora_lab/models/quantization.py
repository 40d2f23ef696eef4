"""Weights of a model of transformers in 4 or 8 bits, quantized by bitsandbytes on loading."""

import re
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

Quantization = Literal["nf4", "int8"]
"""4 bits, with constants in 8 bits, as in QLoRA (Dettmers et al. 2023); 8 bits, as in LLM.int8."""


def check_available(quantization: str) -> None:
    """Raises ValueError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization={quantization}: needs bitsandbytes, pip install 'lora_lab[quantized]'"
        )


def quantized_layers(model: Any, new: Collection[str]) -> list[str]:
    """The names of the layers whose weights are to be quantized: the linear ones below the head.

    Not those with a parameter of `new`, which no file holds, and not what transformers keeps in
    float32. `model` may be on the meta device.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*(model._keep_in_fp32_modules or ())]
    new_layers = {name.rpartition(".")[0] for name in new}
    prefix = model.base_model_prefix
    body = f"{prefix}." if hasattr(model, prefix) else ""
    return [
        name
        for name in _linear_layers(model)
        if name.startswith(body) and name not in new_layers and should_convert_module(name, kept)
    ]


def _linear_layers(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and layer is not head
    ]


def loading_arguments(
    quantization: str, model: Any, new: Collection[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of from_pretrained for the model that `model` on the meta device shows.

    Weights are quantized on the CPU, wherever they go then: another device rounds otherwise.
    """
    from transformers import BitsAndBytesConfig

    layers = {*quantized_layers(model, new)}
    # As patterns that fit these names alone: plain names would fit all names that end with them.
    others = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    skipped = [
        f"^{re.escape(name)}$" for name in [*others, *_linear_layers(model)] if name not in layers
    ]
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        settings |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=skipped)
    return {"quantization_config": config, "device_map": {"": "cpu"}}
