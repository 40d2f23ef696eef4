"""A step that is played back must be what it is when computed, on every batch."""

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Target
from lora_lab.adapters.pack import Pack
from lora_lab.packing.recorded_step import RecordedStep
from tests.adapters.cases import Case, cases_where, seeded
from tests.adapters.test_packed import (
    EXACT,
    MODELS,
    apart,
    four,
    gradient,
    models,
    no_pass,
    pack,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def as_each_alone(base: nn.Module, made: list[nn.Module], x: Tensor) -> None:
    """Three batches, of which the last is played: losses and gradients of every run's model."""
    alone, packed = [copy.deepcopy(model) for model in made], pack(base, made)
    step = RecordedStep(packed, F.mse_loss)
    for batch in range(3):
        x = x.roll(1, 0) * (0.9 if x.is_floating_point() else 1)
        y = torch.randn_like(made[0](x))
        losses = step(x, y)
        assert step.record is not None
        assert step.checked == (batch > 0)
        for i, (model, loss) in enumerate(zip(alone, losses, strict=True)):
            model.zero_grad()
            wanted = F.mse_loss(model(x), y)
            wanted.backward()
            assert apart(loss, wanted.detach()) <= EXACT
            own = dict(made[i].named_parameters())
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    got = gradient(packed, own[name])
                    assert apart(got, parameter.grad) <= EXACT or parameter.grad.norm() < 1e-12
        for parameter in packed.parameters():  # as a step of an optimizer moves them, in place
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert parameter.grad.stride() == parameter.stride()
                parameter.data.mul_(0.9)
        for model in alone:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(0.9)


@cases_where(
    lambda case: (
        case.variant == ("dora" if case.layer.name == "linear" else "lora")
        and no_pass(case) is None
        and len(case.inputs()) == 1
    )
)
def test_each_is_what_it_is_alone(case: Case):
    base = case.plain()
    (x,) = case.inputs()
    as_each_alone(base, models(base, four(case.how)), x)


def test_a_linear_layers_bias_is_part_of_its_product():
    """Adapted or not: vmap's own rule reads and writes all outputs again for it."""
    base = nn.Sequential(*(nn.Linear(width, width + 1) for width in (5, 6, 7))).double()
    made = models(base, four({}), {"first": Target(kind="linear", match=["0", "1"])})
    step = RecordedStep(pack(base, made), F.mse_loss)
    step(torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64))
    assert step.record is not None
    products = [str(node.target) for node in step.record.graph.nodes]
    assert products.count("aten.addmm.default") == len(base)


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, targets[0]) for name, (*_, targets) in MODELS.items() if "bert" not in name],
)
def test_whole_models(name: str, target: str):
    base, x = whole(name)
    as_each_alone(base, models(base, four({}), target, far=0.1), x)


def test_one_that_looks_into_its_mask_is_computed(caplog: pytest.LogCaptureFixture):
    """Hugging Face's leaves out a mask that masks nothing."""
    base, x = whole("bert")
    made = models(base, four({}), "attention", far=0.1)
    step, y = RecordedStep(pack(base, made), F.mse_loss), torch.randn_like(made[0](x))
    with caplog.at_level(logging.INFO, "lora_lab"):
        losses = [step(x, y) for _ in range(3)][-1]
    assert "not recorded: " in caplog.text
    wanted = torch.stack([F.mse_loss(model(x), y) for model in made])
    torch.testing.assert_close(losses, wanted, rtol=EXACT, atol=0)


def drops(dropout: float) -> tuple[Pack, RecordedStep, Tensor]:
    base, x = whole("mlp")
    runs = [{"r": 2, "alpha": 2.0, "dropout": dropout, "seed": i} for i in range(3)]
    packed = pack(base, models(base, runs)).train()
    return packed, RecordedStep(packed, F.mse_loss), x


def test_masks_are_drawn_as_they_are_when_computed():
    """The same stream of numbers gives the same masks, and goes on: two batches have not one."""
    packed, step, x = drops(0.5)
    y = torch.randn_like(packed(x)[0])
    for _ in range(2):
        step(x, y)
    assert step.checked
    seeded(5)
    played = [step(x, y) for _ in range(3)]
    seeded(5)
    computed = [step._computed(x, y)[0] for _ in range(3)]
    torch.testing.assert_close(played, computed, rtol=EXACT, atol=0)
    assert all(apart(a, b) > 1e-6 for i, a in enumerate(played) for b in played[:i])


def test_recording_draws_nothing():
    """What follows a batch has the numbers that it has where nothing is recorded."""
    packed, step, x = drops(0.5)
    y = torch.randn_like(packed(x)[0])
    seeded(5)
    found = [step(x, y) for _ in range(4)]
    seeded(5)
    wanted = [step._computed(x, y)[0] for _ in range(4)]
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=0)


def test_a_batch_of_another_shape_is_computed():
    packed, step, x = drops(0.0)
    for rows in (5, 5, 5, 3, 5):
        y = torch.randn(rows, 10, dtype=torch.float64)
        losses = step(x[:rows], y)
        wanted = [F.mse_loss(output, y) for output in packed(x[:rows])]
        torch.testing.assert_close(losses, torch.stack(wanted), rtol=EXACT, atol=0)


class Odd(nn.Module):
    """A model that does something else from batch to batch."""

    kept: Tensor

    def __init__(self, scale: Callable[["Odd", Tensor], Any]):
        super().__init__()
        self.layer, self.scale, self.calls = nn.Linear(6, 4), scale, 0
        self.register_buffer("kept", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale(self, x)


def counts(model: Odd, x: Tensor) -> float:
    model.calls += 1
    return 1.0 / model.calls


def keeps(model: Odd, x: Tensor) -> Tensor:
    model.kept = model.kept * 0.5
    return model.kept


def adds(model: Odd, x: Tensor) -> Tensor:
    return model.kept.add_(1).clone()


CALLS: list[int] = []


def counts_elsewhere(model: Odd, x: Tensor) -> int:
    CALLS.append(1)
    return len(CALLS)


ODD = {
    "counts": (counts, "changed by being called"),
    "keeps a tensor": (keeps, "changed by being called"),
    "adds in place": (adds, "changed by being called"),
    "draws": (lambda model, x: random.random(), "not do the same to every batch"),
    "counts elsewhere": (counts_elsewhere, "not do the same to every batch"),
    "decides by numbers": (lambda model, x: 2 if x.sum() > 0 else 1, "data-dependent"),
}


@pytest.mark.parametrize("how", ODD)
def test_a_model_that_differs_by_batch_is_computed(how: str, caplog: pytest.LogCaptureFixture):
    scale, said = ODD[how]
    seeded(0)
    base = Odd(scale).double()
    made = models(base, four({}))
    packed = Pack(base, [adapters.attached(m) for m in made])
    step = RecordedStep(packed, F.mse_loss)
    x, y = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    with caplog.at_level(logging.INFO, "lora_lab"):
        for _ in range(4):
            step(x, y)
    assert not step.checked
    assert step.record is None
    # Once a batch, of which there were four.
    assert packed.base.kept == {"keeps a tensor": 0.5**4, "adds in place": 5}.get(how, 1)
    assert said in caplog.text
