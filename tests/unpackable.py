"""A model that torch.vmap cannot compute for many runs: it looks at a number of its own output."""

from torch import Tensor

from lora_lab.models.linear import Linear


class Looking(Linear):
    """Linear, which would stop at an output of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.abs().sum().item() < 0:
            raise AssertionError
        return y
