"""A multilayer perceptron."""

from itertools import pairwise

from pydantic import PositiveInt
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers fc1, fc2, … with the `hidden` widths, each with a ReLU, and a linear head."""

    def __init__(
        self, in_features: PositiveInt, out_features: PositiveInt, hidden: list[PositiveInt]
    ):
        super().__init__()
        widths = [in_features, *hidden]
        self.body = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.body.add_module(f"fc{i}", nn.Linear(inputs, outputs))
            self.body.add_module(f"relu{i}", nn.ReLU())
        self.head = nn.Linear(widths[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) → (B, out)."""
        return self.head(self.body(x))
