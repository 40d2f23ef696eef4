"""Which rows of a source are for training, validation and testing, drawn from a seed."""

from collections.abc import Sequence

import numpy as np
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


# numpy's RandomState is what pandas draws from, so that these are the rows of scripts that split a
# data frame: df.sample(frac=1, random_state=seed), then df[:n], df[n:m] and df[m:].
def shared_out(rows: Tensor, shares: Sequence[float], seed: int) -> tuple[Tensor, ...]:
    """The rows in an order drawn by `seed`, cut into consecutive parts of these shares.

    Each part but the last has ⌊share · rows⌋ rows. Raises ValueError where one would be empty.
    """
    order = np.random.RandomState(seed).choice(len(rows), len(rows), replace=False)
    sizes = [int(len(rows) * share) for share in shares[:-1]]
    sizes.append(len(rows) - sum(sizes))
    if min(sizes) == 0:
        raise ValueError(f"shares={list(shares)}: leaves none of {len(rows)} rows for one of them")
    return rows[torch.from_numpy(order)].split(sizes)


def balanced(classes: Tensor, seed: int) -> Tensor:
    """The rows of each class (N,), those of larger ones drawn down to the number of the rarest.

    They are class by class; of each the rows are df.sample(n, random_state=seed).
    """
    by_class = [(classes == c).nonzero().flatten() for c in range(int(classes.max()) + 1)]
    least = min(map(len, by_class))
    chosen = []
    for rows in by_class:
        if len(rows) > least:
            draw = np.random.RandomState(seed).choice(len(rows), least, replace=False)
            rows = rows[torch.from_numpy(draw)]
        chosen.append(rows)
    return torch.cat(chosen)
