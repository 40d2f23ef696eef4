"""Packs: the runs that are computed in one pass must be what each is by itself.

Tested are outputs, gradients, optimizer steps, dropout, what is shared, and what is refused. The
truth is each run's model, computed separately in float64 with the same factors, a count of floating
point operations by hand, and the distribution of dropout masks.

Run: make test ARGS=tests/adapters/test_packed.py
"""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from lora_lab import adapters
from lora_lab.adapters import stacks
from lora_lab.adapters.pack import Pack, copy_sharing_weights, reason_not_packable
from lora_lab.models.cnn import CNN
from lora_lab.models.mlp import MLP
from lora_lab.models.transformer import Transformer
from lora_lab.sweeps.packs import ELEMENTWISE_OPTIMIZERS
from tests.adapters.cases import CASES, Case, cases_where, move, seeded
from tests.adapters.test_works_under import NO_VMAP
from tests.conftest import quick

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
"""Which layers vmap goes through run by run."""

EXACT = 1e-10

DRAWN = (
    {"r": 1, "alpha": 1.0, "init": "kaiming"},
    {"r": 2, "alpha": 5.0, "init": "gaussian", "scaling": "alpha/sqrt(r)"},
    {"r": 2, "alpha": 0.5, "init": "kaiming"},
    {"r": 1, "alpha": 3.0, "init": "orthogonal", "scaling": "alpha"},
)
"""Four runs that may be packed: two ranks, not in order; no scale twice, nor a seed."""
FROM_WEIGHT = tuple(
    {**run, "init": init}
    for run, init in zip(DRAWN, ("pissa", "svd", "olora", "pissa"), strict=True)
)


def four_runs(how: dict[str, Any]) -> list[dict[str, Any]]:
    """Four runs of one variant."""
    starts = FROM_WEIGHT if how.get("init") in ("pissa", "olora", "svd") else DRAWN
    rest = {k: v for k, v in how.items() if k in ("trains", "dora", "dropout", "form")}
    if "form" in rest:
        rest["init"] = "kaiming"
        rest |= {"r": 1} if rest["form"].startswith("lokr") else {}  # whose r says which tensors
    return [{**start, **rest, "seed": seed} for seed, start in enumerate(starts)]


def models(
    base: nn.Module, runs: Sequence[dict[str, Any]], target: Any = "all", far: float = 1.0
) -> list[nn.Module]:
    """A model for each run, with the base's weights and an adapter that is moved by `far`."""
    run_models = [copy_sharing_weights(base) for _ in runs]
    for i, (model, run) in enumerate(zip(run_models, runs, strict=True)):
        adapters.attach(model, target, **run)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        move(model, seed=10 + i)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.lerp_(start[name], 1 - far)
    return run_models


def pack(base: nn.Module, run_models: Sequence[nn.Module]) -> Pack:
    return Pack(base, [adapters.attached(model) for model in run_models])


def gradient(pack: Pack, run_tensor: Tensor) -> Tensor:
    """The gradient of one run's tensor, which must lie in the memory of a parameter of the pack."""
    for parameter in pack.parameters():
        memory, run_memory = parameter.untyped_storage(), run_tensor.untyped_storage()
        if parameter.requires_grad and memory.data_ptr() == run_memory.data_ptr():
            assert parameter.grad is not None
            laid = torch.empty_like(parameter).copy_(parameter.grad)  # in the same memory layout
            offset = run_tensor.storage_offset() - parameter.storage_offset()
            return laid.detach().as_strided(run_tensor.shape, run_tensor.stride(), offset)
    raise AssertionError("a run's tensor is no view of the pack's")


def relative_error(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def check_against_single_runs(
    base: nn.Module, run_models: Sequence[nn.Module], *inputs: Tensor, exact: float = EXACT
) -> None:
    """The pack's outputs and gradients, beside those of each run's model."""
    alone = [copy.deepcopy(model) for model in run_models]
    packed = pack(base, run_models)
    outputs = packed(*inputs)
    assert len(outputs) == len(run_models)
    wanted = [model(*inputs) for model in alone]
    weights = torch.randn_like(wanted[0])
    (outputs * weights).sum().backward()
    for i, (model, want) in enumerate(zip(alone, wanted, strict=True)):
        assert relative_error(outputs[i], want) <= exact, i
        (want * weights).sum().backward()
        run_parameters = dict(run_models[i].named_parameters())
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trains
        for name, parameter in trains.items():
            assert parameter.grad is not None
            got = gradient(packed, run_parameters[name])
            assert relative_error(got, parameter.grad) <= exact or parameter.grad.norm() < 1e-12, (
                i,
                name,
            )
    assert not [p for p in packed.base.parameters() if p.requires_grad and p.grad is None]
    # All runs differ, so that one computed in the place of another would be noticed.
    assert all(
        relative_error(a, b) > 1e-6
        for i, a in enumerate(wanted)
        for b in wanted[:i]
        if b.norm() > 0
    )


def reason_not_packed(case: Case) -> str | None:
    """Words of the error for a case that cannot be packed; None for one that can."""
    if case.layer.name in NO_VMAP:
        return "Batching rule not implemented"
    if case.layer.name == "embedding-freq":
        return "scales its gradient by frequency"
    if case.layer.name == "embedding-padding" and case.how.get("dora"):
        return "has a padding token, and DoRA"
    return None


@cases_where(lambda case: reason_not_packed(case) is None)
def test_each_run_is_what_it_is_alone(case: Case):
    base = case.plain()
    check_against_single_runs(base, models(base, four_runs(case.how)), *case.inputs())


@cases_where(lambda case: reason_not_packed(case) is not None)
def test_a_case_that_cannot_be_packed_is_an_error_with_the_reason(case: Case):
    base, why = case.plain(), reason_not_packed(case)
    run_models = models(base, four_runs(case.how))
    error = RuntimeError if case.layer.name in NO_VMAP else adapters.AdapterError
    with pytest.raises(error, match=why):
        pack(base, run_models)(*case.inputs())


def test_most_cases_are_packed():
    assert sum(reason_not_packed(case) is None for case in CASES) > len(CASES) * 0.85


def test_runs_that_cannot_be_a_pack_are_refused():
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)).double()

    def why(*runs: dict[str, Any]) -> str | None:
        run_models = []
        for run in runs:
            run_models.append(copy_sharing_weights(base))
            target = run.pop("target", "linear")
            adapters.attach(run_models[-1], target, **{"r": 2, "alpha": 1.0, **run})
        return reason_not_packable(base, [adapters.attached(model) for model in run_models])

    first = {"target": {"some": adapters.Target(match="0")}}
    assert why({}, {"r": 3, "alpha": 2.0, "seed": 4, "init": "gaussian"}) is None
    assert why({}, first) == "their adapters sit on different sites"
    assert "different tensors train" in str(why({}, {"trains": "zero"}))
    assert "different tensors train" in str(why({}, {"dora": True}))
    assert "different tensors train" in str(why({}, {"init": "pissa"}))
    assert "different tensors train" in str(why({}, {"form": "loha"}))
    assert "different tensors train" in str(why({"form": "lokr"}, {"form": "lokr", "r": 3}))
    assert "different tensors train" in str(why({"init": "svd"}, {"init": "svd", "trains": "core"}))


class Tied(nn.Module):
    """One matrix for the vectors of tokens and for what they are read by."""

    def __init__(self):
        super().__init__()
        self.vectors, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.vectors.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.vectors(x))


def test_adapters_that_are_tied_are_refused():
    seeded(0)
    base = Tied().double()
    run_models = models(base, four_runs({}), {"both": adapters.Target(tied=True)})
    with pytest.raises(adapters.AdapterError, match="tied"):
        pack(base, run_models)


class Masked(nn.Module):
    """BERT with a mask for padding tokens."""

    def __init__(self, attention: str):
        super().__init__()
        settings: dict[str, Any] = {
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"intermediate_size": 24, "vocab_size": 20, "num_labels": 3},
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        }
        settings["attn_implementation"] = attention
        config = BertConfig(**settings)
        self.bert = BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(input_ids=x, attention_mask=(x > 3).long()).logits


class Attending(nn.Module):
    """Causal self-attention by torch's layer."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class ByName(nn.Module):
    """Gives its layers their input by its name."""

    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6) → (B, 4)."""
        return self.fc(input=torch.relu(self.attn(input=x)))


TOKENS = torch.arange(24).view(3, 8) % 19
MODELS: dict[str, tuple[Any, Tensor, tuple[str, ...]]] = {
    "mlp": (lambda: MLP(64, 10, [12, 8]), torch.rand(5, 64), ("linear",)),
    "cnn": (lambda: CNN(10, 8, 17, [4, 6, 8]), torch.rand(3, 64), ("all", "conv", "embedding")),
    "transformer": (
        lambda: Transformer(20, 20, 16, 4, 2, 8),
        TOKENS,
        ("all", "linear", "attention", "embedding"),
    ),
    "encoder": (encoder, torch.randn(3, 5, 8), ("all", "linear", "attention")),
    "attention": (Attending, torch.randn(3, 5, 8), ("all", "attention")),
    "bert": (lambda: Masked("sdpa"), TOKENS, ("attention", "linear")),
    "bert-eager": (lambda: Masked("eager"), TOKENS, ("all",)),
    "norms": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 4)),
        torch.randn(7, 6),
        ("linear",),
    ),
    "by name": (ByName, torch.randn(7, 6), ("linear", "attention")),
    "convs": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2, padding=1),
            nn.MaxPool2d(2),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="circular"),
            nn.ConvTranspose2d(8, 3, 2),
            nn.Flatten(),
            nn.Linear(3 * 16, 4),
        ),
        torch.randn(3, 4, 6, 6),
        ("all", "conv", "weight"),
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "lora_xs": {"init": "svd", "trains": "core"},
    "lora_fa": {"trains": "zero"},
}


def base_and_input(name: str) -> tuple[nn.Module, Tensor]:
    seeded(0)
    make, x, _ = MODELS[name]
    return make().double().eval(), x.double() if x.is_floating_point() else x


WITHOUT_DORA = {
    (name, target) for name in ("encoder", "attention") for target in ("all", "attention")
}
WITHOUT_DORA |= {("convs", "all"), ("convs", "weight")}
"""Targets with a weight that no DoRA is for."""
MODEL_CASES = [
    (name, target, how)
    for name, (*_, targets) in MODELS.items()
    for target in targets
    for how in VARIANTS
    if how != "dora" or (name, target) not in {*WITHOUT_DORA, ("bert-eager", "all")}
]


OF_SMALL = [case for case in MODEL_CASES if case[0] in ("mlp", "cnn", "encoder")]


@pytest.mark.parametrize(("name", "target", "how"), quick(MODEL_CASES, OF_SMALL))
def test_whole_models(name: str, target: str, how: str):
    base, x = base_and_input(name)
    check_against_single_runs(base, models(base, four_runs(VARIANTS[how]), target, far=0.1), x)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "encoder"])
def test_in_single_precision(name: str):
    base, x = base_and_input(name)
    base, x = base.float(), x.float() if x.is_floating_point() else x
    check_against_single_runs(base, models(base, four_runs({}), far=0.1), x, exact=1e-4)


def test_convolutions_in_bfloat16_autocast():
    """Frozen and adapted ones: as each run's model, within the rounding of bfloat16."""
    base, x = base_and_input("cnn")
    base, x = base.float(), x.float()
    run_models = models(base, four_runs({}), "conv", far=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = pack(base, run_models)(x)
        for output, model in zip(outputs, run_models, strict=True):
            assert relative_error(output.float(), model(x).float()) < 0.03


@pytest.mark.parametrize("zeros", [0, 50, 10**9])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "encoder", "convs"])
def test_runs_of_many_ranks_and_of_one_run(name: str, zeros: int, monkeypatch: pytest.MonkeyPatch):
    """In a stack for each rank, in some, and in one that is padded."""
    monkeypatch.setattr(stacks, "MAX_PADDING", zeros)
    base, x = base_and_input(name)
    ranks = (3, 1, 1, 2, 1, 3, 3, 2)
    runs = [{"r": r, "alpha": 1.0 + i, "seed": i} for i, r in enumerate(ranks)]
    # Far away attention is all on one place, and its gradient rounding.
    far = 0.1 if name in ("transformer", "encoder") else 1.0
    run_models = models(base, runs, far=far)
    check_against_single_runs(base, run_models, x)
    counts = [len(packed.stacks) for packed in pack(base, run_models).packed_adapters]
    assert {0: min(counts) == 6, 50: 1 <= min(counts) < 6, 10**9: max(counts) == 1}[zeros]
    check_against_single_runs(base, models(base, runs[3:4], far=far), x)


def test_a_rank_of_its_own_at_every_site():
    base, x = base_and_input("mlp")
    first, *_, last = adapters.attached(models(base, four_runs({}))[0])
    runs = four_runs({})
    runs[0]["rank_pattern"], runs[1]["alpha_pattern"] = {first: 4}, {last: 7.0}
    check_against_single_runs(base, models(base, runs), x)


@cases_where(lambda c: c.variant in ("lora", "pissa", "dora") and reason_not_packed(c) is None)
def test_at_the_start_every_run_gives_what_the_base_gives(case: Case):
    base, x = case.plain(), case.inputs()
    wanted = base(*x)
    outputs = pack(base, models(base, four_runs(case.how), far=0.0))(*x)
    for output in outputs:
        torch.testing.assert_close(output, wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("name", "by"),
    [*(("mlp", by) for by in ELEMENTWISE_OPTIMIZERS), ("transformer", "SGD"), ("encoder", "SGD")],
)
def test_what_an_optimizer_does_to_the_pack_each_run_has(name: str, by: str):
    """Three steps on the pack's parameters, beside three on each run's. Padding stays zero."""
    base, x = base_and_input(name)
    run_models = models(base, four_runs({}), far=0.1)
    alone = [copy.deepcopy(model) for model in run_models]
    packed, make = pack(base, run_models), partial(getattr(torch.optim, by), lr=0.01)
    make = make if by == "Rprop" else partial(make, weight_decay=0.01)
    optimizer = make([p for p in packed.parameters() if p.requires_grad])
    for _ in range(3):
        optimizer.zero_grad()
        packed(x).square().flatten(1).mean(1).sum().backward()
        optimizer.step()
    for model in alone:
        run_optimizer = make([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            run_optimizer.zero_grad()
            model(x).square().mean().backward()
            run_optimizer.step()
    outputs = packed(x)
    for i, (model, other) in enumerate(zip(run_models, alone, strict=True)):
        assert relative_error(model(x), other(x)) <= EXACT
        assert relative_error(outputs[i], other(x)) <= EXACT
        changes = zip(adapters.deltas(model).values(), adapters.deltas(other).values(), strict=True)
        assert all(relative_error(a, b) <= EXACT for a, b in changes)
    for _, stack in packed.stacks:
        for name, tensor in stack.adapter.tensors().items():
            of_runs = sum(a.tensors()[name].abs().sum().item() for a in stack.run_adapters)
            assert tensor.abs().sum().item() == pytest.approx(of_runs, rel=1e-12)


def test_the_base_has_no_gradient_and_stays():
    base, x = base_and_input("mlp")
    before = copy.deepcopy(base.state_dict())
    run_models = models(base, four_runs({}))
    packed = pack(copy_sharing_weights(base), run_models)
    packed(x).sum().backward()
    of_base = [p for name, p in packed.base.named_parameters() if "lora" not in name.split(".")]
    assert len(of_base) == len(before)
    assert not any(p.requires_grad or p.grad is not None for p in of_base)
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    # No weight is held twice.
    assert {p.data_ptr() for p in of_base} == {p.data_ptr() for p in base.parameters()}


def flops(packed: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        packed(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("padded", [False, True])
def test_what_precedes_the_first_adapter_is_computed_once(
    padded: bool, monkeypatch: pytest.MonkeyPatch
):
    """And each product of an adapter costs its rank, or the one it is padded to."""
    monkeypatch.setattr(stacks, "MAX_PADDING", 10**9 if padded else 0)
    rows, widths, ranks = 8, (16, 32, 24, 10), (1, 2, 2, 5)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    base = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()
    x = torch.randn(rows, widths[0]).double()
    runs, n = [{"r": r, "alpha": 1.0, "seed": i} for i, r in enumerate(ranks)], len(ranks)

    def dense(i: int) -> int:
        return 2 * rows * widths[i] * widths[i + 1]

    def thin(i: int) -> int:
        return 2 * rows * (n * max(ranks) if padded else sum(ranks)) * (widths[i] + widths[i + 1])

    def cost(match: list[str]) -> int:
        run_models = models(base, runs, {"some": adapters.Target(match=match)})
        return flops(pack(copy_sharing_weights(base), run_models), x)

    assert cost(["4"]) == dense(0) + dense(1) + dense(2) + thin(2)
    assert cost(["2"]) == dense(0) + dense(1) + n * dense(2) + thin(1)
    assert cost(["0", "2", "4"]) == dense(0) + n * (dense(1) + dense(2)) + thin(0) + thin(1) + thin(
        2
    )


def test_the_shared_part_of_a_language_model_is_computed_once():
    """With adapters on the head alone it costs less than two models, whatever the runs."""
    base, x = base_and_input("transformer")
    runs = [{"r": 1, "alpha": 1.0, "seed": i} for i in range(8)]
    last = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)][-1]
    target = {"head": adapters.Target(match=last)}
    run_models = models(base, runs, target)
    with torch.no_grad():
        alone, all_runs = (
            flops(run_models[0], x),
            flops(pack(copy_sharing_weights(base), run_models), x),
        )
    assert all_runs < 2 * alone


class Ones(nn.Module):
    """A layer that an adapter can turn into its input under dropout: W = 0, ΔW = 1."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        nn.init.zeros_(cast(Tensor, layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


DROPPING: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(16, 16, bias=False), torch.ones(50, 16)),
    "conv": (lambda: nn.Conv2d(16, 16, 1, bias=False), torch.ones(5, 16, 3, 3)),
    "grouped": (lambda: nn.Conv1d(16, 16, 1, groups=2, bias=False), torch.ones(5, 16, 10)),
    "embedding": (lambda: nn.Embedding(16, 16), torch.arange(16).repeat(5)),
}


@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_every_run_drops_its_own(kind: str, p: float):
    """With ΔW = 1 on ones, what comes out is the mask: 0, or 1/(1−p); the mean is 1."""
    make, x = DROPPING[kind]
    x = x.double() if x.is_floating_point() else x
    base = Ones(make()).double()
    weight = cast(Any, base.layer).weight
    r = weight[0].numel()
    runs = [{"r": r, "alpha": 1.0, "scaling": "alpha", "dropout": p, "seed": 0}] * 4
    run_models = models(base, runs, far=0.0)
    for model in run_models:
        (adapter,) = adapters.attached(model).values()
        adapter.A.data.copy_(torch.eye(r))
        adapter.B.data.copy_(torch.eye(r).repeat(adapter.B.shape[0] // r, 1))
    packed = pack(base, run_models)
    seeded(0)
    outputs = packed.train()(x)
    assert all(relative_error(a, b) > 0.1 for i, a in enumerate(outputs) for b in outputs[:i])
    if kind == "embedding":  # the numbers looked up: one column each
        outputs = outputs.diagonal(dim1=-2, dim2=-1) if outputs.dim() == 4 else outputs
        outputs = torch.stack([output[torch.arange(len(x)), x] for output in outputs])
    passed = outputs != 0
    torch.testing.assert_close(outputs[passed], torch.full_like(outputs[passed], 1 / (1 - p)))
    for mask in passed:
        n = mask.numel()
        assert abs(mask.double().mean() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    again = packed(x)
    assert relative_error(again.flatten(), packed(x).flatten()) > 0.1  # another mask in each pass
    still = packed.eval()(x)
    assert torch.equal(still, packed(x))
    assert all(torch.equal(output, still[0]) for output in still)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding", "weight"])
def test_a_run_without_dropout_is_untouched_by_the_others(kind: str):
    seeded(0)
    case = {"weight": "bilinear", "grouped": "conv2d-grouped", "conv": "conv1d"}.get(kind, kind)
    (case,) = (c for c in CASES if c.layer.name == case and c.variant == "lora")
    base, x = case.plain(), case.inputs()
    runs = four_runs({})
    runs[0]["dropout"] = runs[2]["dropout"] = 0.5
    run_models = models(base, runs)
    alone = [copy.deepcopy(model).train()(*x) for model in run_models]
    outputs = pack(base, run_models).train()(*x)
    assert relative_error(outputs[1], alone[1]) <= EXACT
    assert relative_error(outputs[3], alone[3]) <= EXACT


def test_dropout_upstream_is_the_runs_own_too():
    """Behind the first adapter runs share nothing: with the same seed they still differ."""
    base, x = base_and_input("mlp")
    run_models = models(base, [{"r": 2, "alpha": 2.0, "dropout": 0.5, "seed": 1}] * 3, far=0.0)
    for model in run_models:
        move(model, seed=1)
    outputs = pack(base, run_models).train()(x)
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("before", [True, False])
def test_a_models_own_dropout_is_drawn_for_each_run(before: bool):
    """Before the first adapter as behind it."""
    seeded(0)
    layers = [nn.Dropout(0.5), nn.Linear(8, 8)]
    base = nn.Sequential(*(layers if before else layers[::-1])).double()
    run_models = models(base, [{"r": 2, "alpha": 2.0}] * 3, far=0.0)
    outputs = pack(base, run_models).train()(torch.randn(6, 8).double())
    assert all(relative_error(a, b) > 0.1 for i, a in enumerate(outputs) for b in outputs[:i])
