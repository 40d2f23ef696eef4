"""A small convolutional network for grey-level images."""

from itertools import pairwise

from pydantic import PositiveInt
from torch import Tensor, nn


class CNN(nn.Module):
    """An embedding of grey levels, convolutions conv1, conv2, … with ReLU, and a linear head.

    An image is `side` × `side`. Its pixels are rounded to `levels` grey levels, each embedded as
    `channels[0]` numbers. Each convolution, 2 × 2 with stride 2, halves the sides and outputs the
    next number of `channels`.
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
        for i, (inputs, outputs) in enumerate(pairwise(channels), start=1):
            self.body.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 2, stride=2))
            self.body.add_module(f"relu{i}", nn.ReLU())
        final_side = side // 2 ** (len(channels) - 1)
        self.head = nn.Linear(channels[-1] * final_side**2, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, side · side) → (B, out)."""
        levels = (x * (self.embed.num_embeddings - 1)).round().long()  # (B, side · side)
        channels = self.embed(levels).mT  # (B, channels, side · side)
        image = channels.unflatten(2, (self.side, self.side))  # (B, channels, side, side)
        return self.head(self.body(image).flatten(1))
