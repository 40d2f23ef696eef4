"""One convolution layer."""

from pydantic import PositiveInt
from torch import Tensor, nn


class Conv(nn.Module):
    """A k × k convolution with zero padding and without bias: images keep their size."""

    def __init__(
        self, in_features: PositiveInt, out_features: PositiveInt, kernel_size: PositiveInt = 3
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_features, out_features, kernel_size, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        return self.conv(x)
