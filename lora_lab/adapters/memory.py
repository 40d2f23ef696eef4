"""Where a model's parameters are in memory, by which two that are one are known."""

from torch import Tensor, nn

from lora_lab.adapters.quantized import stored_tensors

Span = tuple[int, int, int]
"""Where a weight is in memory: see `memory_span`."""


Parameters = dict[int, dict[Span, list[str]]]
"""Names of parameters by storage and, within it, by span: several where they are tied."""


def parameters_in_memory(model: nn.Module) -> Parameters:
    """The names of the model's parameters by where they are in memory."""
    parameters: Parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not nn.parameter.is_lazy(parameter):
            span = memory_span(parameter)
            parameters.setdefault(span[0], {}).setdefault(span, []).append(name)
    return parameters


def names_at(span: Span, parameters: Parameters) -> list[str]:
    """The names of the parameters that are exactly there."""
    return parameters[span[0]][span]


def names_of_parts(span: Span, parameters: Parameters) -> list[str]:
    """The names of other parameters that share some of this memory."""
    of_storage = parameters[span[0]].items()
    return [name for other, names in of_storage if overlaps(span, other) for name in names]


def memory_span(weight: Tensor) -> Span:
    """Where a weight is in memory: its storage, and its first and last element in bytes.

    A tensor that is made of others, as torchao's, is known by the first of them.

    Two tied weights have the same span, also where they are different Parameter objects. A weight
    on the meta device has no memory, and is known by its object.
    """
    if weight.is_meta:
        return id(weight), 0, 0
    weight = stored_tensors(weight)[0]
    size, first = weight.element_size(), int(weight.storage_offset())
    last = first + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
    return weight.untyped_storage().data_ptr(), first * size, last * size


def overlaps(one: Span, other: Span) -> bool:
    """Whether two different memory spans have bytes in common."""
    return one != other and one[0] == other[0] and one[1] <= other[2] and other[1] <= one[2]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full value of a tensor: one that FSDP spreads over processes is gathered on each."""
    # Known by its method: the import of its class, DTensor, takes half a second.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
