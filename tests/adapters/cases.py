"""The table of layers and variants that all adapter tests run over, and what they build of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from lora_lab.adapters import FORMS, INITS, Adapter, Calibration
from lora_lab.adapters.relora import ReLoRA
from lora_lab.adapters.watch import KINDS_ON_READING

seeded = torch.default_generator.manual_seed
"""torch.manual_seed of the CPU alone: that one formats the stack for each kind of device."""


@dataclass(frozen=True)
class Layer:
    """A layer that takes an adapter, and inputs it takes."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


class Doubled(nn.Linear):
    """A Linear with another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Bare(nn.Module):
    """A parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(4, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ijk->bjk", x, self.theta)


class LoopedExperts(nn.Module):
    """Experts as transformers holds them, computed one after the other; expert 2 has no tokens."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 5, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for expert, tokens in enumerate(([0, 1, 3], [2, 3])):
            hidden = nn.functional.linear(x[tokens], self.up_proj[expert]).tanh()
            hidden = (hidden @ self.down_proj[expert].T).to(x.dtype)
            output = output.index_add(0, torch.tensor(tokens), hidden)
        return output


class GatheredExperts(nn.Module):
    """Experts that are held in × out, with a bias, and gathered for each token."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.is_transposed = 3, True
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.tensor([1, 0, 1, 1])
        product = torch.bmm(x[:, None], self.gate_up_proj[experts])[:, 0]
        return product + self.gate_up_proj_bias[experts]


class EinsumExperts(nn.Module):
    """All experts for each token, by a function that takes the stack as a tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eoi->teo", x, self.weight)


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def tokens(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, 7, shape),)


LAYERS = [
    Layer("linear", "linear", lambda: nn.Linear(7, 5), floats((4, 7))),
    Layer("linear-wide", "linear", lambda: nn.Linear(3, 9, bias=False), floats((2, 3))),
    Layer("linear-3d", "linear", lambda: nn.Linear(6, 4), floats((2, 3, 6))),
    Layer("linear-1d", "linear", lambda: nn.Linear(4, 4), floats((4,))),
    Layer("gpt2-conv1d", "linear", lambda: Conv1D(5, 6), floats((2, 3, 6))),
    Layer("conv1d", "conv", lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), floats((2, 4, 9))),
    Layer("conv1d-reflect", "conv", lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"),
          floats((2, 3, 6))),
    Layer("conv2d-same", "conv",
          lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, padding_mode="circular"),
          floats((2, 3, 6, 5))),
    Layer("conv2d-grouped", "conv", lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=(2, 1)),
          floats((2, 4, 5, 4))),
    Layer("conv2d-depthwise", "conv", lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
          floats((2, 4, 4, 4))),
    Layer("conv2d-unbatched", "conv", lambda: nn.Conv2d(3, 4, 2), floats((3, 4, 4))),
    Layer("conv3d", "conv", lambda: nn.Conv3d(3, 4, 2, dilation=(1, 2, 1)),
          floats((2, 3, 3, 4, 3))),
    Layer("conv3d-pointwise", "conv", lambda: nn.Conv3d(4, 5, (1, 1, 2)), floats((2, 4, 2, 2, 3))),
    Layer("embedding", "embedding", lambda: nn.Embedding(7, 5), tokens(2, 4)),
    Layer("embedding-padding", "embedding", lambda: nn.Embedding(7, 4, padding_idx=2),
          tokens(3, 5)),
    Layer("embedding-freq", "embedding", lambda: nn.Embedding(7, 4, scale_grad_by_freq=True),
          tokens(3, 5)),
    Layer("embedding-sparse", "embedding", lambda: nn.Embedding(7, 4, sparse=True), tokens(5)),
    Layer("attention", "weight", lambda: nn.MultiheadAttention(4, 2),
          floats((3, 2, 4), (3, 2, 4), (3, 2, 4))),
    Layer("attention-kdim", "weight",
          lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True),
          floats((2, 3, 4), (2, 4, 3), (2, 4, 5))),
    Layer("lstm", "weight", lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
          floats((2, 2, 3))),
    Layer("gru", "weight", lambda: nn.GRU(3, 4, num_layers=2), floats((2, 2, 3))),
    Layer("transpose1d", "weight", lambda: nn.ConvTranspose1d(4, 3, 3), floats((2, 4, 3))),
    Layer("transpose2d", "weight", lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2),
          floats((2, 4, 2, 3))),
    Layer("transpose3d", "weight", lambda: nn.ConvTranspose3d(3, 2, 2), floats((1, 3, 2, 2, 2))),
    Layer("bilinear", "weight", lambda: nn.Bilinear(3, 4, 5), floats((2, 3), (2, 4))),
    Layer("bag", "weight", lambda: nn.EmbeddingBag(7, 4, padding_idx=1), tokens(3, 4)),
    Layer("subclass", "weight", lambda: Doubled(5, 4), floats((2, 5))),
    Layer("bare", "weight", Bare, floats((2, 4))),
    Layer("experts-looped", "experts", LoopedExperts, floats((4, 4))),
    Layer("experts-gathered", "experts", GatheredExperts, floats((4, 4))),
    Layer("experts-einsum", "experts", EinsumExperts, floats((4, 4))),
]  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "lora-r1": {"r": 1},
    "lora": {},
    "gaussian-rslora": {"init": "gaussian", "scaling": "alpha/sqrt(r)"},
    "orthogonal-alpha": {"init": "orthogonal", "scaling": "alpha"},
    "pissa": {"init": "pissa"},
    "milora": {"init": "milora"},
    "mica": {"init": "mica", "trains": "zero"},
    "eva": {"init": "eva"},
    "corda": {"init": "corda"},
    "lora-ga": {"init": "lora_ga"},
    "olora": {"init": "olora"},
    "svd": {"init": "svd"},
    "lora-fa": {"trains": "zero"},
    "lora-xs": {"init": "svd", "trains": "core"},
    "dora": {"dora": True},
    "dora-fa": {"dora": True, "trains": "zero"},
    "dora-pissa": {"dora": True, "init": "pissa"},
    "vera": {"form": "vera", "scaling": "none"},
    "loha": {"form": "loha"},
    "lokr": {"form": "lokr"},
    "lokr-both": {"form": "lokr_both", "r": 1},
    "adalora": {"form": "adalora"},
    "relora": {"form": "relora"},
}
LIKE_OTHERS = ("milora", "eva", "corda", "lora-ga")
"""Variants that differ from others in their first values alone: tried on a few layers."""
OF_FORMS = ("linear", "linear-wide", "linear-1d", "gpt2-conv1d", "conv2d-grouped")
"""Layers on which forms other than LoRA's are tried."""
A_FEW = ("linear", "gpt2-conv1d", "conv2d-grouped", "embedding-padding", "attention")


class Model(nn.Module):
    """A layer called `site`, and the first of what it gives."""

    def __init__(self, site: nn.Module):
        super().__init__()
        self.site = site

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.site(*inputs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Case:
    layer: Layer
    variant: str

    def __str__(self) -> str:
        return f"{self.layer.name}-{self.variant}"

    @property
    def how(self) -> dict[str, Any]:
        how = {"r": 2, "alpha": 2.5, "seed": 3, **VARIANTS[self.variant]}
        if INITS[how.get("init", "kaiming")].reads:
            how["calibration"] = Calibration([self.inputs()], lambda m, x: m(*x).pow(3).sum())
        return how

    def plain(self, dtype: torch.dtype = torch.float64) -> Any:
        """The model without an adapter."""
        seeded(0)
        return Model(self.layer.make()).to(dtype)

    def build(self, trained: bool = True, dtype: torch.dtype = torch.float64) -> Any:
        """A model whose `site` is adapted; trained: everything that trains has moved."""
        model = self.plain(dtype)
        self.attach(model)
        if trained:
            self.train(model)
        return model

    def train(self, model: nn.Module) -> None:
        """Moves all that trains; with ReLoRA in two rounds."""
        move(model)
        if self.variant == "relora":
            restart(model)
            move(model, seed=6)

    def attach(self, model: nn.Module) -> None:
        adapters.attach(model, "all", **self.how)

    def inputs(self) -> tuple[Tensor, ...]:
        seeded(1)
        return tuple(x.double() if x.is_floating_point() else x for x in self.layer.inputs())


CASES = [
    Case(layer, name)
    for layer in LAYERS
    for name, variant in VARIANTS.items()
    if not (variant.get("dora") and layer.kind in KINDS_ON_READING)
    if layer.name in A_FEW or name not in LIKE_OTHERS
    if layer.kind in (INITS[variant.get("init", "kaiming")].kinds or [layer.kind])
    if (form := FORMS[variant.get("form", "lora")]) is None or layer.name in OF_FORMS
    if form is None or layer.kind in form.kinds
]


def _quick_cases() -> set[Case]:
    """Plain LoRA on each layer, and each variant on one layer of each kind, the kind's in turn."""
    by_kind: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        by_kind.setdefault((case.layer.kind, case.variant), []).append(case)
    turn = {name: number for number, name in enumerate(VARIANTS)}
    of_variants = {cases[turn[name] % len(cases)] for (_, name), cases in by_kind.items()}
    return of_variants | {case for case in CASES if case.variant == "lora"}


QUICK = _quick_cases()


def cases_where(holds: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """The cases that hold; all but QUICK are slow."""
    slow = pytest.mark.slow
    cases = [pytest.param(c, marks=[] if c in QUICK else slow) for c in CASES if holds(c)]
    return pytest.mark.parametrize("case", cases, ids=str)


every_case = cases_where(lambda case: True)
every_layer = cases_where(lambda case: case.variant == "lora")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def move(model: nn.Module, seed: int = 4) -> None:
    """Moves all that trains as training could: the padding token has no gradient."""
    seeded(seed)
    for adapter in adapters.attached(model).values():
        padding = getattr(adapter, "padding", None)
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape).to(parameter)
                if padding is not None and parameter is adapter.A:
                    step[:, padding] = 0
                parameter.data.add_(step)


def restart(model: nn.Module) -> None:
    """Ends a round of ReLoRA's adapters."""
    for adapter in adapters.attached(model).values():
        assert isinstance(adapter.form, ReLoRA)
        adapter.form.restart(adapter.form_tensors(), torch.Generator().manual_seed(5))


def weight_names(model: nn.Module) -> dict[str, str]:
    """Site → the name of the parameter that its adapter changes."""
    return {
        site: f"{site}.weight"
        if adapter.kind not in KINDS_ON_READING
        else f"{site.rpartition('.')[0]}.{adapter.parameter}"
        for site, adapter in adapters.attached(model).items()
    }


def changed_weights(model: nn.Module, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name → W + ΔW, written out block by block."""
    base = adapters.base_state_dict(model)
    changed: dict[str, Tensor] = {}
    for site, name in weight_names(model).items():
        rows = adapters.attached(model)[site].rows
        weight = changed.get(name, base[name].detach().clone())
        if rows is None:
            changed[name] = weight + deltas[site]
        else:
            before, _, after = weight.tensor_split(rows)
            changed[name] = torch.cat([before, weight[slice(*rows)] + deltas[site], after])
    return changed


def on_plain(case: Case, weights: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """What a model without adapters gives with those weights."""
    output = functional_call(case.plain(), weights, inputs)
    assert isinstance(output, Tensor)
    return output


def the_adapter(model: nn.Module) -> Adapter:
    (adapter,) = adapters.attached(model).values()
    return adapter


def test_the_table_has_every_kind_and_variant():
    assert {layer.kind for layer in LAYERS} == set(adapters.KINDS)
    for key, table in (
        *(("init", adapters.INITS), ("scaling", adapters.SCALINGS), ("form", adapters.FORMS)),
    ):
        assert {v.get(key, next(iter(table))) for v in VARIANTS.values()} == set(table)
    assert {v.get("trains", "both") for v in VARIANTS.values()} == set(adapters.TRAINS)
