"""The factored adapter of a linear layer."""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter


class LinearAdapter(Adapter):
    """ΔW = scale · B A on nn.Linear: two thin products, O(r (in + out)) a row."""

    types: ClassVar = (nn.Linear,)

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """scale · B A x, in the dtype of x."""
        x = F.dropout(input, self.dropout, self.training)
        # Scaling the r numbers between the factors is cheaper than scaling the output.
        hidden = F.linear(x, self.A.to(x.dtype)) * self.scale  # (*, in) -> (*, r)
        return F.linear(hidden, self.B.to(x.dtype))  # (*, r) -> (*, out)
