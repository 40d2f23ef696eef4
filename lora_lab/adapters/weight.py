"""The adapter of any other weight: a parameter of two or more dimensions, whoever reads it."""

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter

STACKED = {nn.MultiheadAttention: "qkv", nn.LSTM: "ifgo", nn.GRU: "rzn"}
"""The blocks that are stacked in one parameter, in their order: each is a site of its own."""


class WeightAdapter(Adapter):
    """ΔW = scale · B A on `weight.flatten(1)` or one block of its rows, formed when it is read.

    The parameter stays where it is and under its own key; reading the attribute gives W + ΔW, in
    the layer's own forward and in any other (nn.MultiheadAttention reads out_proj.weight and never
    calls out_proj). Dense: it costs what full fine-tuning costs, and is right for every layer. One
    dropout mask over A's columns, the input features, serves all that one reading is used for.
    """

    kind = "weight"
    takes_dora = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any layer that no factored adapter fits."""
        return True

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        """What torch does to the weight itself in forward, or to its gradient."""
        if getattr(layer, "max_norm", None) is not None:
            return "its max_norm rewrites the weight in every forward pass; set it to None"
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            return "a sparse gradient cannot pass through W + ΔW; set sparse=False"
        return None

    def forward(self, weight: Tensor) -> Tensor:
        """The whole parameter `weight` with this adapter's rows changed."""
        return weight + self.change(weight)

    def change(self, weight: Tensor) -> Tensor:
        """What is added to the whole parameter `weight`: (…, *weight), of each run of a stack."""
        A, B = self.factors()
        product = self.scale * B @ self.dropped_columns(A)
        change = product.view(*product.shape[:-2], *self.shape).to(weight.dtype)
        if self.rows is None:
            return change
        before, after = self.rows[0], weight.shape[0] - self.rows[1]
        return F.pad(change, [0, 0] * (weight.dim() - 1) + [before, after])

    def dropped_columns(self, A: Tensor) -> Tensor:
        """A with some of its columns dropped."""
        ones = A.new_ones(*A.shape[:-2], 1, A.shape[-1])
        return A * self.dropped(ones) if self.recipe.dropout else A


def blocks(layer: nn.Module, parameter: str, rows: int) -> dict[str, tuple[int, int] | None]:
    """The sites of a parameter by their names: itself, or its blocks of rows."""
    names = next((names for Kind, names in STACKED.items() if isinstance(layer, Kind)), "")
    stacked = parameter.startswith(("in_proj_weight", "weight_ih", "weight_hh"))
    if not names or not stacked:
        return {parameter: None}
    size = rows // len(names)
    return {f"{parameter}_{gate}": (i * size, (i + 1) * size) for i, gate in enumerate(names)}


def watch(layer: nn.Module, parameter: str) -> None:
    """From now on reading `parameter` of `layer` gives it with whatever adapters act on it."""
    Base, watched = _unwatched(layer)
    layer.__class__ = _watching(Base, tuple(sorted({*watched, parameter})))


def unwatch(layer: nn.Module) -> None:
    """Reading gives the parameters themselves again."""
    layer.__class__ = _unwatched(layer)[0]


def _unwatched(layer: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    return getattr(type(layer), "_watches", (type(layer), ()))


@cache
def _watching(Base: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """`Base`, but that reading one of `parameters` gives the adapted weight.

    torch's own parametrizations do the same and rename the parameter's key in the state dict, and
    refuse to be pickled.
    """

    def adapted(name: str) -> property:
        def read(layer: nn.Module) -> Any:
            weight = layer._parameters[name]
            slot: Any = layer._modules.get("lora")
            if weight is None or slot is None or layer.__dict__.get("_being_copied"):
                return weight
            for adapter in slot.acting():
                if adapter.parameter == name:
                    weight = adapter(weight)
            return weight

        return property(read)

    def __reduce_ex__(layer: nn.Module, protocol: Any) -> Any:  # noqa: N807
        # An LSTM keeps the weights it read last, which are no leaves: it reads them once more.
        layer.__dict__["_being_copied"] = True
        try:
            getstate: Any = layer.__getstate__
            state = {k: v for k, v in getstate().items() if k != "_being_copied"}
        finally:
            del layer.__dict__["_being_copied"]
        return _blank, (Base, parameters), state

    members = {"_watches": (Base, parameters), "__reduce_ex__": __reduce_ex__}
    members |= {"__module__": Base.__module__, "__qualname__": Base.__qualname__}
    return type(Base.__name__, (Base,), {**members, **{n: adapted(n) for n in parameters}})


def _blank(Base: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    Watching = _watching(Base, parameters)
    return Watching.__new__(Watching)
