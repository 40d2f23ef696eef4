"""The trained parameters as an optimizer takes them, with LoRA+'s ratio of learning rates."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.slots import also_trained, attached


def parameter_groups(
    model: nn.Module, lr: float, ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What trains of the active adapter, in the groups of a torch optimizer.

    With a `ratio` other than 1 the factor that starts at zero (B; of an embedding, A) is a separate
    group that learns at ratio · lr (LoRA+, Hayou et al. 2024). Weight decay is off unless given:
    on A and B it pulls the adapted model toward the base. What is trained in full beside the
    adapter is the last group, with this lr and weight decay.
    """
    groups = groups_of(attached(model).values(), lr, ratio, weight_decay)
    in_full = [parameter.value for parameter in also_trained(model).values()]
    return groups + [{"params": in_full, "lr": lr, "weight_decay": weight_decay}] * bool(in_full)


def groups_of(
    adapters: Iterable[Adapter], lr: float, ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of `parameter_groups` for these adapters only, which may be stacks of a pack."""
    starts_at_zero: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for adapter in adapters:
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                is_apart = ratio != 1 and name == adapter.starts_at_zero
                (starts_at_zero if is_apart else others).append(parameter)
    rates = [(others, lr), (starts_at_zero, lr * ratio)]
    return [{"params": p, "lr": rate, "weight_decay": weight_decay} for p, rate in rates if p]
