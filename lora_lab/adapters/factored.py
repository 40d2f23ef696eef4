"""Adapters that change the output of their layer, so that a call of it never forms ΔW."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.quantized import dense

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
    """

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
        return self.up(layer, self.down(layer, input, A), B, output)

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW in the dtype of `weight`, which is W: (*runs, *weight).

        In training dropout is on columns of A, with one mask each time the weight is read.
        """
        A, B = self.factors()
        weight = dense(weight)
        delta = self.delta_of(self.drop_columns(A), B, weight)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def align_with_output(self, values: Float[Tensor, "*runs out"]) -> Tensor:
        """One value for each output feature, in a shape that broadcasts over the output."""
        return values

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
