"""Whether a weight can hold a change: finite numbers, within the range of the weight's dtype."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lab.adapters import slots
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.slots import Change


@torch.no_grad()
def require_finite(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Raises AdapterError that names each site whose change is not finite in the weight's dtype."""
    reasons = {}
    for site, change in changes.items():
        weight = change.weight_before_merge
        if weight is None:
            weight = change.weight_of(slots.layer_of(model, site, change))
        if not isinstance(change, Adapter):
            reasons[site] = reason_not_finite(weight, change.value)
        elif not _is_surely_finite(change, weight.dtype):
            reasons[site] = reason_not_finite(weight, change.delta(weight))
    raise_reasons(reasons)


def raise_reasons(reasons: Mapping[str, str | None]) -> None:
    """Raises AdapterError with the reasons of all sites that have one."""
    if shown := [f"'{site}': {reason}" for site, reason in reasons.items() if reason]:
        raise AdapterError("; ".join(shown))


def reason_not_finite(weight: Tensor, values: Tensor) -> str | None:
    """Why `values` cannot be held in the dtype of `weight`; None where they can.

    Nothing is asked of entries where the weight itself is not finite, as in a mask of −inf.
    """
    # By way of a wider dtype: not all dtypes of weights (as float8) can be asked for isfinite.
    wide = values.dtype
    wrong = ~values.to(weight.dtype).to(wide).isfinite() & weight.to(wide).isfinite()
    if not wrong.any():
        return None
    if not values[wrong].isfinite().all():
        return "the change to the weight is not finite: an adapter's tensors, or alpha, overflowed"
    name, limit = str(weight.dtype).removeprefix("torch."), torch.finfo(weight.dtype).max
    largest = values[wrong].abs().max().item()
    return (
        f"it takes numbers up to {largest:.4g}, and {name} ends at {limit:g}; cast to a wider dtype"
    )


def _is_surely_finite(adapter: Adapter, dtype: torch.dtype) -> bool:
    """Whether norms alone tell that ΔW is in the range of `dtype`, so that it need not be formed.

    An entry of B A is the product of a row of B and a column of A, which is at most that of their
    norms (Cauchy and Schwarz). A NaN makes the comparison false.
    """
    if adapter.magnitude is not None:
        return False
    A, B = adapter.factors()
    norms = [torch.linalg.vector_norm(B, dim=-1).max(), torch.linalg.vector_norm(A, dim=-2).max()]
    return bool(abs(adapter.scale) * norms[0] * norms[1] < torch.finfo(dtype).max)
