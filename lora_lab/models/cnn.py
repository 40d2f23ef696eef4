"""A convolutional network over grey levels."""

from itertools import pairwise

from pydantic import PositiveInt
from torch import Tensor, nn


class CNN(nn.Module):
    """An embedding of grey levels, convolutions conv1, conv2, … with ReLU, and a linear head.

    The image is `side` × `side`. Each of its `levels` grey levels has a vector of `channels[0]`
    numbers; each convolution, 2 × 2 with stride 2, halves the sides and leads to the next number
    of channels.
    """

    def __init__(
        self,
        out_features: PositiveInt,
        side: PositiveInt,
        levels: PositiveInt,
        channels: list[PositiveInt],
    ):
        super().__init__()
        self.side = side
        self.embed = nn.Embedding(levels, channels[0])
        self.body = nn.Sequential()
        for i, (before, after) in enumerate(pairwise(channels), start=1):
            self.body.add_module(f"conv{i}", nn.Conv2d(before, after, 2, stride=2))
            self.body.add_module(f"relu{i}", nn.ReLU())
        last = side // 2 ** (len(channels) - 1)
        self.head = nn.Linear(channels[-1] * last**2, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, side · side) → (B, out)."""
        levels = (x * (self.embed.num_embeddings - 1)).round().long()
        image = self.embed(levels).mT.unflatten(2, (self.side, self.side))  # (B, channels, H, W)
        return self.head(self.body(image).flatten(1))
