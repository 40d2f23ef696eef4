"""Several adapters on one base, tied weights, costs, and what else a model with adapters must do.

The truth is the outputs from before a switch, a plain model with W + ΔW in its weights, numbers
counted by hand, and the state that torch's Adam holds.

Run: make test ARGS=tests/adapters/test_inject.py
"""

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
from tests.all_layer_kinds import AllLayerKinds

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def test_several_adapters_are_switched_between():
    torch.manual_seed(0)
    model, x = AllLayerKinds(5, 3), torch.randn(4, 5)
    base = model.requires_grad_(False)(x)  # torch multiplies in another way where a weight trains
    model.requires_grad_(True)
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
    with pytest.raises(adapters.AdapterError, match="merged into fc, head: unmerge it first"):
        adapters.switch(model, "other")
    adapters.unmerge(model)
    adapters.detach(model, "one")
    assert adapters.names(model) == ["other"]
    assert torch.equal(model(x), base)
    adapters.switch(model, "other")
    assert torch.equal(model(x), other)
    with pytest.raises(adapters.AdapterError, match="no adapter 'one'; on the model: other"):
        adapters.switch(model, "one")
    adapters.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.requires_grad_(False)(x), base)


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
    with pytest.raises(adapters.AdapterError, match="no adapter 'a'; on the model: default"):
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
        owner, other = ("embed", "head") if first == "embed" else ("head", "embed")
        slots = {name: twin.get_submodule(name).lora.default.weight for name in (owner, other)}
        assert slots[other].source is slots[owner]
    adapters.save(model, tmp_path)
    fresh = Tied().double()
    fresh.load_state_dict(adapters.base_state_dict(model))
    adapters.load(fresh, tmp_path)
    assert torch.equal(fresh(x), y)
    before = adapters.base_state_dict(model)["embed.weight"].clone()
    adapters.merge(model)
    torch.testing.assert_close(model(x), y, **EXACT)
    assert torch.equal(adapters.base_state_dict(model)["head.weight"], before)
    adapters.unmerge(model)
    assert torch.equal(model(x), y)
    assert torch.equal(adapters.base_state_dict(model)["embed.weight"], before)
    assert len(adapters.adapter_state_dict(model)) == 2
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


def test_the_count_for_one_large_layer_at_rank_1():
    """d × k = 1000 × 5000 at r = 1: 6,000 parameters against 5,000,000."""
    model = nn.Linear(5000, 1000, bias=False)
    adapters.attach(model, r=1, alpha=1)
    cost = adapters.count(model)
    assert (cost.trainable, cost.frozen, cost.full_trainable) == (6000, 5_000_000, 5_000_000)
    assert (cost.adapter_bytes, cost.full_bytes) == (24_000, 20_000_000)
    assert (cost.optimizer_bytes, cost.full_optimizer_bytes) == (48_000, 40_000_000)


def test_optimizer_bytes_are_adams():
    model = AllLayerKinds(5, 3)
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
    attached = adapters.attached(model)
    slow, fast = adapters.parameter_groups(model, 0.1, ratio=16.0)
    assert (slow["lr"], fast["lr"]) == (0.1, 1.6)
    assert [id(p) for p in fast["params"]] == [id(attached["embed"].A), id(attached["fc"].B)]
    assert [id(p) for p in slow["params"]] == [id(attached["embed"].B), id(attached["fc"].A)]
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


def test_a_users_own_hooks_come_after_the_adapter():
    layer, x = nn.Linear(4, 5), torch.randn(3, 4)
    layer.register_forward_hook(lambda module, args, output: (3 * output, "more"))
    adapters.attach(layer, r=2, alpha=2)
    move(layer)
    y, _ = layer(x)
    adapters.merge(layer)
    torch.testing.assert_close(layer(x)[0], y)


def test_a_frozen_norm_keeps_its_statistics_and_detach_frees_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    before, x = copy.deepcopy(model), torch.randn(8, 4)
    adapters.attach(model.train(), r=2, alpha=2)
    adapters.attach(model, r=1, alpha=2, name="second")
    model(x)
    base = adapters.base_state_dict(model)
    assert all(torch.equal(base[key], value) for key, value in before.state_dict().items())
    assert model[2].training
    adapters.detach(model)
    assert all(module.training for module in model.modules())
    assert vars(model[1]).keys() == vars(before[1]).keys()
    assert not model[1]._forward_pre_hooks
    model(x)
    assert model[1].num_batches_tracked == 1


def test_what_is_not_active_takes_no_gradient():
    model = everything()
    adapters.attach(model, "linear", r=2, alpha=2, init="pissa", trains="zero", name="second")
    for name in ("second", "default"):
        adapters.switch(model, name)
        trained = {
            n.split("lora.")[1].split(".")[0]
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        assert trained == {name}
    adapters.switch(model, "second")
    second = adapters.attached(model)["fc"]
    assert (second.A.requires_grad, second.B.requires_grad) == (False, True)
    with adapters.disabled(model):
        assert second.B.requires_grad


def everything() -> AllLayerKinds:
    torch.manual_seed(0)
    model = AllLayerKinds(5, 3)
    adapters.attach(model, "all", r=2, alpha=2)
    return model


@pytest.mark.parametrize("first", ["embedding", "linear"])
def test_a_shared_tables_padding_token_is_held_at_zero(first: str, tmp_path: Path):
    model = Tied()
    model.embed.padding_idx = 2
    if first == "linear":
        head = model.head
        del model.head
        model._modules = {"head": head, **model._modules}
    adapters.attach(model, {"tied": Target(tied=True)}, r=2, alpha=3)
    move(model)
    x = torch.tensor([[1, 2, 8]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    (delta,) = adapters.deltas(model).values()
    assert not delta[2].any()
    assert delta.any()
    y = model(x)
    adapters.merge(model)
    torch.testing.assert_close(model(x), y)
    adapters.unmerge(model)
    adapters.save(model, tmp_path)
    adapters.detach(model)
    adapters.load(model, tmp_path)
    assert torch.equal(model(x), y)


def test_ties_that_no_shared_factors_can_serve_are_errors():
    transposed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    transposed[1].weight = nn.Parameter(transposed[0].weight.data.t())  # pyright: ignore
    with pytest.raises(adapters.AdapterError, match="'0' is tied to a transpose or a part of it"):
        adapters.attach(transposed, {"a": Target(tied=True)}, r=1, alpha=1)
    part = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 4))
    part[1].weight = nn.Parameter(part[0].weight.data[4:])  # pyright: ignore
    with pytest.raises(adapters.TargetError, match=r"shares some of its memory with 1\.weight"):
        adapters.attach(part, {"a": Target(tied=True)}, r=1, alpha=1)
    blocks = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)])
    blocks[1].in_proj_weight = blocks[0].in_proj_weight
    with pytest.raises(adapters.AdapterError, match="is a block of a tied weight"):
        adapters.attach(blocks, {"a": Target(match="*in_proj*", tied=True)}, r=1, alpha=1)
    model = Tied()
    adapters.attach(model, {"a": Target("embedding", tied=True)}, r=1, alpha=1, name="a")
    adapters.attach(model, {"a": Target("linear", tied=True)}, r=1, alpha=1, name="b")
    with pytest.raises(adapters.AdapterError, match="by its different names"):
        adapters.combine(model, {"a": 1.0, "b": 1.0}, "c")


def test_the_change_of_one_adapter_while_another_is_merged():
    model = nn.Linear(4, 5)
    adapters.attach(model, r=2, alpha=2, dora=True, name="a")
    move(model)
    expected = adapters.deltas(model, "a")[""]
    adapters.attach(model, r=2, alpha=2, name="b")
    move(model)
    adapters.merge(model)
    torch.testing.assert_close(adapters.deltas(model, "a")[""], expected)
    with pytest.raises(adapters.AdapterError, match="there is no adapter 'c'"):
        adapters.deltas(model, "c")
    with pytest.raises(adapters.AdapterError, match="there is no adapter 'c'"):
        adapters.detach(model, "c")


def test_loading_a_base_into_a_merged_model_is_an_error():
    model = nn.Sequential(nn.Linear(4, 5))
    state = copy.deepcopy(model.state_dict())
    adapters.attach(model, r=2, alpha=2)
    adapters.merge(model)
    with pytest.raises(RuntimeError, match="merged, and unmerge would undo what is loaded"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["low-rank", "in full", "tied"])
def test_a_state_dict_taken_while_merged_is_not_loaded_under_adapters(kind: str, strict: bool):
    """It would have ΔW in the weight and in the adapter. One taken after unmerge is loaded."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if kind == "tied":
            model[1].weight = model[0].weight
        how: Any = {"also_train": "0.bias"} if kind == "in full" else {}
        adapters.attach(model, {"0": Target(match="0", tied=kind == "tied")}, r=2, alpha=2, **how)
        return model

    model, x = build(), torch.ones(1, 4)
    adapters.attached(model)["0"].B.data.fill_(1)
    y = model(x)
    adapters.merge(model)
    merged = copy.deepcopy(model.state_dict())
    adapters.unmerge(model)
    fresh = build()
    with pytest.raises(RuntimeError, match="taken while the adapter was merged"):
        fresh.load_state_dict(merged, strict=strict)
    fresh.load_state_dict(model.state_dict(), strict=strict)
    assert torch.equal(fresh(x), y)
    # Without adapters the merged weights are what they are.
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(plain(x), y)


def test_an_adapter_can_have_the_name_of_its_slot(tmp_path: Path):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(1, 4)
    base = model(x)
    adapters.attach(model, r=1, alpha=1, name="lora")
    adapters.attached(model)["0"].B.data.fill_(1)
    y = model(x)
    adapters.save(model, tmp_path)
    adapters.attach(model, r=1, alpha=1, name="two")
    assert adapters.names(model) == ["lora", "two"]
    assert torch.equal(model(x), base)
    adapters.switch(model, "lora")
    assert torch.equal(model(x), y)
    adapters.detach(model, "lora")
    adapters.load(model, tmp_path, name="lora")
    assert torch.equal(model(x), y)
    adapters.detach(model)
    assert torch.equal(model(x), base)
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
def test_a_models_own_lora_is_refused(kind: str):
    model: Any = nn.Sequential(nn.Linear(4, 3))
    own = {"module": nn.Identity, "parameter": nn.Parameter, "buffer": nn.Buffer}
    model[0].lora = own[kind]()
    with pytest.raises(adapters.AdapterError, match=r"own '0\.lora' has the name of an adapter"):
        adapters.attach(model, r=1, alpha=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dora_of_a_row_of_zeros_is_no_nan():
    layer = nn.Linear(4, 5)
    layer.weight.data[1] = 0
    adapters.attach(layer, r=2, alpha=2, dora=True)
    assert not adapters.deltas(layer)[""].any()
    assert layer(torch.randn(3, 4)).isfinite().all()


def test_attaching_in_eval_mode_drops_nothing():
    model = nn.Linear(4, 5).eval()
    adapters.attach(model, r=2, alpha=2, dropout=0.9)
    move(model)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), model(x))


def test_an_empty_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(2), nn.Linear(9, 5))
    adapters.attach(model, "all", r=2, alpha=2)
    assert model(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 5)


def test_a_jagged_batch():
    layer = nn.Linear(4, 5)
    adapters.attach(layer, r=2, alpha=2)
    move(layer)
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    y = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
    for one, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(one, layer(row))
