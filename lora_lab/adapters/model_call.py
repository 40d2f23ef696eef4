"""How a model is called with the inputs of a batch, and how such inputs are split by rows."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

Inputs = Tensor | dict[str, Tensor]
"""What a model is called with: one tensor, or tensors by argument name. Rows are dimension 0."""


def logits(model: nn.Module, *inputs: Inputs) -> Tensor:
    """What the model computes for `inputs`: its output, or the `logits` of its output.

    The models of transformers give an object with several fields, of which `logits` is one. Inputs
    are one dict of tensors by argument name, or tensors in the order of the model's arguments.
    """
    first = inputs[0]
    output: Any = model(**first) if isinstance(first, dict) else model(*inputs)
    return getattr(output, "logits", output)


def row_count(inputs: Inputs) -> int:
    """The number of rows of a batch."""
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def token_count(inputs: Inputs) -> int:
    """The number of tokens of a batch, padding included; 0 where its inputs are no token indices.

    Token indices are whole numbers (rows, tokens): the inputs, or the first of several.
    """
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    return first.numel() if first.dim() == 2 and not first.is_floating_point() else 0


def split_rows(inputs: Inputs, rows: int) -> Iterator[Inputs]:
    """Consecutive pieces of at most `rows` rows."""
    for start in range(0, row_count(inputs), rows):
        yield take_rows(inputs, slice(start, start + rows))


def take_rows(inputs: Inputs, rows: slice) -> Inputs:
    """Some rows of a batch's inputs."""
    if isinstance(inputs, dict):
        return {name: tensor[rows] for name, tensor in inputs.items()}
    return inputs[rows]
