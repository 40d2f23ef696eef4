"""The recorded step of a pack: a replayed batch gives what computing it gives.

Independent truth: each run's own model with a plain forward and backward, in float64; for dropout,
the same step computed from the same random stream; for models that cannot be recorded, how often
their own code ran, and the log.

Run: make test ARGS=tests/packing/test_recorded_step.py
"""

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Target
from lora_lab.adapters.model_call import logits
from lora_lab.adapters.pack import Pack
from lora_lab.packing.recorded_step import MAX_RECORDS, Record, RecordedStep
from lora_lab.training.tasks import cross_entropy, squared_error
from tests.adapters.cases import Case, cases_where, seeded
from tests.adapters.test_packed import (
    EXACT,
    MODELS,
    Masked,
    base_and_input,
    four_runs,
    gradient,
    models,
    pack,
    reason_not_packed,
    relative_error,
)
from tests.conftest import quick

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def records(step: RecordedStep) -> list[Record]:
    """All that a step has recorded."""
    return [record for records in step.records.values() for record in records]


def check_against_single_runs(base: nn.Module, run_models: list[nn.Module], x: Tensor) -> None:
    """Three batches, the last replayed: losses and gradients are those of each run's model."""
    single_models = [copy.deepcopy(model) for model in run_models]
    packed = pack(base, run_models)
    step = RecordedStep(packed, squared_error)
    for batch in range(3):
        x = x.roll(1, 0) * (0.9 if x.is_floating_point() else 1)
        y = torch.randn_like(run_models[0](x))
        losses = step(x, y)
        (record,) = records(step)
        assert record.is_trusted == (batch > 0)
        for i, (model, loss) in enumerate(zip(single_models, losses, strict=True)):
            model.zero_grad()
            expected = squared_error(model(x), y)
            expected.backward()
            assert relative_error(loss, expected.detach()) <= EXACT
            packed_parameters = dict(run_models[i].named_parameters())
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    packed_gradient = gradient(packed, packed_parameters[name])
                    distance = relative_error(packed_gradient, parameter.grad)
                    assert distance <= EXACT or parameter.grad.norm() < 1e-12
        for parameter in packed.parameters():  # moved in place, as by a step of an optimizer
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert parameter.grad.stride() == parameter.stride()
                parameter.data.mul_(0.9)
        for model in single_models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(0.9)


@cases_where(
    lambda case: (
        case.variant == ("dora" if case.layer.name == "linear" else "lora")
        and reason_not_packed(case) is None
        and len(case.inputs()) == 1
    )
)
def test_a_replay_is_each_runs_own_step(case: Case):
    base = case.plain()
    (x,) = case.inputs()
    check_against_single_runs(base, models(base, four_runs(case.how)), x)


def test_a_linear_layers_bias_is_added_within_its_product():
    """Adapted or not. vmap's own rule would add it in a second pass over all outputs."""
    base = nn.Sequential(*(nn.Linear(width, width + 1) for width in (5, 6, 7))).double()
    run_models = models(base, four_runs({}), {"first": Target(kind="linear", match=["0", "1"])})
    step = RecordedStep(pack(base, run_models), squared_error)
    step(torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64))
    (record,) = records(step)
    operations = [str(node.target) for node in record.graph.graph.nodes]
    assert operations.count("aten.addmm.default") == len(base)


@pytest.mark.parametrize(
    ("name", "target"),
    quick(
        [(name, targets[0]) for name, (*_, targets) in MODELS.items() if "bert" not in name],
        [("mlp", "linear"), ("attention", "all"), ("norms", "linear"), ("by name", "linear")],
    ),
)
def test_models_of_many_layers(name: str, target: str):
    base, x = base_and_input(name)
    check_against_single_runs(base, models(base, four_runs({}), target, far=0.1), x)


def masked_batch(padding: int, length: int = 6) -> dict[str, Tensor]:
    """Tokens for BERT; the first row has so many tokens of padding."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, length - padding :] = 0
    return {"input_ids": torch.randint(0, 20, (3, length)), "attention_mask": mask}


@pytest.mark.parametrize("attention", quick(["sdpa", "eager"], ["sdpa"]))
def test_a_model_that_branches_on_its_mask(attention: str):
    """Hugging Face's BERT leaves out a mask that masks nothing: other operations, another record.

    The padding first occurs in the third batch, when the record without a mask is trusted.
    """
    seeded(0)
    base = Masked(attention).double().eval().bert
    run_models = models(base, four_runs({}), "attention", far=0.1)
    packed = pack(base, run_models)
    step = RecordedStep(packed, cross_entropy)
    y, numbers = torch.tensor([0, 2, 1]), []
    for padding in (0, 0, 3, 2, 0, 1, 0):
        batch = masked_batch(padding)
        losses = step(batch, y)
        for i, model in enumerate(run_models):
            parameters = [p for p in model.parameters() if p.requires_grad]
            expected = cross_entropy(logits(model, batch), y)
            assert relative_error(losses[i], expected.detach()) <= EXACT
            for p, wanted in zip(
                parameters, torch.autograd.grad(expected, parameters), strict=True
            ):
                assert relative_error(gradient(packed, p), wanted) <= EXACT
        numbers.append([(record.numbers, record.is_trusted) for record in records(step)])
    assert numbers[:3] == [[([True], False)], [([True], True)], [([True], True), ([False], False)]]
    assert numbers[-1] == [([True], True), ([False], True)]


@pytest.mark.slow
def test_padded_batches_have_a_record_for_each_length():
    """From a length's second batch on, as long as there are fewer than the most records."""
    seeded(0)
    base = Masked("sdpa").double().eval().bert
    run_models = models(base, four_runs({}), "attention", far=0.1)
    packed = pack(base, run_models)
    step, y = RecordedStep(packed, cross_entropy), torch.tensor([0, 2, 1])
    counts = []
    for length in (4, 5, 5, 4, 5, 6, 7, 5, 7):
        batch = masked_batch(2, length)
        losses = step(batch, y)
        counts.append(len(records(step)))
        expected = torch.stack([cross_entropy(logits(model, batch), y) for model in run_models])
        torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)
    assert counts == [1, 1, 2, 2, 2, 2, 2, 2, 3]
    assert [record.is_trusted for record in records(step)] == [True, True, False]
    for length in [*range(8, 9 + MAX_RECORDS)] * 2:
        step(masked_batch(1, length), y)
    assert len(records(step)) == MAX_RECORDS


def test_micro_batches_are_added_up():
    _, step, x = step_with_dropout(0.0)
    y = torch.randn(5, 10, dtype=torch.float64)
    for _ in range(3):  # the last of them a replay
        sums = step(x[:2], y[:2]) + step(x[2:4], y[2:4], add=True) + step(x[4:], y[4:], add=True)
        added = [p.grad.clone() for p in step.trained if p.grad is not None]
        torch.testing.assert_close(sums, step(x, y), rtol=EXACT, atol=0)
        at_once = [p.grad for p in step.trained if p.grad is not None]
        torch.testing.assert_close(added, at_once, rtol=1e-9, atol=1e-12)


def step_with_dropout(dropout: float) -> tuple[Pack, RecordedStep, Tensor]:
    base, x = base_and_input("mlp")
    runs = [{"r": 2, "alpha": 2.0, "dropout": dropout, "seed": i} for i in range(3)]
    packed = pack(base, models(base, runs)).train()
    return packed, RecordedStep(packed, squared_error), x


def test_a_replay_draws_the_dropout_masks_of_a_computed_step():
    """From the same random stream come the same masks, and other ones for each batch."""
    packed, step, x = step_with_dropout(0.5)
    y = torch.randn_like(packed(x)[0])
    for _ in range(2):
        step(x, y)
    assert [record.is_trusted for record in records(step)] == [True]
    seeded(5)
    replayed = [step(x, y) for _ in range(3)]
    seeded(5)
    computed = [step._compute(x, y)[0] for _ in range(3)]
    torch.testing.assert_close(replayed, computed, rtol=EXACT, atol=0)
    assert all(relative_error(a, b) > 1e-6 for i, a in enumerate(replayed) for b in replayed[:i])


def test_recording_leaves_the_random_stream_as_it_is():
    """Dropout in later batches is what it would be if nothing were recorded."""
    packed, step, x = step_with_dropout(0.5)
    y = torch.randn_like(packed(x)[0])
    seeded(5)
    losses = [step(x, y) for _ in range(4)]
    seeded(5)
    expected = [step._compute(x, y)[0] for _ in range(4)]
    torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)


def test_a_batch_of_another_shape_is_computed():
    packed, step, x = step_with_dropout(0.0)
    for rows in (5, 5, 5, 3, 5):
        y = torch.randn(rows, 10, dtype=torch.float64)
        losses = step(x[:rows], y)
        expected = [squared_error(output, y) for output in packed(x[:rows])]
        torch.testing.assert_close(losses, torch.stack(expected), rtol=EXACT, atol=0)


class StatefulModel(nn.Module):
    """A model whose outputs for the same batch change from call to call."""

    factor: Tensor

    def __init__(self, scale: Callable[["StatefulModel", Tensor], Any]):
        super().__init__()
        self.layer, self.scale, self.calls = nn.Linear(6, 4), scale, 0
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale(self, x)


def counts_calls(model: StatefulModel, x: Tensor) -> float:
    model.calls += 1
    return 1.0 / model.calls


def keeps_a_tensor(model: StatefulModel, x: Tensor) -> Tensor:
    model.factor = model.factor * 0.5
    return model.factor


def adds_in_place(model: StatefulModel, x: Tensor) -> Tensor:
    return model.factor.add_(1).clone()


CALLS: list[int] = []


def counts_elsewhere(model: StatefulModel, x: Tensor) -> int:
    CALLS.append(1)
    return len(CALLS)


STATEFUL = {
    "counts": (counts_calls, "changed by being called"),
    "keeps a tensor": (keeps_a_tensor, "changed by being called"),
    "adds in place": (adds_in_place, "changed by being called"),
    "draws": (lambda model, x: random.random(), "not do the same to every batch"),
    "counts elsewhere": (counts_elsewhere, "not do the same to every batch"),
    "selects": (lambda model, x: x[x[:, 0] > 0].sum(), "depends on numbers"),
}


@pytest.mark.parametrize("how", STATEFUL)
def test_a_model_that_changes_from_call_to_call_is_not_recorded(
    how: str, caplog: pytest.LogCaptureFixture
):
    scale, reason = STATEFUL[how]
    seeded(0)
    base = StatefulModel(scale).double()
    run_models = models(base, four_runs({}))
    packed = Pack(base, [adapters.attached(model) for model in run_models])
    step = RecordedStep(packed, squared_error)
    x, y = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    with caplog.at_level(logging.INFO, "lora_lab"):
        for _ in range(4):
            step(x, y)
    assert not records(step)
    # The model's own code ran once for each of the four batches.
    assert packed.base.factor == {"keeps a tensor": 0.5**4, "adds in place": 5}.get(how, 1)
    assert reason in caplog.text
