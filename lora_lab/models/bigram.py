"""A bigram language model: one table of logits."""

from pydantic import PositiveInt
from torch import Tensor, nn


class Bigram(nn.Module):
    """Predicts the next token from the current one alone, whose row of a table is the logits.

    The table starts at zero, so that a token that was never trained on predicts all tokens equally.
    """

    def __init__(self, in_features: PositiveInt, out_features: PositiveInt):
        super().__init__()
        self.table = nn.Embedding(in_features, out_features)
        nn.init.zeros_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, out)."""
        return self.table(x)
