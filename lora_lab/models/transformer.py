"""A decoder-only transformer language model."""

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention with `heads` heads; q, k, v and o are four separate linear layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width); a position attends to itself and to earlier ones."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width/heads)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))  # (B, T, width)


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)), the MLP 4 × `width` wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width)."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder-only language model: predicts the next token at each of up to `context` positions.

    `in_features` and `out_features` are the numbers of tokens it reads and predicts. Position
    embeddings are learned, and the head is not tied to the token embedding. Raises ValueError where
    `heads` does not divide `width`.
    """

    def __init__(
        self,
        in_features: PositiveInt,
        out_features: PositiveInt,
        width: PositiveInt,
        heads: PositiveInt,
        layers: PositiveInt,
        context: PositiveInt = 64,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads}: must divide width={width}")
        self.embed = nn.Embedding(in_features, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, out)."""
        positions = torch.arange(x.shape[1], device=x.device)  # (T,)
        return self.head(self.norm(self.blocks(self.embed(x) + self.position(positions))))
