"""Many runs' adapters on one site, their tensors side by side in one."""

import copy
from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.weight import WeightAdapter

PADDED = 2**13
"""Zeros that cost a step no more than the stack they save, at a few hundred rows on a CPU."""


def of_near_rank(run_adapters: list[Adapter]) -> list[list[Adapter]]:
    """The neighbours that share a stack: of one rank, or padded to one by few enough zeros."""
    parts: list[list[Adapter]] = []
    for r, same in groupby(run_adapters, lambda member: member.r):
        more, last = [*same], parts[-1] if parts else []
        widest = max((member.r for member in last), default=0)
        each = more[0].A.shape[-1] + more[0].B.shape[-2]
        narrower = len(last) if r > widest else len(more)
        if last and narrower * abs(r - widest) * each <= PADDED:
            last += more
        else:
            parts.append(more)
    return parts


class Stack:
    """The adapters of k runs on one site as one `adapter`, whose tensors they are views of.

    Those of lower rank have zeros beside them, which take no gradient but zero. B is laid out as
    r × out: thin products are several times faster with their long side contiguous.
    """

    def __init__(self, run_adapters: list[Adapter], setting: object):
        self.run_adapters, self.setting = run_adapters, setting
        self.adapter = copy.deepcopy(max(run_adapters, key=lambda member: member.r))
        tensors = [member.tensors() for member in run_adapters]
        self.adapter.fill({name: _padded([t[name] for t in tensors]) for name in tensors[0]})
        self.adapter.B.data = self.adapter.B.data.mT.contiguous().mT
        scales = [member.scale for member in run_adapters]
        held = next(self.adapter.parameters())
        self.scale = torch.tensor(scales, dtype=held.dtype, device=held.device)[:, None, None]
        self.adapter.scale = self.scale  # pyright: ignore
        for name in tensors[0]:
            stacked = getattr(self.adapter, name).data
            for i, member in enumerate(run_adapters):
                own = getattr(member, name)
                own.data = self.view_of_run(stacked, i, own)

    @staticmethod
    def view_of_run(stacked: Tensor, i: int, own: Tensor) -> Tensor:
        """What run `i` has of a stacked tensor, or its like; in the shape of the run's `own`."""
        return stacked[i][tuple(map(slice, own.shape))]

    def change(self, weight: Tensor) -> Tensor:
        """The dense changes to a weight that no factored adapter fits: (k, *weight)."""
        assert isinstance(self.adapter, WeightAdapter)
        return self.adapter.change(weight)


def unstack(run: Mapping[str, Adapter]) -> None:
    """Gives a run's adapters tensors of their own again, laid out as they are alone."""
    for adapter in run.values():
        for name, tensor in adapter.tensors().items():
            getattr(adapter, name).data = tensor.clone(memory_format=torch.contiguous_format)


def _padded(tensors: list[Tensor]) -> Tensor:
    """Tensors of several ranks in one, (k, …), with zeros where the greatest has more."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for i, own in enumerate(tensors):
        Stack.view_of_run(stacked, i, own).copy_(own)
    return stacked
