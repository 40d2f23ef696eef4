"""A bigram language model."""

from pydantic import PositiveInt
from torch import Tensor, nn


class Bigram(nn.Module):
    """A table of logits, a row for each token: what comes next depends on that token alone.

    It starts at zero: a token never seen is followed by each one equally.
    """

    def __init__(self, in_features: PositiveInt, out_features: PositiveInt):
        super().__init__()
        self.table = nn.Embedding(in_features, out_features)
        nn.init.zeros_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, out)."""
        return self.table(x)
