"""What an adapter costs beside full fine-tuning: parameters, and bytes kept and stored."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.slots import all_adapters, attached


@dataclass(frozen=True)
class Count:
    """Parameters by number, the rest in bytes; `full_` is what full fine-tuning would take.

    Optimizer state is Adam's: two numbers for each that trains, in its own dtype.
    """

    trainable: int
    frozen: int
    adapter_bytes: int
    optimizer_bytes: int
    full_trainable: int
    full_bytes: int
    full_optimizer_bytes: int


def count(model: nn.Module) -> Count:
    """What the active adapter of `model` costs."""
    every = {id(p) for a in all_adapters(model).values() for p in a.parameters()}
    base = [p for p in model.parameters() if id(p) not in every]
    made = attached(model).values()
    trained = [p for adapter in made for p in adapter.parameters() if p.requires_grad]
    stored = [t for adapter in made for t in adapter.tensors().values()]
    return Count(
        trainable=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in base),
        adapter_bytes=sum(t.numel() * t.element_size() for t in stored),
        optimizer_bytes=sum(2 * p.numel() * p.element_size() for p in trained),
        full_trainable=sum(p.numel() for p in base),
        full_bytes=sum(p.numel() * p.element_size() for p in base),
        full_optimizer_bytes=sum(2 * p.numel() * p.element_size() for p in base),
    )


def parameter_groups(
    model: nn.Module, lr: float, ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The active adapter's parameters as an optimizer takes them.

    With a `ratio` other than 1 the factor that starts at zero is a group of its own and learns at
    ratio · lr (LoRA+, Hayou et al. 2024). Weight decay is off unless given: on A and B it pulls the
    adapted model toward the base.
    """
    return groups_of(attached(model).values(), lr, ratio, weight_decay)


def groups_of(
    every: Iterable[Adapter], lr: float, ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The same of these adapters."""
    zero: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for adapter in every:
        for key, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                own = ratio != 1 and key == adapter.zero
                (zero if own else rest).append(parameter)
    groups = [(rest, lr), (zero, lr * ratio)]
    return [{"params": ps, "lr": lr, "weight_decay": weight_decay} for ps, lr in groups if ps]
