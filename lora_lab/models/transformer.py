"""A decoder-only transformer language model."""

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention in `heads` heads; q, k, v and o are layers of their own."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width), no place seeing a later one."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width/heads)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP four times as wide, each normed before and added to what it reads."""

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
    """Reads up to `context` of `in_features` tokens, predicts the next of `out_features` at each.

    Positions are learned, the head is not tied to the embedding. Raises ValueError where `heads`
    does not divide `width`.
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
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.embed(x) + self.position(places))))
