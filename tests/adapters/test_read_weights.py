"""Weights that a model reads without calling their layer: they are adapted all the same.

The truth is the same model without an adapter and with W + ΔW in the place of W, in float64.

Run: make test ARGS=tests/adapters/test_read_weights.py
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lab import adapters
from lora_lab.adapters.watch import KINDS_ON_READING
from lora_lab.packing.recorded_step import RecordedStep
from tests.adapters.cases import CASES, Case, cases_where, move, seeded
from tests.adapters.test_packed import check_against_single_runs, four_runs, models, pack
from tests.adapters.test_packed import reason_not_packed as reason_not_packed_when_called

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}


def _use_conv(site: Any, x: Tensor) -> Tensor:
    return site._conv_forward(x, site.weight.flip(-1), None)


def _use_linear(site: Any, x: Tensor) -> Tensor:
    # GPT-2's Conv1D holds its weight in × out.
    return x @ site.weight if hasattr(site, "nf") else F.linear(x, site.weight)


def _use_embedding(site: Any, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, site.weight) + site.weight.mean(0)


USES: dict[str, Callable[..., Tensor]] = {
    "linear": _use_linear,
    "conv": _use_conv,
    "embedding": _use_embedding,
}
"""Kind of site → what a model computes with a weight that it reads."""


class Reads(nn.Module):
    """Calls its layer, and uses the layer's weight once more without a call."""

    def __init__(self, site: nn.Module, kind: str):
        super().__init__()
        self.site, self.kind = site, kind

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.site(*inputs).tanh() + USES[self.kind](self.site, *inputs)


def build(case: Case) -> Any:
    seeded(0)
    return Reads(case.layer.make(), case.layer.kind).double()


def is_factored(case: Case) -> bool:
    # Autograd itself cannot add a sparse gradient of a call to a dense one.
    return case.layer.kind not in KINDS_ON_READING and case.layer.name != "embedding-sparse"


factored = cases_where(is_factored)
of_each_layer = cases_where(lambda case: is_factored(case) and case.variant in ("lora", "dora"))


@factored
def test_both_ways_of_use_compute_with_the_changed_weight(case: Case):
    model, inputs = build(case), case.inputs()
    plain, base = copy.deepcopy(model), model(*inputs)
    case.attach(model)
    torch.testing.assert_close(model(*inputs), base, **EXACT)
    move(model)
    (delta,) = adapters.deltas(model).values()
    weight = (plain.site.weight + delta).detach()
    plain.site.weight = nn.Parameter(weight)
    y = model(*inputs)
    assert not torch.allclose(y, base)
    torch.testing.assert_close(y, plain(*inputs), **EXACT)
    (adapter,) = adapters.attached(model).values()
    if adapter.magnitude is None and not getattr(model.site, "scale_grad_by_freq", False):
        trained = [p for p in adapter.parameters() if p.requires_grad]
        plain(*inputs).square().sum().backward()
        expected = torch.autograd.grad(delta, trained, plain.site.weight.grad)
        got = torch.autograd.grad(y.square().sum(), trained)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs), y)
    with adapters.disabled(model):
        assert torch.equal(model(*inputs), base)
    adapters.merge(model)
    torch.testing.assert_close(model(*inputs), y, **EXACT)
    adapters.detach(model)
    assert torch.equal(model(*inputs), base)


@cases_where(lambda case: is_factored(case) and reason_not_packed_when_called(case) is None)
def test_in_a_pack_each_run_is_what_it_is_alone(case: Case):
    base = build(case)
    check_against_single_runs(base, models(base, four_runs(case.how)), *case.inputs())


@of_each_layer
def test_dropout_of_what_is_read_is_on_columns(case: Case):
    """The mean over many masks is the weight without dropout, and eval mode drops nothing."""
    model = build(case)
    adapters.attach(model, "all", **{**case.how, "dropout": 0.5})
    move(model)
    exact = model.eval().site.weight.detach()
    (delta,) = adapters.deltas(model).values()
    with adapters.disabled(model):
        torch.testing.assert_close(exact, model.site.weight + delta, **EXACT)
    model.train()
    masked = torch.stack([model.site.weight.detach() for _ in range(300)])
    spread = masked.std(0) / len(masked) ** 0.5
    assert spread.max() > 0
    assert ((masked.mean(0) - exact).abs() <= 6 * spread + 1e-12).all()


@of_each_layer
def test_under_autocast_and_in_half_precision(case: Case):
    model = build(case).float()
    case.attach(model)
    move(model)
    inputs = tuple(x.float() if x.is_floating_point() else x for x in case.inputs())
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*inputs)
    scale = exact.abs().max().item()
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1 * scale)
    if case.layer.kind != "embedding":
        half = copy.deepcopy(model).bfloat16()
        y = half(*(x.bfloat16() for x in inputs))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1 * scale)


def test_a_recorded_step_reads_the_weights_of_its_moment():
    (case,) = (c for c in CASES if c.layer.name == "linear" and c.variant == "lora")
    base = build(case)
    packed = pack(base, models(base, four_runs(case.how)))
    step = RecordedStep(packed, lambda outputs, targets: (outputs - targets).square().sum())
    for seed in range(4):
        seeded(seed)
        batch = torch.randn(4, 7).double(), torch.randn(4, 5).double()
        losses = step(*batch)
        exact, gradients = step._compute(*batch)
        torch.testing.assert_close(losses, exact, **EXACT)
        for parameter, gradient in zip(step.trained, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **EXACT)
            assert parameter.grad is not None
            parameter.data -= 0.01 * parameter.grad
    assert step.is_recordable


class Asks(nn.Module):
    """Asks for its layer's dtype, as the models of transformers do, and calls the layer."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        assert self.site.weight.shape == (32, 32)
        return self.site(x.to(self.site.weight.dtype)).to(self.site.weight.device)


def test_a_pack_forms_nothing_where_a_weight_is_only_looked_at():
    base, x = Asks(), torch.randn(4, 32)
    packed = pack(base, models(base, [{"r": 1}, {"r": 2}]))
    with FlopCounterMode(display=False) as counter:
        packed(x)
    # The layer, shared by both runs, and the thin products of ranks 1 and 2; W + ΔW of both runs
    # would take 2 · 32 · 32 · (1 + 2) more.
    assert counter.get_total_flops() <= 2 * 4 * 32 * 32 + 2 * 2 * 4 * (32 + 32) * 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "add_": lambda site: site.weight.add_(1),
    "init": lambda site: nn.init.zeros_(site.weight),
    "data": lambda site: site.weight.data.copy_(torch.zeros(5, 7)),
    "set data": lambda site: setattr(site.weight, "data", torch.zeros(5, 7)),
    "item": lambda site: site.weight.__setitem__(0, 1),
    "detach": lambda site: site.weight.detach().mul_(2),
    "+=": lambda site: site.weight.__iadd__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_that_would_be_lost_is_an_error(change: str):
    site = nn.Linear(7, 5)
    model = nn.Sequential(site)
    adapters.attach(model, r=2)
    with torch.no_grad(), pytest.raises(adapters.AdapterError, match="W itself is in"):
        CHANGES[change](site)
    with torch.no_grad(), adapters.disabled(model):
        CHANGES[change](site)


def test_cases_are_of_all_kinds_of_factored_layers():
    assert {case.layer.kind for case in CASES if is_factored(case)} == set(USES)
