"""What several runs train on one site, stacked in one adapter."""

import copy
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.trained_in_full import FullParameter

MAX_PADDING = 2**13
"""Zeros that may be added to a stack so that it takes in runs of another rank.

At a few hundred rows on a CPU they cost a step no more than the further stack would.
"""


def group_by_rank(run_adapters: list[Adapter]) -> list[list[Adapter]]:
    """Splits the adapters of consecutive runs into those that share a stack.

    Neighbours share one where they have the same rank, or where MAX_PADDING zeros suffice to pad
    them to the highest. For ranks (1, 2, 2, 64) on a weight of 1024 × 1024 the first three share a
    stack, which takes 2048 zeros. To pad them to rank 64 would take 380 928.
    """
    groups: list[list[Adapter]] = []
    for r, neighbours in groupby(run_adapters, lambda adapter: adapter.r):
        same_rank, previous = [*neighbours], groups[-1] if groups else []
        highest = max((adapter.r for adapter in previous), default=0)
        first = same_rank[0]
        padded = (first.A, first.B) if first.form is None else first.form_tensors().values()
        zeros_a_rank = sum(t.numel() for t in padded) // r  # of LoRA rest + out, for each expert
        padded_runs = len(previous) if r > highest else len(same_rank)
        if previous and padded_runs * abs(r - highest) * zeros_a_rank <= MAX_PADDING:
            previous += same_rank
        else:
            groups.append(same_rank)
    return groups


class Stack:
    """The adapters of k runs on one site as one `adapter` with a dimension of runs.

    Its tensors are new, and the runs' tensors become views of them. So a step of an optimizer on
    the stack moves each run's adapter, and what is read or loaded there is the stack's.

    Runs of a lower rank are padded with zeros. Three runs of ranks 1, 2 and 2 on a weight of
    64 × 32:
        A (3, 2, 32), where A[0, 1] is zeros, and the first run's A is the view A[0][:1] (1, 32)
        B (3, 64, 2), where B[0, :, 1] is zeros, and the first run's B is the view B[0][:, :1]
    The zeros stay zeros: the gradient of a row of A is a product with the same column of B, which
    is zero, and that of a column of B one with the same row of A.

    `setting` is what else the runs of a stack have in common, as their optimizer's settings.
    """

    def __init__(self, run_adapters: list[Adapter], setting: object):
        self.run_adapters, self.setting = run_adapters, setting
        self.adapter: Any = copy.deepcopy(max(run_adapters, key=lambda adapter: adapter.r))
        tensors = [adapter.tensors() for adapter in run_adapters]
        self.adapter.fill({name: _padded([t[name] for t in tensors]) for name in tensors[0]})
        # The shape stays (k, out, r), the memory is laid out as (k, r, out): thin products are
        # several times faster with their long side contiguous.
        if self.adapter.B is not None:
            self.adapter.B.data = self.adapter.B.data.mT.contiguous().mT
        scales = [adapter.scale for adapter in run_adapters]
        like = next(self.adapter.parameters())
        scales = torch.tensor(scales, dtype=like.dtype, device=like.device)
        dims = next(iter(tensors[0].values())).dim()
        self.adapter.scale = scales.view(-1, *[1] * dims)
        for name in tensors[0]:
            stacked = getattr(self.adapter, name).data
            for i, adapter in enumerate(run_adapters):
                tensor = getattr(adapter, name)
                tensor.data = self.view_of_run(stacked, i, tensor)

    @staticmethod
    def view_of_run(stacked: Tensor, i: int, like: Tensor) -> Tensor:
        """The part of a stacked tensor that is run `i`'s, without padding, in the shape of `like`.

        `stacked` may also be what belongs to a stacked tensor, as an optimizer's moment of it.
        """
        return stacked[i][tuple(map(slice, like.shape))]


class FullStack:
    """One parameter that k runs train in full: an `adapter` whose `value` is (k, *parameter).

    Each run's value becomes a view of it. `setting` as of a Stack.
    """

    def __init__(self, run_adapters: list[FullParameter], setting: object):
        self.run_adapters: list[Any] = run_adapters
        self.setting = setting
        self.adapter: Any = copy.deepcopy(run_adapters[0])
        self.adapter.value.data = torch.stack([run.value.data for run in run_adapters])
        for run, value in zip(run_adapters, self.adapter.value.data, strict=True):
            run.value.data = value


def unstack(run: Mapping[str, Adapter | FullParameter]) -> None:
    """Undoes stacking for one run: its adapters get copies of their tensors, laid out as before."""
    for adapter in run.values():
        is_full = isinstance(adapter, FullParameter)
        for name, tensor in ({"value": adapter.value} if is_full else adapter.tensors()).items():
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            getattr(adapter, name).data = copied


def _padded(tensors: list[Tensor]) -> Tensor:
    """Tensors of different ranks stacked in one, (k, …), with zeros beyond the lower ranks."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for i, tensor in enumerate(tensors):
        Stack.view_of_run(stacked, i, tensor).copy_(tensor)
    return stacked
