"""Where PEFT computes otherwise than we do: the reasons for which it cannot hold an adapter."""

from typing import Any

from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.peft_parameters import is_held_as_parameter, reason_no_parameter
from lora_lab.adapters.quantized import is_packed, is_quantized
from lora_lab.adapters.sites import Site

TIED_TABLE = "embed_tokens"
"""The name of a table by which PEFT knows that its adapter is to be shared with the head."""


def reason_not_in_peft(model: nn.Module, site: Site, is_mixture: bool) -> str | None:
    """Why PEFT cannot hold a LoRA of this site; None where it can.

    `is_mixture` is `holds_experts(model)`.
    """
    layer = model.get_submodule(site.layer)
    return reason_differs(model, layer, site.name, site.kind, bool(site.tied_to), False, is_mixture)


def reason_differs(
    model: nn.Module,
    layer: nn.Module,
    site: str,
    kind: str,
    is_tied: bool,
    dora: bool,
    is_mixture: bool,
) -> str | None:
    """Why PEFT computes a site of `layer` differently, or not at all; None where it is the same."""
    if not site:
        return "it is the model itself, and PEFT replaces layers of a model"
    if is_tied and (reason := reason_not_tied(model, layer, site, dora)):
        return reason
    if is_held_as_parameter(layer, site, kind, is_mixture):
        return reason_no_parameter(layer, kind, dora)
    return reason_layer_differs(layer, kind, dora)


def reason_not_tied(model: Any, layer: nn.Module, site: str, dora: bool) -> str | None:
    """Why PEFT does not share the adapter of a tied weight; None where it does.

    With ensure_weight_tying it shares that of a table with the head that is tied to it, where the
    table is called embed_tokens. Of one with another name (wte) it adapts one use, without a word.
    """
    adapted = "its weight is tied, and PEFT would adapt one use of it and not the other"
    if site.rpartition(".")[2] != TIED_TABLE:
        return f"{adapted}, as the table is not called {TIED_TABLE}"
    parts = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weight = layer._parameters.get("weight")
    users = [m for m in model.modules() if any(p is weight for p in m._parameters.values())]
    if parts[0] is not layer or {*map(id, users)} != {*map(id, parts)}:
        return f"{adapted}: it is not that of one table and one head"
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return f"{adapted}: the config has no tie_word_embeddings=true"
    return "its weight is tied, and PEFT does not share DoRA's magnitude" if dora else None


def reason_layer_differs(layer: nn.Module, kind: str, dora: bool) -> str | None:
    """Why PEFT computes this layer differently, or not at all; None where it is the same."""
    if kind == "weight" and isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d):
        return f"{type(layer).__name__} computes otherwise than the layer that PEFT takes it for"
    if kind == "weight":
        return f"PEFT cannot adapt this weight of {type(layer).__name__} wherever it is read"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if any(step != 1 for step in layer.dilation):
            return f"dilation={layer.dilation}, and PEFT's A is not dilated"
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}, and PEFT's A pads with zeros"
        if dora and layer.groups > 1:
            return f"groups={layer.groups} with DoRA, whose norm PEFT takes over wrong channels"
    padding = getattr(layer, "padding_idx", None)
    weight = layer._parameters.get("weight")  # the base's, where reading it gives W + ΔW
    if dora and padding is not None and weight is not None and bool(weight[padding].any()):
        return f"padding_idx={padding} with DoRA: PEFT scales its vector, which is not zero here"
    return None


def reason_form_differs(layer: Any, kind: str, adapter: Adapter) -> str | None:
    """Why PEFT's VERA, LOHA or LOKR (`kind`) computes otherwise than this adapter; None if not."""
    is_vera = kind == "VERA"
    weight = layer._parameters["weight"]
    if adapter.magnitude is not None:
        return f"PEFT's {kind} has no DoRA"
    if isinstance(adapter, TransposedLinearAdapter) and not is_vera:
        return f"PEFT's {kind} is not for {type(layer).__name__}, whose weight is in × out"
    if isinstance(layer, nn.Conv3d):
        return f"PEFT's {kind} is not for Conv3d"
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}, and PEFT's ΔW pads with zeros"
    if isinstance(layer, nn.Conv1d) and "D" in adapter.tensors():
        return "PEFT's LoKr is no Kronecker product for a Conv1d whose second matrix is whole"
    if not is_vera and is_packed(layer) and weight.shape != adapter.shape:
        return f"its weight has 4 bits, and PEFT's {kind} takes their shape for that of the weight"
    if is_vera and is_quantized(layer) and not is_packed(layer):
        return "its weight is torchao's, on which PEFT's VERA raises an error"
    return None
