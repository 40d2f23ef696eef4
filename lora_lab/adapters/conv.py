"""The factored adapter of convolutions."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import FactoredAdapter, Stacks


class ConvAdapter(FactoredAdapter):
    """ΔW = scale · B A on Conv1d, Conv2d and Conv3d: A is r filters, B a 1 × 1 convolution.

    The matrix of the weight is out × (in/groups · k…), also of a grouped convolution: every group
    filters its own channels with the same A, and its outputs have their own rows of B. Stride,
    padding, dilation and padding_mode are the layer's.
    """

    kind = "conv"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Conv1d, 2d and 3d themselves: a subclass may have another forward."""
        return type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def along(self, values: Tensor, output: Tensor) -> Tensor:
        """Channels come before the places."""
        return values.view(*values.shape, *[1] * (len(self.shape) - 2))

    def down(self, layer: nn.Module, input: Tensor, A: Tensor) -> Tensor:
        """r filters for each group, with the layer's geometry: (*, in, …) → (*, groups · r, …)."""
        conv: Any = layer
        filters = A.view(-1, *self.shape[1:])
        if conv.groups > 1:
            filters = torch.cat([filters] * conv.groups)
        return conv._conv_forward(self.dropped(input), filters, None)

    def up(self, layer: nn.Module, hidden: Tensor, B: Tensor, output: Tensor) -> Tensor:
        """Every group's rows of B on its r channels, in one product onto the layer's output."""
        conv: Any = layer
        groups, batched = conv.groups, output.dim() == len(self.shape)
        batch = output.shape[0] if batched else 1
        blocks, rows, r = batch * groups, B.shape[0] // groups, B.shape[1]
        places = math.prod(output.shape[batched + 1 :])  # an empty batch leaves no -1 to be found
        # Without groups no copy of B, and fewer views for backward.
        B = B.expand(batch, -1, -1) if groups == 1 else B.view(groups, rows, r).repeat(batch, 1, 1)
        onto, hidden = output.reshape(blocks, rows, places), hidden.reshape(blocks, r, places)
        return torch.baddbmm(onto, B, hidden, alpha=self.scale).view(output.shape)

    def down_stacked(self, layer: nn.Module, input: Tensor, A: Tensor) -> Tensor:
        """One convolution for all runs where they share the input; else one for each."""
        conv: Any = layer
        one = len(input) == 1 and conv.groups == 1 and input.dim() == 1 + len(self.shape)
        if one and not (self.recipe.dropout and self.training):
            filters = A.reshape(-1, *self.shape[1:])  # k · r of them
            hidden = conv._conv_forward(input[0], filters, None)
            return hidden.unflatten(1, A.shape[:2]).movedim(1, 0)
        inputs = input.expand(len(A), *input.shape[1:])
        return torch.stack([self.down(layer, x, a) for x, a in zip(inputs, A, strict=True)])

    def up_stacked(self, layer: nn.Module, hidden: Stacks, B: Stacks, output: Tensor) -> Tensor:
        """One product for each stack, over its runs, their batches and groups."""
        conv: Any = layer
        shape, runs = output.shape[1:], [len(h) for h in hidden]  # (batch, out, …)
        batch, out, *places = shape if len(shape) == len(self.shape) else (1, *shape)
        groups, places = conv.groups, math.prod(places)
        results = []
        for h, b, onto in zip(hidden, B, output.expand(sum(runs), *shape).split(runs), strict=True):
            r = b.shape[-1]
            b = b.view(len(h), 1, groups, -1, r).expand(-1, batch, -1, -1, -1)
            result = torch.baddbmm(
                onto.reshape(-1, out // groups, places),
                b.reshape(-1, out // groups, r),
                h.reshape(-1, r, places),
            )
            results.append(result.view(len(h), *shape))
        return results[0] if len(results) == 1 else torch.cat(results)
