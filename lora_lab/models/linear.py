"""One linear layer."""

from pydantic import PositiveInt
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ, without bias: the model of the `shift` experiment."""

    def __init__(self, in_features: PositiveInt, out_features: PositiveInt):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) → (B, out)."""
        return self.linear(x)
