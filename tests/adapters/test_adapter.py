"""What every adapter must be, over the whole table of kinds and variants."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora_lab import adapters
from tests.adapters.cases import CASES, Case, every_case, the_adapter


@every_case
def test_identity_at_init(case: Case):
    model = case.build(trained=False)
    x = case.input()
    y = model(x)
    adapters.detach(model)
    assert torch.equal(model(x), y)


@every_case
def test_output_is_that_of_the_changed_weight(case: Case):
    model, x = case.build(), case.input()
    adapter, y = the_adapter(model), model(x)
    weight = model.site.weight + adapter.delta()
    adapters.detach(model)
    reference = functional_call(model, {"site.weight": weight}, (x,))
    torch.testing.assert_close(y, reference, rtol=1e-10, atol=1e-10)


@every_case
def test_forward_alone_is_the_difference(case: Case):
    model, x = case.build(), case.input()
    adapter = the_adapter(model)
    with adapters.disabled(model):
        base = model(x)
    torch.testing.assert_close(adapter(x), model(x) - base, rtol=1e-10, atol=1e-10)


@every_case
def test_delta_is_scale_B_A_of_rank_r(case: Case):
    adapter = the_adapter(case.build())
    expected = {"alpha/r": 2.5 / case.r, "alpha/sqrt(r)": 2.5 / case.r**0.5, "alpha": 2.5}
    delta = expected[case.scaling] * torch.einsum("or,ri->oi", adapter.B, adapter.A)
    torch.testing.assert_close(adapter.delta().flatten(1), delta, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(adapter.delta().flatten(1)) == case.r


@every_case
def test_gradcheck(case: Case):
    model, x = case.build(), case.input()
    adapter = the_adapter(model)

    def forward(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return functional_call(model, {"site.lora.A": A, "site.lora.B": B}, (x,))

    A, B = adapter.A.detach().requires_grad_(), adapter.B.detach().requires_grad_()
    assert torch.autograd.gradcheck(forward, (A, B))


@every_case
def test_gradients_below_an_adapter_are_the_changed_weights(case: Case):
    """An adapter must pass gradients through the frozen base to the adapters before it."""
    model, x = case.build(), case.input()
    adapter = the_adapter(model)
    x.requires_grad_()
    model(x).square().sum().backward()
    got, x.grad = x.grad, None
    weight = (model.site.weight + adapter.delta()).detach()
    adapters.detach(model)
    functional_call(model, {"site.weight": weight}, (x,)).square().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-10)


@every_case
def test_merge_gives_the_same_output_and_unmerge_the_same_bits(case: Case):
    model, x = case.build(), case.input()
    before, weight = model(x), model.site.weight.clone()
    for _ in range(3):
        adapters.merge(model)
        assert not torch.equal(model.site.weight, weight)
        torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
        adapters.unmerge(model)
        assert torch.equal(model.site.weight, weight)
        assert torch.equal(model(x), before)


@every_case
def test_disabled_is_the_base_bit_for_bit(case: Case):
    model, x = case.build(), case.input()
    adapted = inside = model(x)
    with pytest.raises(RuntimeError, match="inside"), adapters.disabled(model):
        inside = model(x)
        raise RuntimeError("inside")
    assert torch.equal(model(x), adapted)
    assert not torch.equal(inside, adapted)
    adapters.detach(model)
    assert torch.equal(model(x), inside)


@every_case
def test_detach_leaves_the_model_as_it_was(case: Case):
    torch.manual_seed(0)
    model: Any = nn.Sequential()
    model.add_module("site", case.layer.make().double())
    model.site.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    case.attach(model)
    nn.init.normal_(the_adapter(model).B)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "site.lora.A",
        "site.lora.B",
    }
    adapters.merge(model)
    adapters.detach(model)
    assert vars(model.site).keys() == vars(before.site).keys()
    assert not model.site._forward_hooks
    assert model._modules.keys() == before._modules.keys()
    for (name, now), (was_name, was) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert (name, now.requires_grad) == (was_name, was.requires_grad)
        assert torch.equal(now, was)
    case.attach(model)


@every_case
def test_only_the_adapter_trains(case: Case):
    model, x = case.build(), case.input()
    base = {k: v.clone() for k, v in adapters.base_state_dict(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
    assert all(torch.equal(v, base[k]) for k, v in adapters.base_state_dict(model).items())
    assert trained == [the_adapter(model).A, the_adapter(model).B]


@every_case
def test_base_keys_stay_what_they_were(case: Case):
    plain = nn.Sequential()
    plain.add_module("site", case.layer.make())
    model = case.build()
    assert adapters.base_state_dict(model).keys() == plain.state_dict().keys()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == set(adapters.adapter_state_dict(model))
    assert not result.unexpected_keys


@every_case
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent_and_whole(case: Case, how):
    model, x = case.build(), case.input()
    twin = how(model)
    assert torch.equal(twin(x), model(x))
    adapters.detach(twin)
    with adapters.disabled(model):
        assert torch.equal(twin(x), model(x))
    assert not torch.equal(twin(x), model(x))


@every_case
def test_train_equals_eval_without_dropout(case: Case):
    model, x = case.build(), case.input()
    assert torch.equal(model.train()(x), model.eval()(x))


@every_case
def test_dropout_is_on_what_goes_into_A(case: Case):
    model, x = case.build(), case.input()
    adapter = the_adapter(model)
    adapter.dropout = 0.5
    torch.manual_seed(5)
    dropped = model.train()(x)
    torch.manual_seed(5)
    masked = nn.functional.dropout(x, 0.5)
    adapter.dropout = 0.0
    with adapters.disabled(model):
        base = model(x)
    torch.testing.assert_close(dropped, base + adapter(masked), rtol=1e-10, atol=1e-10)
    adapter.dropout = 0.5
    assert torch.equal(model.eval()(x), base + adapter(x))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(case: Case, dtype: torch.dtype):
    """The adapter stays float32, computes in the base's dtype and merges in float32."""
    model = case.build(dtype=dtype)
    adapter, weight = the_adapter(model), model.site.weight.clone()
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    x = case.input().to(dtype)
    assert model(x).dtype == dtype
    adapters.merge(model)
    exact = (weight.double() + adapter.delta().double()).float().to(dtype)
    assert torch.equal(model.site.weight, exact)
    adapters.unmerge(model)
    assert torch.equal(model.site.weight, weight)


def test_input_by_keyword():
    model = CASES[0].build()
    layer, x = model.site, CASES[0].input()
    assert torch.equal(layer(input=x), layer(x))


def test_merged_twice_or_not_at_all_is_an_error():
    model = CASES[0].build()
    with pytest.raises(adapters.AdapterError, match="not merged"):
        adapters.unmerge(model)
    adapters.merge(model)
    with pytest.raises(adapters.AdapterError, match="merged already"):
        adapters.merge(model)
    with pytest.raises(adapters.AdapterError, match="unmerge it"), adapters.disabled(model):
        pass
    adapters.unmerge(model)
    with adapters.disabled(model), pytest.raises(adapters.AdapterError, match="disabled"):
        adapters.merge(model)


def test_base_state_dict_is_the_bases_also_while_merged():
    model = CASES[0].build()
    weight = model.site.weight.clone()
    adapters.merge(model)
    assert torch.equal(adapters.base_state_dict(model)["site.weight"], weight)


def test_kaiming_has_the_bound_of_the_layers_input():
    model = nn.Linear(400, 300)
    adapters.attach(model, r=200, alpha=1, init="kaiming")
    A = adapters.attached(model)[""].A
    bound = 400**-0.5
    assert 0.99 * bound < A.abs().max() <= bound
    assert abs(A.std().item() - bound / 3**0.5) < 0.01 * bound


def test_gaussian_is_standard_normal():
    model = nn.Linear(400, 300)
    adapters.attach(model, r=200, alpha=1, init="gaussian")
    A = adapters.attached(model)[""].A
    standard_error = A.numel() ** -0.5
    assert abs(A.mean()) < 4 * standard_error
    assert abs(A.std() - 1) < 4 * standard_error


@pytest.mark.parametrize("init", adapters.INITS)
def test_init_of_a_site_depends_on_seed_site_and_rank_alone(init: str):
    def drawn(r: int, seed: int, targets: dict[str, adapters.Target]) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 20))
        torch.randn(seed + 7)  # the global stream is elsewhere each time
        adapters.attach(model, targets, r=r, alpha=1, init=init, seed=seed)
        return {name: adapter.A for name, adapter in adapters.attached(model).items()}

    everything = drawn(8, 0, {"all": adapters.Target()})
    alone = drawn(8, 0, {"one": adapters.Target(match="2")})
    assert torch.equal(everything["2"], alone["2"])
    assert not torch.equal(everything["0"][:, 0], everything["2"][:, 0])
    assert not torch.equal(drawn(8, 1, {"all": adapters.Target()})["2"], alone["2"])
    wider = drawn(16, 0, {"all": adapters.Target()})["2"]
    assert not (wider[:, None] == alone["2"][None]).all(-1).any()


def test_peft_gives_the_same_outputs_and_gradients():
    """PEFT's LoRA with our factors put in, for alpha/r and alpha/√r."""
    peft = pytest.importorskip("peft")
    for scaling in ("alpha/r", "alpha/sqrt(r)"):
        torch.manual_seed(0)
        ours: Any = nn.Sequential()
        ours.add_module("fc", nn.Linear(12, 10))
        theirs = copy.deepcopy(ours)
        adapters.attach(ours, r=4, alpha=6, scaling=scaling)
        adapter = adapters.attached(ours)["fc"]
        nn.init.normal_(adapter.B)
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["fc"], use_rslora=scaling != "alpha/r"
        )
        theirs = peft.get_peft_model(theirs, config)
        layer = theirs.base_model.model.fc
        layer.lora_A["default"].weight.data.copy_(adapter.A.data)
        layer.lora_B["default"].weight.data.copy_(adapter.B.data)
        x = torch.randn(8, 12)
        y, reference = ours(x), theirs(x)
        torch.testing.assert_close(y, reference, rtol=1e-6, atol=1e-6)
        y.square().sum().backward()
        reference.square().sum().backward()
        torch.testing.assert_close(adapter.A.grad, layer.lora_A["default"].weight.grad)
        torch.testing.assert_close(adapter.B.grad, layer.lora_B["default"].weight.grad)


def test_eval_fast_path_of_a_transformer_layer_sees_the_adapter():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    targets = {"ff": adapters.Target(match="linear?")}
    adapters.attach(model, targets, r=2, alpha=2)
    for adapter in adapters.attached(model).values():
        nn.init.normal_(adapter.B)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-5, atol=1e-5)
