"""The adapters of a fused layer's blocks as one of the layer, for formats without blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.factored import FactoredAdapter
from lora_lab.adapters.slots import layer_path


def with_joined_blocks(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters by site, in which those of the blocks of one layer are one adapter of the layer.

    It has the same ΔW, and the sum of their ranks.
    """
    joined: dict[str, Adapter] = {}
    blocks: dict[str, list[FactoredAdapter]] = {}
    for site, adapter in adapters.items():
        if isinstance(adapter, FactoredAdapter) and adapter.rows is not None:
            path = layer_path(site, adapter)
            blocks.setdefault(path, []).append(adapter)
            joined[path] = adapter  # takes the place of its first block
        else:
            joined[site] = adapter
    for path, of_layer in blocks.items():
        joined[path] = _joined(model.get_submodule(path), of_layer)
    return joined


# q and v of a layer 96 × 32 with r = 2: A (2, 32) and (2, 32) → (4, 32), B (32, 2) and (32, 2) →
# (96, 4), which is q's in the rows 0 … 31 of the columns 0 and 1, v's in the rows 64 … 95 of the
# columns 2 and 3, and zero elsewhere.
@torch.no_grad()
def _joined(layer: nn.Module, blocks: Sequence[FactoredAdapter]) -> Adapter:
    """One adapter of a layer with the ΔW of its blocks."""
    scale, recipe = blocks[0].scale, blocks[0].recipe
    factors = [(adapter, *adapter.factors()) for adapter in blocks]
    A = torch.cat([A for _, A, _ in factors])
    B = torch.cat([a.in_all_rows(a.scale / scale * B, -2) for a, _, B in factors], -1)
    plain = replace(recipe, r=len(A), init="kaiming", trains="both", form="lora")
    adapter = type(blocks[0])(layer, blocks[0].parameter, None, plain)
    adapter.scale = scale
    return adapter.fill({"A": A, "B": B})
