"""A small model that has a layer of each kind, for tests of targets and adapters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """The mean of two experts, held as one parameter as transformers does."""

    def __init__(self, features: int):
        super().__init__()
        self.num_experts = 2
        self.up_proj = nn.Parameter(torch.randn(2, features, features) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (F.linear(x, self.up_proj[expert]).tanh() for expert in range(2))
        return (one + other) / 2


class AllLayerKinds(nn.Module):
    """(B, in) → (B, out), through linear, conv, embedding, attention, LSTM, experts, a weight."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding="same")
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.mix = nn.Parameter(torch.eye(8))
        self.fc = nn.Linear(in_features, 8)
        self.head = nn.Linear(8, out_features)
        self.experts = Experts(8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.sign().long() + 1  # (B, in)
        y = self.conv(self.embed(tokens).mT).mT  # (B, in, 8)
        y = self.lstm(y + self.attn(y, y, y)[0])[0]
        y = y + self.experts(y)
        return self.head(y.mean(1) @ self.mix + self.fc(x))
