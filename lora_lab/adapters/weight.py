"""The adapter of all other weights: parameters of two or more dimensions, whoever reads them."""

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, Rows

BLOCK_NAMES = {nn.MultiheadAttention: "qkv", nn.LSTM: "ifgo", nn.GRU: "rzn"}
"""Layers that hold several matrices as blocks of rows of one parameter, with a letter for each.

Each block is a site, as `in_proj_weight_q`, in the order in which torch stacks them.
"""


class WeightAdapter(Adapter):
    """ΔW = scale · B A on `weight.flatten(1)`, or on a block of its rows, formed when it is read.

    The parameter stays where it is, under its state-dict key. Reading the attribute gives W + ΔW,
    in the layer's forward and anywhere else: nn.MultiheadAttention reads out_proj.weight and never
    calls out_proj. This is right for all layers and costs what full fine-tuning costs, since ΔW is
    formed. Dropout is on A's columns, the input features, with one mask each time the weight is
    read.
    """

    kind = "weight"
    takes_dora = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any layer: it is the last of the kinds, for layers that no factored adapter fits."""
        return True

    @staticmethod
    def reason_not_adaptable(layer: nn.Module) -> str | None:
        """As for all adapters; and a gradient that is sparse cannot pass through W + ΔW."""
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            return "a sparse gradient cannot pass through W + ΔW; set sparse=False"
        return Adapter.reason_not_adaptable(layer)

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter `weight`, all of it, with ΔW on this adapter's rows."""
        return weight + self.parameter_delta(weight)

    def parameter_delta(self, weight: Tensor) -> Tensor:
        """ΔW in the shape of the full parameter `weight`, zero outside of this adapter's rows.

        It is (k, *weight) where this adapter holds those of k runs.
        """
        A, B = self.factors()
        product = self.scale * B @ self.drop_columns(A)  # (*runs, rows, rest)
        delta = product.view(*product.shape[:-2], *self.shape).to(weight.dtype)
        if self.rows is None:
            return delta
        before, after = self.rows[0], weight.shape[0] - self.rows[1]
        # F.pad takes the dimensions from the last to the first: none is padded but the rows.
        return F.pad(delta, [0, 0] * (weight.dim() - 1) + [before, after])

    def drop_columns(self, A: Tensor) -> Tensor:
        """A with columns dropped in training, by the recipe's dropout."""
        ones = A.new_ones(*A.shape[:-2], 1, A.shape[-1])  # (*runs, 1, rest)
        return A * self.apply_dropout(ones) if self.recipe.dropout else A


def row_blocks(layer: nn.Module, parameter: str, rows: int) -> dict[str, Rows]:
    """The sites of a parameter with this many rows, by name, each with its range of rows.

    For `in_proj_weight` of 192 rows in nn.MultiheadAttention: {"in_proj_weight_q": (0, 64),
    "in_proj_weight_k": (64, 128), "in_proj_weight_v": (128, 192)}. A parameter without blocks is
    one site, with None for all rows.
    """
    names = next((names for kind, names in BLOCK_NAMES.items() if isinstance(layer, kind)), "")
    has_blocks = parameter.startswith(("in_proj_weight", "weight_ih", "weight_hh"))
    if not names or not has_blocks:
        return {parameter: None}
    size = rows // len(names)
    return {f"{parameter}_{name}": (i * size, (i + 1) * size) for i, name in enumerate(names)}


# How reading `layer.weight` gives W + ΔW. An attribute of one object can be computed only by its
# class, so the layer's class is swapped at run time for a subclass of itself, in which `weight` is
# a property. For an nn.Bilinear:
#   watch(layer, "weight")   type(layer) is now a subclass of nn.Bilinear, also named "Bilinear"
#   layer.weight             the property: W from layer._parameters, + ΔW of the active adapter
#   layer.state_dict()       still the key "weight" with W: it reads layer._parameters
#   unwatch(layer)           type(layer) is nn.Bilinear again
# torch's parametrizations swap the class in the same way. But they rename the parameter's key to
# parametrizations.weight.original, and they refuse to be pickled.


def watch(layer: nn.Module, parameter: str) -> None:
    """From now on reading `parameter` of `layer` gives it with the adapters that act on it."""
    base_class, watched = _base_class(layer)
    layer.__class__ = _watching_class(base_class, tuple(sorted({*watched, parameter})))


def unwatch(layer: nn.Module) -> None:
    """Undoes `watch`: reading gives the parameters themselves again."""
    layer.__class__ = _base_class(layer)[0]


def _base_class(layer: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The layer's class before `watch`, and the parameters that are watched now."""
    return getattr(type(layer), "_watches", (type(layer), ()))


# Cached, so that all layers of a class with the same watched parameters share one subclass.
@cache
def _watching_class(base_class: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base_class` in which each of `parameters` reads as the adapted weight."""

    def adapted_parameter(name: str) -> property:
        def read(layer: nn.Module) -> Any:
            weight = layer._parameters[name]
            slot: Any = layer._modules.get("lora")
            if weight is None or slot is None or layer.__dict__.get("_being_copied"):
                return weight
            for adapter in slot.active_adapters():
                if adapter.parameter == name:
                    weight = adapter(weight)
            return weight

        return property(read)

    # The subclass has no name that pickle could import. So a layer is pickled, and copied, as the
    # call _blank(base_class, parameters), which builds the subclass again, and its state.
    def __reduce_ex__(layer: nn.Module, protocol: Any) -> Any:  # noqa: N807
        # An LSTM keeps the weights that it read last. These are results of W + ΔW, which cannot be
        # copied, so it reads them once more while _being_copied makes reading give W.
        layer.__dict__["_being_copied"] = True
        try:
            getstate: Any = layer.__getstate__
            state = {k: v for k, v in getstate().items() if k != "_being_copied"}
        finally:
            del layer.__dict__["_being_copied"]
        return _blank, (base_class, parameters), state

    members = {"_watches": (base_class, parameters), "__reduce_ex__": __reduce_ex__}
    members |= {"__module__": base_class.__module__, "__qualname__": base_class.__qualname__}
    members |= {name: adapted_parameter(name) for name in parameters}
    return type(base_class.__name__, (base_class,), members)


def _blank(base_class: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    """A layer of the watching subclass without its state, which pickle sets next."""
    watching_class = _watching_class(base_class, parameters)
    return watching_class.__new__(watching_class)
