"""Where an adapter can sit: every weight of a model, by name, kind and shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, Recipe
from lora_lab.adapters.conv import ConvAdapter
from lora_lab.adapters.embedding import EmbeddingAdapter
from lora_lab.adapters.linear import LinearAdapter, TransposedLinearAdapter
from lora_lab.adapters.weight import WeightAdapter, blocks

ADAPTERS: tuple[type[Adapter], ...] = (
    LinearAdapter,
    TransposedLinearAdapter,
    ConvAdapter,
    EmbeddingAdapter,
    WeightAdapter,
)
"""Every adapter, the first that fits a layer taken."""

KINDS = tuple(dict.fromkeys(Adapter.kind for Adapter in ADAPTERS))
"""Every kind of site. Tests run over this table."""


@dataclass(frozen=True)
class Site:
    """A place where an adapter sits: one weight of a layer, or a block of its rows, as a matrix."""

    name: str
    kind: str
    shape: tuple[int, int]
    """out × rest: of weight.flatten(1), or of its transpose where the layer holds it in × out."""
    recipe: Recipe | None = None
    layer: str = ""
    parameter: str = "weight"
    rows: tuple[int, int] | None = None
    attention: bool = False
    tied_to: tuple[str, ...] = ()
    """The other parameters that are the same weight."""

    @property
    def key(self) -> str:
        """The weight's name in the model."""
        return f"{self.layer}.{self.parameter}" if self.layer else self.parameter

    @property
    def trainable_parameters(self) -> int:
        """How many numbers train here."""
        assert self.recipe is not None
        (out, rest), r = self.shape, self.recipe.r
        # The factor at zero is of `out`, also an embedding's, whose rows are its tokens.
        factors = {"both": r * (out + rest), "zero": r * out, "core": r * r}
        magnitude = (rest if self.kind == "embedding" else out) if self.recipe.dora else 0
        return factors[self.recipe.trains] + magnitude


def adapter_class(layer: nn.Module) -> type[Adapter]:
    """The adapter class that fits `layer`."""
    return next(Adapter for Adapter in ADAPTERS if Adapter.fits(layer))


def candidates(model: nn.Module) -> Iterator[Site]:
    """Every weight of `model` that an adapter could sit on, in the model's own order."""
    inside_attention: list[str] = []
    for name, layer in model.named_modules():
        path = name.split(".")
        if "lora" in path or "parametrizations" in path:
            continue
        if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue  # a child `lora` would be one more of its members
        if isinstance(layer, nn.MultiheadAttention):
            inside_attention.append(name)
        attention = any(name == a or name.startswith(f"{a}.") for a in inside_attention) or any(
            "attn" in part.lower() or "attention" in part.lower() for part in path
        )
        kind = adapter_class(layer).kind
        if kind != "weight":
            if _adaptable(weight := getattr(layer, "weight", None)):
                out, rest = weight.flatten(1).shape
                shape = (rest, out) if TransposedLinearAdapter.fits(layer) else (out, rest)
                yield Site(name, kind, shape, None, name, attention=attention)
            continue
        for parameter, weight in layer._parameters.items():
            if not _adaptable(weight) or weight.dim() < 2:
                continue
            out, rest = weight.flatten(1).shape
            for part, rows in blocks(layer, parameter, out).items():
                shape = (out if rows is None else rows[1] - rows[0], rest)
                site = f"{name}.{part}" if name else part
                yield Site(site, kind, shape, None, name, parameter, rows, attention)


def _adaptable(weight: object) -> TypeGuard[Tensor]:
    """Numbers that a change can be added to: no integers, and no lazy layer's, not there yet."""
    return (
        isinstance(weight, Tensor)
        and not nn.parameter.is_lazy(weight)
        and weight.is_floating_point()
    )


def place_in_memory(weight: Tensor) -> tuple[int, int, int]:
    """Storage, first byte and last: what two tied weights share, each a Parameter of its own."""
    if weight.is_meta:
        return id(weight), 0, 0
    size, first = weight.element_size(), int(weight.storage_offset())
    last = first + sum(
        (n - 1) * step for n, step in zip(weight.shape, weight.stride(), strict=True)
    )
    return weight.untyped_storage().data_ptr(), first * size, last * size


def overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether two places are not the same and have bytes in common."""
    return one != other and one[0] == other[0] and one[1] <= other[2] and other[1] <= one[2]
