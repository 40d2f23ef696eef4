"""Where an adapter can sit: all weights of a model, by name, kind and shape."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_lab.adapters.adapter import Adapter, Rows
from lora_lab.adapters.attention import attention_names, is_position_table
from lora_lab.adapters.conv import ConvAdapter
from lora_lab.adapters.embedding import EmbeddingAdapter
from lora_lab.adapters.experts import ExpertsAdapter, TransposedExpertsAdapter
from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.init import INITS
from lora_lab.adapters.linear import LinearAdapter, TransposedLinearAdapter, is_fused_qkv
from lora_lab.adapters.quantized import weight_or_shape
from lora_lab.adapters.recipe import Recipe
from lora_lab.adapters.watch import KINDS_ON_READING
from lora_lab.adapters.weight import WeightAdapter, row_blocks

ADAPTERS = (
    *(LinearAdapter, TransposedLinearAdapter, ConvAdapter, EmbeddingAdapter),
    *(TransposedExpertsAdapter, ExpertsAdapter, WeightAdapter),
)
"""The adapter classes. A parameter of a layer gets the first that fits it."""

KINDS = tuple(dict.fromkeys(Adapter.kind for Adapter in ADAPTERS))
"""The kinds of site. Tests run over this table."""


@dataclass(frozen=True)
class Site:
    """A place where an adapter sits: one weight of a layer, or a block of its rows, as a matrix.

    It is named by its layer where that has one adaptable weight (`encoder.fc1`), else by its
    parameter (`attn.out_proj_weight`) or block of one (`attn.in_proj_weight_q`). A fused layer is
    one site, or one for each of its blocks (`c_attn.weight_q`, …). `layer` is the
    layer's name in the model, `parameter` the weight's name in the layer. `attention` says whether
    it belongs to attention.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    """out × rest: of weight.flatten(1), or of its transpose where the layer holds it in × out.

    Of experts it is the shape of each of their matrices.
    """
    recipe: Recipe | None = None
    layer: str = ""
    parameter: str = "weight"
    rows: Rows = None
    attention: bool = False
    experts: int = 1
    """How many matrices the weight has, each with an adapter of rank r."""
    positions: int = 1
    """How many positions a convolution's kernel has: the numbers for one input channel in a row."""
    tied_to: tuple[str, ...] = ()
    """The names of other parameters that are the same weight."""

    @property
    def key(self) -> str:
        """The weight's state-dict key in the model."""
        return f"{self.layer}.{self.parameter}" if self.layer else self.parameter

    @property
    def is_block_of_layer(self) -> bool:
        """Whether it is a block of a fused layer, which can be one site, too."""
        return self.rows is not None and self.kind != WeightAdapter.kind

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of its matrices: its name, or that of each expert (`experts.down_proj.3`)."""
        numbered = tuple(f"{self.name}.{expert}" for expert in range(self.experts))
        return numbered if self.kind == ExpertsAdapter.kind else (self.name,)

    @property
    def form_tensors(self) -> tuple[str, ...]:
        """The names of the tensors of its adapter's form; none where that is LoRA's."""
        assert self.recipe is not None
        form, (out, rest) = FORMS[self.recipe.form], self.shape
        return () if form is None else (*form.shapes(out, rest, self.positions, self.recipe.r),)

    @property
    def rank_of_update(self) -> int:
        """The highest rank that ΔW can have: that of its factors, which is r unless they are made
        of other tensors (LoHa: r²), or measured from their first values (PiSSA: 2r).
        """
        assert self.recipe is not None
        (out, rest), r, init = self.shape, self.recipe.r, INITS[self.recipe.init]
        if (form := FORMS[self.recipe.form]) is not None:
            shapes = form.shapes(out, rest, self.positions, r)
            A, _ = form.factors({n: torch.empty(s, device="meta") for n, s in shapes.items()})
            r = A.shape[0]
        elif init.starts_nonzero and self.recipe.trains != "core":
            r *= 2
        return min(out, rest, r)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers train at this site."""
        assert self.recipe is not None
        (out, rest), r = self.shape, self.recipe.r
        # The zero factor has r numbers for each of `out`: B for each output feature, and A of an
        # embedding for each token, since its table is tokens × features. An init that makes A zero
        # in all kinds has r for each of `rest`, but in an embedding.
        is_A = INITS[self.recipe.init].zero_factor == "A" and self.kind != "embedding"
        factors = {"both": r * (out + rest), "zero": r * (rest if is_A else out), "core": r * r}
        magnitude = (rest if self.kind == "embedding" else out) if self.recipe.dora else 0
        if (form := FORMS[self.recipe.form]) is not None:
            return form.trained_numbers(out, rest, self.positions, r) + magnitude
        return self.experts * (factors[self.recipe.trains] + magnitude)


def adapter_class(layer: nn.Module, parameter: str = "weight") -> type[Adapter]:
    """The adapter class that fits this parameter of `layer`."""
    return next(Adapter for Adapter in ADAPTERS if Adapter.fits_parameter(layer, parameter))


def candidate_sites(model: nn.Module, with_blocks: bool = False) -> Iterator[Site]:
    """All weights of `model` on which an adapter could sit, in the model's order.

    `with_blocks`: behind a fused layer also its blocks, which can be sites in its place.
    """
    attention_modules = attention_names(model)
    for name, layer in model.named_modules():
        path = name.split(".")
        if "lora" in path or "parametrizations" in path:
            continue
        if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue  # a child `lora` would be one more of its layers
        in_attention = any(".".join(path[:i]) in attention_modules for i in range(1 + len(path)))
        kind = adapter_class(layer).kind
        if kind not in KINDS_ON_READING:
            # Not `layer.weight`, which is W + ΔW of an adapted layer. One that is computed is no
            # parameter: if it is picked, an error says so.
            weight = weight_or_shape(layer)
            weight = layer.__dict__.get("weight") if weight is None else weight
            if _is_adaptable(weight):
                out, rest = weight.flatten(1).shape
                shape = (rest, out) if TransposedLinearAdapter.fits(layer) else (out, rest)
                attention = in_attention and not is_position_table(name, kind)
                positions = math.prod(weight.shape[2:])
                site = Site(name, kind, shape, None, name, attention=attention, positions=positions)
                yield site
                if with_blocks and is_fused_qkv(layer, path[-1]):
                    yield from _blocks(site)
            continue
        for parameter, weight in layer._parameters.items():
            if not _is_adaptable(weight) or weight.dim() < 2:
                continue
            Adapter = adapter_class(layer, parameter)
            *experts, out, rest = Adapter.weight_to_matrix(weight).shape
            for block, rows in row_blocks(layer, parameter, out).items():
                shape = (out if rows is None else rows[1] - rows[0], rest)
                site = f"{name}.{block}" if name else block
                attention = in_attention and not is_position_table(site, kind)
                where = (name, parameter, rows, attention, *experts[:1])
                yield Site(site, Adapter.kind, shape, None, *where)  # pyright: ignore


def _blocks(site: Site) -> Iterator[Site]:
    """The sites of q, k and v in a fused layer: of 96 × 32, rows 0 … 31, 32 … 63 and 64 … 95."""
    out, rest = site.shape
    for i, block in enumerate("qkv"):
        rows = i * out // 3, (i + 1) * out // 3
        name = f"{site.name}.{site.parameter}_{block}"
        yield replace(site, name=name, shape=(out // 3, rest), rows=rows)


def _is_adaptable(weight: object) -> TypeGuard[Tensor]:
    """Whether a change can be added: floating point, and not a lazy layer's that has no shape."""
    return isinstance(weight, Tensor) and not is_lazy(weight) and weight.is_floating_point()
