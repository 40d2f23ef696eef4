"""Experts that are held as one parameter, E × out × in: E matrices, an adapter of rank r for each.

The truth is the same model with W + ΔW written into its parameters, and tensors of W + ΔW. What all
adapters have in common is tested of experts over the table of cases.py.

Run: make test ARGS=tests/adapters/test_experts.py
"""

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Recipe, Target, low_rank_sum, stacks
from lora_lab.adapters.inject import place_adapters
from lora_lab.adapters.low_rank_sum import LowRankSum
from lora_lab.adapters.pack import Pack, copy_sharing_weights
from lora_lab.adapters.sites import Site, candidate_sites
from lora_lab.adapters.weight import WeightAdapter
from tests.adapters import zoo
from tests.adapters.cases import GatheredExperts, LoopedExperts, move, trained

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")


@pytest.fixture
def nothing_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forming W + ΔW of a stack is an error."""

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("W + ΔW was formed")

    monkeypatch.setattr(low_rank_sum, "_formed", refuse)


def moved(
    model: nn.Module, target: Any = "experts", r: int = 2, seed: int = 4, **settings: Any
) -> nn.Module:
    adapters.attach(model, target, r=r, alpha=3, seed=seed, **settings)
    for parameter in trained(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *(("eager", name) for name in MIXTURES),  # each has a loop of its own
        *product(("grouped_mm", "batched_mm"), ("mixtral", "gpt_oss")),
    ],
)
@pytest.mark.usefixtures("nothing_formed")
def test_each_implementation_of_a_mixture_computes_with_the_factors(implementation: str, name: str):
    model, inputs = zoo.build(name)
    model: Any = model.float()
    model.set_experts_implementation(implementation)
    expected: Any = copy.deepcopy(model)
    y = moved(model)(**inputs).logits
    assert not torch.allclose(y, expected(**inputs).logits, rtol=1e-2)
    y.square().sum().backward()
    with torch.no_grad():
        for site, delta in adapters.deltas(model).items():
            expected.get_parameter(site).add_(delta)
    y_expected = expected(**inputs).logits
    torch.testing.assert_close(y, y_expected, rtol=1e-4, atol=1e-5)
    y_expected.square().sum().backward()
    for site, adapter in adapters.attached(model).items():
        # dL/dA and dL/dB by the chain rule, from dL/dW of each expert's matrix
        G = adapter.weight_to_matrix(expected.get_parameter(site).grad)
        to_B, to_A = adapter.scale * G @ adapter.A.mT, adapter.scale * adapter.B.mT @ G
        atol = 1e-4 * G.abs().max().item()
        torch.testing.assert_close(adapter.B.grad, to_B, rtol=1e-3, atol=atol)
        torch.testing.assert_close(adapter.A.grad, to_A, rtol=1e-3, atol=atol)


def test_rank_and_count_are_those_of_the_experts_matrices():
    model, _ = zoo.build("gpt_oss")
    (site, *_) = sites = adapters.attach(model, "experts", r=2)
    assert (site.shape, site.experts) == ((2 * 24, 32), 4)
    assert site.trainable_parameters == 4 * 2 * (2 * 24 + 32)
    assert sum(s.trainable_parameters for s in sites) == adapters.count(model).trainable
    assert [s.name.rpartition("experts.")[2] for s in sites] == 2 * ["gate_up_proj", "down_proj"]
    with pytest.raises(adapters.RankError, match=r"weight 48 × 32\): at most 32"):
        adapters.attach(model, "experts", r=33, over_rank="error", name="other")
    with pytest.raises(AdapterError, match="are of kind experts, and DoRA is for linear"):
        adapters.attach(model, "experts", r=2, dora=True, name="other")


class Router(nn.Module):
    """Three dimensions, and no experts."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.weight = 4, nn.Parameter(torch.randn(3, 2, 2))


def test_other_parameters_of_three_dimensions_are_no_experts():
    model = nn.Sequential(Router(), nn.Conv1d(4, 4, 3), nn.Bilinear(2, 2, 4), GatheredExperts())
    kinds = {site.name: site.kind for site in candidate_sites(model)}
    assert kinds == {
        **{"0.weight": "weight", "1": "conv", "2.weight": "weight"},
        **{"3.gate_up_proj": "experts", "3.gate_up_proj_bias": "weight"},
    }
    sites = adapters.attach(model, "all", r=2)
    assert "3.gate_up_proj_bias" not in [site.name for site in sites]
    assert adapters.find_sites(model, {"bias": Target(match="*proj_bias")})
    model[0].weight = nn.UninitializedParameter()
    assert "0.weight" not in [site.name for site in candidate_sites(model)]


class Holder(nn.Module):
    """Holds two matrices, 4 × 3."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))


class Mlps(Holder):
    num_experts = 2


class NamedExperts(Holder):
    pass


class MarkedExperts(Holder):
    is_transposed = True


class MarkedOtherwiseExperts(Holder):
    def is_transposed(self) -> bool:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("Layer", "kind", "shape"),
    [
        (Holder, "weight", (2, 12)),
        (Mlps, "experts", (4, 3)),
        (NamedExperts, "experts", (4, 3)),
        (MarkedExperts, "experts", (3, 4)),
        (MarkedOtherwiseExperts, "experts", (4, 3)),
    ],
)
def test_experts_are_known_by_their_number_or_name_and_the_mark_of_their_class(
    Layer: type[nn.Module], kind: str, shape: tuple[int, int]
):
    (site,) = adapters.attach(model := nn.Sequential(Layer()), "all", r=2)
    assert (site.kind, site.shape) == (kind, shape)
    if kind == "experts":
        first, second = adapters.attached(model)["0.weight"].A
        assert not torch.allclose(first, second), "each is drawn"


def test_a_stored_adapter_of_a_version_that_saw_one_matrix_is_what_it_was(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(LoopedExperts()).double()
    fresh, x = copy.deepcopy(model), torch.randn(4, 4).double()
    adapter = WeightAdapter(model[0], "up_proj", None, Recipe(2, 3.0))
    adapter.fill({"A": torch.randn(2, 20).double(), "B": torch.randn(3, 2).double()})
    site = Site("0.up_proj", "weight", (3, 20), None, "0", "up_proj")
    place_adapters(model, {site: adapter}, "default")
    adapters.save(model, tmp_path)
    stored = json.loads((tmp_path / "adapter.json").read_text())["sites"]["0.up_proj"]
    assert (stored["kind"], stored["shape"]) == ("weight", [3, 5, 4])
    adapters.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert adapters.attached(fresh)["0.up_proj"].kind == "weight"


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("batched_mm", torch.float64), ("grouped_mm", torch.float32)]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_mixtures_in_a_pack_are_what_each_is_alone(
    implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stacks, "MAX_PADDING", 0)  # a stack for each rank
    base, inputs = zoo.build("mixtral")
    base: Any = base.to(dtype)
    base.set_experts_implementation(implementation)
    models = [moved(copy_sharing_weights(base), r=r, seed=r, dropout=0.5) for r in (2, 1, 2)]
    expected = torch.stack([copy.deepcopy(model)(**inputs).logits for model in models])
    pack = Pack(base, [adapters.attached(model) for model in models])
    outputs = pack(inputs)
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(outputs, expected, rtol=exact, atol=exact)
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-2)
    assert not torch.allclose(pack.train()(inputs), outputs, rtol=1e-2), "dropout"


x, tokens = torch.randn(4, 8), torch.tensor([0, 3, 3, 1])
COMPUTED: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda s: F.linear(x, s[2]),
    "linear-bias": lambda s: F.linear(x, s[torch.tensor(2)], torch.arange(16.0)),
    "matmul": lambda s: x @ s[1].T,
    "mm": lambda s: torch.mm(x, s[1].t()),
    "right": lambda s: s[1] @ x.mT,
    "bmm": lambda s: torch.bmm(s[tokens], x[:, :, None]),
    "bmm-transposed": lambda s: torch.bmm(x[:, None], s[tokens].transpose(-2, -1)),
    "matmul-batch": lambda s: x @ s.mT,
    "slice": lambda s: F.linear(x, s[1:3][-1]),
    "grouped": lambda s: F.grouped_mm(
        x, s.transpose(-2, -1), offs=torch.tensor([1, 1, 3, 3, 4], dtype=torch.int32)
    ),
}
"""What is computed with the factors."""
FORMED: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda s: s.norm(),
    "einsum": lambda s: torch.einsum("eoi,bi->beo", s, x),
    "sum": lambda s: 1 + s,
    "mask": lambda s: s[torch.tensor([True, False, True, False, False])],
    "tuple": lambda s: s[1, 2:3],
    "vector": lambda s: s[1] @ x[0],
    "vector-batch": lambda s: x[0] @ s.mT,
    "other-transpose": lambda s: s.transpose(0, 1),
    "iteration": lambda s: torch.stack(list(s)),
    "detach": lambda s: s.detach() + 0,
    "numpy": lambda s: torch.from_numpy(s.detach().numpy()),
    "cast": lambda s: s.to(torch.float64),
    "operator": lambda s: torch.ops.aten.mul.Tensor(s, 2.0),
    "two": lambda s: s[1] @ s[2].T,
    "keywords": lambda s: torch.matmul(input=x, other=s[1].T),
    "from the right": lambda s: s[1].T.__rmatmul__(x),
}
"""What the sum is formed for."""


@pytest.mark.parametrize("name", [*COMPUTED, *FORMED])
def test_a_low_rank_sum_computes_what_the_formed_sum_does(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    W, left, right = torch.randn(5, 16, 8), torch.randn(5, 16, 2), torch.randn(5, 2, 8)
    leaves = left.requires_grad_(), right.requires_grad_()
    plain = W + 0.5 * left @ right
    compute = {**COMPUTED, **FORMED}[name]
    expected, formed, form = compute(plain), [], low_rank_sum._formed
    monkeypatch.setattr(low_rank_sum, "_formed", lambda *a: formed.append(1) or form(*a))
    result = compute(LowRankSum(W, left, right, 0.5))
    assert bool(formed) == (name in FORMED)
    assert type(result) is Tensor
    torch.testing.assert_close(result, expected)
    if expected.requires_grad:
        weights = torch.randn_like(expected)
        got = torch.autograd.grad((result * weights).sum(), leaves)
        wanted = torch.autograd.grad((expected * weights).sum(), leaves)
        torch.testing.assert_close(got, wanted)


def test_what_a_low_rank_sum_looks_like():
    W = torch.randn(5, 4, 3, dtype=torch.bfloat16)
    sum_ = LowRankSum(W, torch.randn(5, 4, 2), torch.randn(5, 2, 3), 0.5)
    assert isinstance(sum_, Tensor)
    assert (sum_.shape, sum_.dtype, sum_.dim(), len(sum_)) == (W.shape, W.dtype, 3, 5)
    assert sum_.device == W.device
    assert sum_.stride() == W.stride()
    exact = (W.float() + 0.5 * sum_.left @ sum_.right).to(W.dtype)
    assert torch.equal(sum_ + 0, exact)
    for change in (lambda: sum_.zero_(), lambda: sum_[0].add_(1), lambda: sum_.data.mul_(2)):
        with pytest.raises(AdapterError, match="a change in place would be lost"):
            change()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(AdapterError, match="past torch's"):
        torch.add(sum_, 1)


def test_an_experts_dropout_is_on_its_input_features():
    """Over many masks the mean is ΔW without dropout, and each mask drops columns."""
    model = nn.Sequential(LoopedExperts()).double()
    adapters.attach(model, "experts", r=2, dropout=0.5)
    move(model)
    adapter, weight = adapters.attached(model)["0.up_proj"], model[0]._parameters["up_proj"]
    assert weight is not None
    draws = torch.stack([adapter(weight) - weight for _ in range(2000)])  # (draws, E, out, in)
    dropped = (draws == 0).all(2)
    assert 0.45 < dropped.double().mean() < 0.55
    delta = adapter.delta(weight)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - delta).abs() <= 5 * error).all()
