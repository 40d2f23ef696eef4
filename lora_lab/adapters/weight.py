"""The adapter of all other weights: parameters of two or more dimensions, whoever reads them."""

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, Rows
from lora_lab.adapters.quantized import dense

BLOCK_NAMES = {nn.MultiheadAttention: "qkv", nn.LSTM: "ifgo", nn.GRU: "rzn"}
"""Layers that hold several matrices as blocks of rows of one parameter, with a letter for each.

Each block is a site, as `in_proj_weight_q`, in the order in which torch stacks them.
"""


class WeightAdapter(Adapter):
    """ΔW = scale · B A on `weight.flatten(1)`, or on a block of its rows, formed when it is read.

    The parameter stays where it is, under its state-dict key. Reading the attribute gives W + ΔW,
    in the layer's forward and anywhere else: nn.MultiheadAttention reads out_proj.weight and never
    calls out_proj. This is right for all layers and costs what full fine-tuning costs, since ΔW is
    formed. Dropout is on A's columns, the input features, with one mask each time the weight is
    read.
    """

    kind = "weight"
    takes_dora = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any layer: it is the last of the kinds, for layers that no factored adapter fits."""
        return True

    @staticmethod
    def reason_not_adaptable(layer: nn.Module) -> str | None:
        """As for all adapters; and a gradient that is sparse cannot pass through W + ΔW."""
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            return "a sparse gradient cannot pass through W + ΔW; set sparse=False"
        return Adapter.reason_not_adaptable(layer)

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter `weight`, all of it, with ΔW on this adapter's rows."""
        weight = dense(weight)
        return weight + self.parameter_delta(weight)

    def parameter_delta(self, weight: Tensor) -> Tensor:
        """ΔW in the shape of the full parameter `weight`, zero outside of this adapter's rows.

        It is (k, *weight) where this adapter holds those of k runs.
        """
        A, B = self.factors()
        product = self.scale * B @ self.drop_columns(A)  # (*runs, rows, rest)
        delta = product.view(*product.shape[:-2], *self.shape).to(weight.dtype)
        if self.rows is None:
            return delta
        before, after = self.rows[0], weight.shape[0] - self.rows[1]
        # F.pad takes the dimensions from the last to the first: none is padded but the rows.
        return F.pad(delta, [0, 0] * (weight.dim() - 1) + [before, after])


def row_blocks(layer: nn.Module, parameter: str, rows: int) -> dict[str, Rows]:
    """The sites of a parameter with this many rows, by name, each with its range of rows.

    For `in_proj_weight` of 192 rows in nn.MultiheadAttention: {"in_proj_weight_q": (0, 64),
    "in_proj_weight_k": (64, 128), "in_proj_weight_v": (128, 192)}. A parameter without blocks is
    one site, with None for all rows.
    """
    names = next((names for kind, names in BLOCK_NAMES.items() if isinstance(layer, kind)), "")
    has_blocks = parameter.startswith(("in_proj_weight", "weight_ih", "weight_hh"))
    if not names or not has_blocks:
        return {parameter: None}
    size = rows // len(names)
    return {f"{parameter}_{name}": (i * size, (i + 1) * size) for i, name in enumerate(names)}
