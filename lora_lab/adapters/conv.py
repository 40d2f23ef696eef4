"""The factored adapter of convolutions."""

import math

import torch
from torch import Tensor, nn

from lora_lab.adapters.factored import ByStack, FactoredAdapter
from lora_lab.adapters.watch import keeps_forward

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvAdapter(FactoredAdapter):
    """ΔW = scale · B A on Conv1d, Conv2d and Conv3d: A is r filters, B a 1 × 1 convolution.

    The matrix of the weight is out × (in/groups · k…), for a grouped convolution too: each group
    filters its channels with the same A, and the outputs of each group have their rows of B.
    Stride, padding, dilation and padding_mode are the layer's.
    """

    kind = "conv"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Conv1d, Conv2d and Conv3d, and subclasses that keep their forward."""
        return any(
            keeps_forward(layer, Kind, "forward", "_conv_forward")
            for Kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        )

    def align_with_output(self, values: Tensor) -> Tensor:
        """One value a channel, before the positions: (out,) → (out, 1, 1) of a Conv2d."""
        return values.view(*values.shape, *[1] * (len(self.shape) - 2))

    def down(self, layer: Conv, input: Tensor, A: Tensor) -> Tensor:
        """Convolves each group with A's r filters, by the layer's stride, padding and dilation.

        (batch, in, …) → (batch, groups · r, …), or both without a batch.
        """
        filters = A.view(-1, *self.shape[1:])  # (r, in/groups, *k)
        if layer.groups > 1:
            filters = torch.cat([filters] * layer.groups)  # (groups · r, in/groups, *k)
        return layer._conv_forward(self.apply_dropout(input), filters, None)

    # The 1 × 1 convolution by B is a product for each image and group, added onto the output in the
    # same call. A Conv2d with 2 groups, 6 output channels and r = 4 on a batch of 8 images that
    # come out as 5 × 5: output (8, 6, 5, 5) → (16, 3, 25), hidden (8, 8, 5, 5) → (16, 4, 25) and
    # B (6, 4) → (16, 3, 4).
    def up(self, layer: Conv, hidden: Tensor, B: Tensor, output: Tensor) -> Tensor:
        """Adds scale · B times `hidden` to the layer's `output`, group by group, as a new tensor.

        `hidden` (batch, groups · r, …) and `output` (batch, out, …), or both without a batch.
        """
        groups, is_batched = layer.groups, output.dim() == len(self.shape)
        batch = output.shape[0] if is_batched else 1
        products, rows, r = batch * groups, B.shape[0] // groups, B.shape[1]
        # Multiplied out, since reshape cannot infer a -1 from an empty batch.
        positions = math.prod(output.shape[is_batched + 1 :])
        # Without groups B is expanded, not copied, and backward has fewer views.
        B = B.expand(batch, -1, -1) if groups == 1 else B.view(groups, rows, r).repeat(batch, 1, 1)
        output_by_group = output.reshape(products, rows, positions)
        hidden = hidden.reshape(products, r, positions)
        return torch.baddbmm(output_by_group, B, hidden, alpha=self.scale).view(output.shape)

    def down_stacked(self, layer: Conv, input: Tensor, A: Tensor) -> Tensor:
        """One convolution for all runs where they share the input, else one for each."""
        is_one = len(input) == 1 and layer.groups == 1 and input.dim() == 1 + len(self.shape)
        if is_one and not (self.recipe.dropout and self.training):
            filters = A.reshape(-1, *self.shape[1:])  # (runs · r, in, *k)
            hidden = layer._conv_forward(input[0], filters, None)  # (batch, runs · r, …)
            return hidden.unflatten(1, A.shape[:2]).movedim(1, 0)  # (runs, batch, r, …)
        inputs = input.expand(len(A), *input.shape[1:])
        return torch.stack([self.down(layer, x, a) for x, a in zip(inputs, A, strict=True)])

    def up_stacked(self, layer: Conv, hidden: ByStack, B: ByStack, output: Tensor) -> Tensor:
        """One product for each stack, over its runs, their batches and groups."""
        shape, runs = output.shape[1:], [len(h) for h in hidden]  # (batch, out, …)
        batch, out, *positions = shape if len(shape) == len(self.shape) else (1, *shape)
        groups, positions = layer.groups, math.prod(positions)
        outputs = output.expand(sum(runs), *shape).split(runs)
        results = []
        for h, b, stack_output in zip(hidden, B, outputs, strict=True):
            k, r, rows = len(h), b.shape[-1], out // groups
            # (k, out, r) → (k, batch, groups, out/groups, r) → (k · batch · groups, out/groups, r)
            b = b.view(k, 1, groups, rows, r).expand(-1, batch, -1, -1, -1).reshape(-1, rows, r)
            stack_output = stack_output.reshape(-1, rows, positions)
            result = torch.baddbmm(stack_output, b, h.reshape(-1, r, positions))
            results.append(result.view(k, *shape))
        return results[0] if len(results) == 1 else torch.cat(results)
