"""Which rows of a source are for training and which for validation, drawn from a seed."""

import torch
from torch import Tensor

from lora_lab.seeding import generator


def split(rows: int, share: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """The row numbers for training, and the `share` of the rows that is for validation.

    Raises ValueError where one of the two would be empty.
    """
    held_out = round(rows * (share or 0))
    if not 0 < held_out < rows:
        what = "training" if held_out else "validation"
        raise ValueError(f"val_share={share}: leaves none of {rows} rows for {what}")
    order = torch.randperm(rows, generator=generator(seed, "val_share"))
    return order[held_out:].sort().values, order[:held_out].sort().values


def limited(rows: Tensor, limit: int | None, seed: int) -> Tensor:
    """At most `limit` of the rows, drawn by the seed; a larger limit keeps those of a smaller."""
    if limit is None or limit >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=generator(seed, "limit"))
    return rows[order[:limit].sort().values]
