"""One embedding layer."""

from pydantic import PositiveInt
from torch import Tensor, nn


class Embedding(nn.Module):
    """An embedding table: `out_features` numbers for each of `in_features` tokens."""

    def __init__(self, in_features: PositiveInt, out_features: PositiveInt):
        super().__init__()
        self.embedding = nn.Embedding(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B,) → (B, out)."""
        return self.embedding(x)
