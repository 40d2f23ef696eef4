"""Adapters that change the output of their layer, so that a call of it never forms ΔW."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, Rows
from lora_lab.adapters.quantized import dense, weight_or_shape
from lora_lab.adapters.recipe import Recipe

ByStack = Sequence[Tensor]
"""A tensor for each stack of a `Pack`: (k, …) for the k runs whose adapters are one stack."""

Hidden = Float[Tensor, "*batch r"]
"""What A gives: r numbers for each row of the layer's input."""

Output = Float[Tensor, "*batch out"]
"""What a layer gives: one number for each output feature."""


class FactoredAdapter(Adapter):
    """An adapter that adds scale · B (A x) to the output of its layer, in a forward hook.

    ΔW is not formed where the layer is called. The adapter computes in the dtype of the layer's
    output. A kind of layer says what A and B do to its input: `down` applies A, `up` applies B and
    adds the output. `down_stacked` and `up_stacked` do the same for the runs of a `Pack`. A `layer`
    is of a type that the class `fits`.

    Code that reads the layer's weight without a call gets `adapted_weight`, at the cost of forming
    ΔW.

    Where it is for some rows of the weight, as q of a fused qkv, it adds zeros to the others.
    """

    def __init__(self, layer: Any, parameter: str, rows: Rows, recipe: Recipe):
        """As of all adapters."""
        super().__init__(layer, parameter, rows, recipe)
        self.other_rows = (0, 0)
        """How many rows of the layer's weight are before this adapter's, and how many after."""
        if rows is not None:
            weight = weight_or_shape(layer, parameter)
            assert weight is not None
            self.other_rows = rows[0], len(self.weight_to_matrix(weight)) - rows[1]

    def forward(self, layer: Any, input: Tensor, output: Tensor) -> Tensor:
        """The layer's output with W + ΔW, from its `input` and its `output` with W."""
        adapted = self.add_change(layer, input, output)
        if self.magnitude is None:
            return adapted
        # DoRA scales the rows of W + ΔW and not the bias: gain · (adapted − bias) + bias. In this
        # order it is `adapted` to the last bit at the start, where the gain is 1.
        gain = self.align_with_output(self.row_gain(self.weight_of(layer)).to(output.dtype))
        if (bias := getattr(layer, "bias", None)) is None:
            return gain * adapted
        return torch.addcmul(
            (1 - gain) * self.align_with_output(bias.to(output.dtype)), gain, adapted
        )

    def add_change(self, layer: Any, input: Tensor, output: Tensor) -> Tensor:
        """`output` + scale · B A applied to `input`, before DoRA's magnitude."""
        A, B = self.factors()
        if A.dtype != output.dtype:
            A, B = A.to(output.dtype), B.to(output.dtype)
        return self.up(layer, self.down(layer, input, A), self.in_all_rows(B, -2), output)

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW in the dtype of `weight`, which is W: (*runs, *weight).

        In training dropout is on columns of A, with one mask each time the weight is read.
        """
        A, B = self.factors()
        weight = dense(weight)
        delta = self.delta_of(self.drop_columns(A), B, self.block_of(weight, self.rows))
        delta = self.in_all_rows(delta, -1 if self.is_transposed else -2)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def align_with_output(self, values: Float[Tensor, "*runs out"]) -> Tensor:
        """One value for each output feature, in a shape that broadcasts over the output."""
        return values

    # The block k of a fused layer of 3 · 64 output features: B (64, r) → (192, r), of which the
    # rows 0 … 63 and 128 … 191 are zero.
    def in_all_rows(self, rows: Tensor, dim: int) -> Tensor:
        """What has this adapter's rows in `dim` (negative), with zeros for the layer's others."""
        if self.rows is None:
            return rows
        # F.pad takes the dimensions from the last to the first.
        return F.pad(rows, [0, 0] * (-dim - 1) + [*self.other_rows])

    @abstractmethod
    def down(self, layer: Any, input: Tensor, A: Tensor) -> Tensor:
        """A applied to the layer's input: r numbers where the layer gives `out`."""

    @abstractmethod
    def up(self, layer: Any, hidden: Tensor, B: Tensor, output: Tensor) -> Tensor:
        """`output` + scale · B applied to `hidden`, which `down` gave."""

    @abstractmethod
    def down_stacked(self, layer: Any, input: Tensor, A: Tensor) -> Tensor:
        """`down` for the k runs of one stack, with A (k, r, rest).

        `input` is (k, …), or (1, …) where the runs share it. Gives (k, …).
        """

    @abstractmethod
    def up_stacked(self, layer: Any, hidden: ByStack, B: ByStack, output: Tensor) -> Tensor:
        """`up` for all runs of a pack: `hidden` and `B` have a tensor for each stack.

        Each B (k, out, r) is already multiplied by the scale. `output` is (runs, …), or (1, …)
        where the runs share it. Gives (runs, …).
        """
