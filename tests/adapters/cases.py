"""The one table of layers and variants that every adapter test runs over."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Adapter


@dataclass(frozen=True)
class Layer:
    """A layer that takes an adapter, and inputs it takes."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]


LAYERS = [
    Layer("linear", "linear", lambda: nn.Linear(7, 5), lambda: torch.randn(4, 7)),
    Layer("linear-wide", "linear", lambda: nn.Linear(3, 9, bias=False), lambda: torch.randn(2, 3)),
    Layer("linear-3d", "linear", lambda: nn.Linear(6, 4), lambda: torch.randn(2, 3, 6)),
    Layer("linear-1d", "linear", lambda: nn.Linear(4, 4), lambda: torch.randn(4)),
]
RANKS = [1, 3]


@dataclass(frozen=True)
class Case:
    layer: Layer
    init: str
    scaling: str
    r: int

    def __str__(self) -> str:
        return f"{self.layer.name}-{self.init}-{self.scaling.replace('/', '_')}-r{self.r}"

    def build(self, trained: bool = True, dtype: torch.dtype = torch.float64) -> Any:
        """A model whose layer `site` has the adapter; trained: with a B that is not zero."""
        torch.manual_seed(0)
        model: Any = nn.Sequential()
        model.add_module("site", self.layer.make())
        model.to(dtype)
        self.attach(model)
        if trained:
            for adapter in adapters.attached(model).values():
                nn.init.normal_(adapter.B)
        return model

    def attach(self, model: nn.Module) -> None:
        kind, how = self.layer.kind, {"init": self.init, "scaling": self.scaling, "seed": 3}
        adapters.attach(model, kind, r=self.r, alpha=2.5, **how)  # pyright: ignore

    def input(self) -> Tensor:
        torch.manual_seed(1)
        x = self.layer.input()
        return x.double() if x.is_floating_point() else x


CASES = [Case(*c) for c in product(LAYERS, adapters.INITS, adapters.SCALINGS, RANKS)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def the_adapter(model: nn.Module) -> Adapter:
    return adapters.attached(model)["site"]


def test_the_table_has_every_kind():
    assert {layer.kind for layer in LAYERS} == set(adapters.KINDS)
