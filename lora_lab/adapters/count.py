"""What an adapter costs beside full fine-tuning: parameters, and bytes stored and in memory."""

from dataclasses import dataclass

from torch import nn

from lora_lab.adapters.quantized import stored_tensors, weight_or_shape
from lora_lab.adapters.slots import Change, also_trained, attached


@dataclass(frozen=True)
class Count:
    """Numbers of parameters, and bytes; `full_` is what full fine-tuning would take.

    `trainable` are the adapter's trained parameters, `also_trained` those that train in full beside
    it, `frozen` the base's. `adapter_bytes` and `also_trained_bytes` are those of the stored
    adapter, `full_bytes` those of the model's weights as they are held. The optimizer's state is
    Adam's: two numbers for each trained parameter of both kinds, in the parameter's dtype.
    """

    trainable: int
    frozen: int
    adapter_bytes: int
    optimizer_bytes: int
    full_trainable: int
    full_bytes: int
    full_optimizer_bytes: int
    also_trained: int
    also_trained_bytes: int


def count(model: nn.Module) -> Count:
    """What the active adapter of `model` costs."""
    # By the parameter, so that a tied one counts once.
    base = {
        id(weight): (weight_or_shape(layer, name), stored_tensors(weight))
        for layer in model.modules()
        if not isinstance(layer, Change)
        for name, weight in layer._parameters.items()
        if weight is not None
    }.values()
    weights = [weight for weight, _ in base if weight is not None]
    active = attached(model).values()
    trained = [p for adapter in active for p in adapter.parameters() if p.requires_grad]
    in_full = [parameter.value for parameter in also_trained(model).values()]
    stored = [t for adapter in active for t in adapter.tensors().values()]
    return Count(
        trainable=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in weights),
        adapter_bytes=sum(t.numel() * t.element_size() for t in stored),
        optimizer_bytes=sum(2 * p.numel() * p.element_size() for p in [*trained, *in_full]),
        full_trainable=sum(p.numel() for p in weights),
        full_bytes=sum(t.numel() * t.element_size() for _, stored in base for t in stored),
        full_optimizer_bytes=sum(2 * p.numel() * p.element_size() for p in weights),
        also_trained=sum(p.numel() for p in in_full),
        also_trained_bytes=sum(p.numel() * p.element_size() for p in in_full),
    )
