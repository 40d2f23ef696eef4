"""Several adapters on one base: switching, disabling, combining; and tied weights."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Target
from tests.adapters.cases import Case, every_layer, move
from tests.everything import Everything

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def test_several_adapters_are_switched_between():
    torch.manual_seed(0)
    model, x = Everything(5, 3), torch.randn(4, 5)
    base = model(x)
    adapters.attach(model, "linear", r=2, alpha=2, name="one")
    move(model)
    one = model(x)
    adapters.attach(model, "all", r=3, alpha=1, name="other", init="pissa")
    move(model, seed=6)
    other = model(x)
    assert sorted(adapters.names(model)) == ["one", "other"]
    assert set(adapters.attached(model, "one")) == {"fc", "head"}
    for name, output in (("one", one), ("other", other), (None, base), ("one", one)):
        adapters.switch(model, name)
        assert torch.equal(model(x), output)
    with adapters.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), one)
    adapters.merge(model)
    torch.testing.assert_close(model(x), one)
    with pytest.raises(adapters.AdapterError, match="'one' of 'fc' is merged: unmerge it first"):
        adapters.switch(model, "other")
    adapters.unmerge(model)
    adapters.detach(model, "one")
    assert adapters.names(model) == ["other"]
    assert torch.equal(model(x), base)
    adapters.switch(model, "other")
    assert torch.equal(model(x), other)
    with pytest.raises(adapters.AdapterError, match="there is no such adapter, only other"):
        adapters.switch(model, "one")
    adapters.detach(model)
    assert torch.equal(model(x), base)
    assert all(p.requires_grad for p in model.parameters())


@every_layer
def test_a_combination_is_the_weighted_sum_exactly(case: Case):
    model = case.build()
    adapters.attach(model, "all", r=1, alpha=3, init="gaussian", name="second")
    move(model, seed=8)
    adapters.attach(model, "all", r=2, alpha=1, init="svd", trains="core", name="third")
    move(model, seed=9)
    adapters.attach(model, "all", r=2, alpha=1, init="pissa", name="fourth")
    move(model, seed=10)
    shares = {"default": 0.5, "second": -2.0, "third": 1.5, "fourth": 1.0}
    parts = {name: adapters.deltas(model, name) for name in shares}
    adapters.combine(model, shares, "mix")
    assert adapters.names(model)[-1] == "mix"
    for site, adapter in adapters.attached(model).items():
        expected = sum(share * parts[name][site] for name, share in shares.items())
        torch.testing.assert_close(adapters.deltas(model)[site], expected, **EXACT)
        assert (adapter.r, adapter.scale) == (2 + 1 + 2 + 4, 1.0)


def test_a_combination_of_what_is_not_there_or_no_product_is_an_error():
    model = nn.Linear(4, 4)
    adapters.attach(model, r=1, alpha=1, dora=True)
    with pytest.raises(adapters.AdapterError, match="there is no adapter a, only default"):
        adapters.combine(model, {"a": 1.0}, "b")
    with pytest.raises(adapters.AdapterError, match="'default' is a DoRA"):
        adapters.combine(model, {"default": 1.0}, "b")


class Tied(nn.Module):
    """A language model's embedding and head, which share their table."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


@pytest.mark.parametrize("first", ["embed", "head"])
def test_a_tied_weight_is_adapted_once_on_purpose(first: str, tmp_path: Path):
    torch.manual_seed(0)
    model, x = Tied().double(), torch.tensor([[1, 2, 8], [0, 2, 4]])
    base = model(x)
    kind = "embedding" if first == "embed" else "linear"
    (site,) = adapters.attach(model, {"tied": Target(kind, tied=True)}, r=2, alpha=3)
    assert site.name == first
    assert torch.equal(model(x), base)
    move(model)
    y, (delta,) = model(x), adapters.deltas(model).values()
    assert not torch.allclose(y, base)
    plain = copy.deepcopy(model)
    adapters.detach(plain)
    assert torch.equal(plain(x), base)
    weight = (plain.embed.weight + delta).detach().requires_grad_()
    plain.embed.weight = plain.head.weight = nn.Parameter(weight.detach())
    torch.testing.assert_close(plain(x), y, **EXACT)
    plain(x).square().sum().backward()
    adapter = adapters.attached(model)[first]
    expected = torch.autograd.grad(delta, [adapter.A, adapter.B], plain.embed.weight.grad)
    got = torch.autograd.grad(model(x).square().sum(), [adapter.A, adapter.B])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    twin: Any
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        assert twin.embed.lora.default.weight.A is twin.head.lora.default.weight.A
    adapters.save(model, tmp_path)
    fresh = Tied().double()
    fresh.load_state_dict(adapters.base_state_dict(model))
    adapters.load(fresh, tmp_path)
    assert torch.equal(fresh(x), y)
    before = model.embed.weight.clone()
    adapters.merge(model)
    torch.testing.assert_close(model(x), y, **EXACT)
    assert torch.equal(adapters.base_state_dict(model)["head.weight"], before)
    adapters.unmerge(model)
    assert torch.equal(model(x), y)
    assert torch.equal(model.embed.weight, before)
    adapters.detach(model)
    assert torch.equal(model(x), base)
    assert "lora" not in model.head._modules


def test_both_ends_of_a_tied_weight_may_be_picked():
    sites = adapters.attach(Tied(), {"all": Target(tied=True)}, r=2, alpha=3)
    assert [site.name for site in sites] == ["embed"]


@pytest.mark.parametrize("how", [{"dora": True}, {"init": "pissa"}])
def test_a_tied_weight_takes_plain_factors_alone(how: dict):
    tied = Tied()
    with pytest.raises(adapters.AdapterError, match="'embed' is tied: only plain A and B"):
        adapters.attach(tied, {"all": Target(tied=True)}, r=2, alpha=3, **how)
    assert not adapters.attached(tied)
    assert all(p.requires_grad for p in tied.parameters())


def test_the_count_of_the_third_text():
    """d × k = 1000 × 5000 at r = 1: 6,000 parameters against 5,000,000."""
    model = nn.Linear(5000, 1000, bias=False)
    adapters.attach(model, r=1, alpha=1)
    cost = adapters.count(model)
    assert (cost.trainable, cost.frozen, cost.full_trainable) == (6000, 5_000_000, 5_000_000)
    assert (cost.adapter_bytes, cost.full_bytes) == (24_000, 20_000_000)
    assert (cost.optimizer_bytes, cost.full_optimizer_bytes) == (48_000, 40_000_000)


def test_optimizer_bytes_are_adams():
    model = Everything(5, 3)
    adapters.attach(model, "all", r=2, alpha=1)
    cost = adapters.count(model)
    optimizer = torch.optim.Adam(adapters.parameter_groups(model, 0.1), capturable=False)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    moments = [
        t for state in optimizer.state.values() for k, t in state.items() if k.startswith("exp_avg")
    ]
    assert cost.optimizer_bytes == sum(t.numel() * t.element_size() for t in moments)
    assert cost.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_plus_groups():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 5), "fc": nn.Linear(5, 4)})
    adapters.attach(model, "all", r=2, alpha=1)
    made = adapters.attached(model)
    slow, fast = adapters.parameter_groups(model, 0.1, ratio=16.0)
    assert (slow["lr"], fast["lr"]) == (0.1, 1.6)
    assert [id(p) for p in fast["params"]] == [id(made["embed"].A), id(made["fc"].B)]
    assert [id(p) for p in slow["params"]] == [id(made["embed"].B), id(made["fc"].A)]
    assert slow["weight_decay"] == fast["weight_decay"] == 0


def test_a_layer_used_twice_is_adapted_once():
    layer = nn.Linear(3, 3)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 3)
    adapters.attach(model, {"a": Target(tied=True)}, r=1, alpha=1)
    move(model)
    (delta,) = adapters.deltas(model).values()
    y = model(x)
    adapters.detach(model)
    layer.weight.data += delta.detach()
    torch.testing.assert_close(model(x), y)


def test_names_with_the_signs_of_a_glob(tmp_path: Path):
    model, x = nn.Module(), torch.randn(2, 3)
    model.add_module("a[0]", nn.Linear(3, 3))
    model.add_module("a0", nn.Linear(3, 3))
    adapters.attach(model, r=1, alpha=1)
    move(model)
    y = model.get_submodule("a[0]")(x)
    adapters.save(model, tmp_path)
    adapters.detach(model)
    adapters.load(model, tmp_path)
    assert torch.equal(model.get_submodule("a[0]")(x), y)
    adapters.combine(model, {"default": 1.0}, "same")
    torch.testing.assert_close(model.get_submodule("a[0]")(x), y)
