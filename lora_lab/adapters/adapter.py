"""What an adapter is: the trainable change to one weight, and the two views every adapter has."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key or parameter name belongs to an adapter."""
    return "lora" in key.split(".")


class Adapter(nn.Module, ABC):
    """A low-rank change ΔW = scale · B A to the weight of one frozen layer.

    It sits in the layer as its child `lora`; a forward hook adds its output to the layer's. Two
    views of the same change are kept equal: `delta()`, ΔW in the weight's own shape, and
    `forward(x)`, layer(x; W + ΔW) − layer(x; W) without ever forming ΔW.

    A (r × rest) and B (out × r) are factors of the matrix `weight.flatten(1)`, stored in float32
    or in the weight's dtype where that is wider.
    """

    types: ClassVar[tuple[type[nn.Module], ...]]
    """The layers this kind adapts. Exact types: a subclass may have another forward."""

    kept: Tensor | None
    """The weight as it was before a merge; None while not merged."""

    def __init__(
        self,
        layer: nn.Module,
        A: Float[Tensor, "r rest"],
        B: Float[Tensor, "out r"],
        *,
        alpha: float,
        scale: float,
        dropout: float = 0.0,
        init: str | None = None,
    ):
        super().__init__()
        weight = self.weight_of(layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(A.to(weight.device, dtype))
        self.B = nn.Parameter(B.to(weight.device, dtype))
        self.alpha, self.scale, self.dropout, self.init = alpha, scale, dropout, init
        self.shape = weight.shape
        self.enabled = True
        self.register_buffer("kept", None, persistent=False)

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    @staticmethod
    def weight_of(layer: nn.Module) -> Tensor:
        """The weight of `layer` that this kind changes."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def delta(self) -> Tensor:
        """ΔW in the weight's own shape."""
        return (self.scale * self.B @ self.A).view(self.shape)

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """What ΔW adds to the layer's output for `input`."""

    def extra_repr(self) -> str:
        """The numbers that tell one adapter from another, for print(model)."""
        return f"r={self.r}, alpha={self.alpha}, scale={self.scale:g}, dropout={self.dropout}"
