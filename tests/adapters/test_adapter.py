"""What all adapters have in common, over the table of kinds and variants in cases.py.

Tested are ΔW, outputs, gradients, merge, detach, copies, dropout and inits. The truth is the plain
layer called with the weight W + ΔW, ΔW written out from the papers' formulas in float64, gradcheck,
and the moments of the distributions that inits draw from.

Run: make test ARGS=tests/adapters/test_adapter.py
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab import adapters
from tests.adapters.cases import (
    CASES,
    VARIANTS,
    Case,
    cases_where,
    changed_weights,
    every_case,
    every_layer,
    move,
    on_plain,
    the_adapter,
    trained,
    weight_names,
)

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


@every_case
def test_identity_at_init(case: Case):
    model, x = case.build(trained=False), case.inputs()
    start: dict[str, Any] = (
        {"rtol": 0, "atol": 0} if not VARIANTS[case.variant].get("init") else EXACT
    )
    torch.testing.assert_close(model(*x), case.plain()(*x), **start)


@every_case
def test_output_is_that_of_the_changed_weight(case: Case):
    model, x = case.build(), case.inputs()
    y = model(*x)
    assert not torch.allclose(y, case.plain()(*x))
    weights = changed_weights(model, adapters.deltas(model))
    torch.testing.assert_close(y, on_plain(case, weights, x), **EXACT)


@every_case
def test_delta_is_the_formula(case: Case):
    """ΔW written out from the tensors, as the papers have it."""
    model, how = case.build(), case.how
    scale = {
        "alpha/r": 2.5 / how["r"],
        "alpha/sqrt(r)": 2.5 / how["r"] ** 0.5,
        "alpha": 2.5,
        "none": 1.0,
    }[how.get("scaling", "alpha/r")]
    base = adapters.base_state_dict(model)
    for site, adapter in adapters.attached(model).items():
        t, weight = adapter.tensors(), base[weight_names(model)[site]]
        weight = weight if adapter.rows is None else weight[slice(*adapter.rows)]
        names = ("gpt2-conv1d", "experts-gathered")
        across = case.layer.kind == "embedding" or case.layer.name in names
        W = weight.mT if across else weight if case.layer.kind == "experts" else weight.flatten(1)
        if "form" in how:
            change = product_of_form(t)
        else:
            middle = t.get("core", torch.eye(how["r"], dtype=W.dtype))
            change = torch.einsum("...or,...rs,...si->...oi", t["B"], middle, t["A"])
        if "A0" in t:
            change = change - t["B0"] @ t["A0"]
        delta = scale * change
        if "magnitude" in t:
            V = W + delta
            delta = t["magnitude"][:, None] * V / V.norm(dim=1, keepdim=True) - W
            if (padding := getattr(adapter, "padding", None)) is not None:
                delta[:, padding] = 0
        expected = delta.mT if across else delta.view(weight.shape)
        torch.testing.assert_close(adapters.deltas(model)[site], expected, **EXACT)


def product_of_form(t: dict[str, Tensor]) -> Tensor:
    """B A of ReLoRA, VeRA, AdaLoRA, LoHa and LoKr, from tensors that are only these."""
    if "A_merged" in t:
        return t["B"] @ t["A"] + t["B_merged"] @ t["A_merged"]
    if "lambdas" in t:
        return t["B"] @ t["lambdas"].diag() @ t["A"]
    if "lambda_b" in t:
        return t["lambda_b"].diag() @ t["B"] @ t["lambda_d"].diag() @ t["A"]
    if "A2" in t:
        return (t["B"] @ t["A"]) * (t["B2"] @ t["A2"])
    C = t["C"] @ t["C2"] if "C2" in t else t["C"]
    return torch.kron(C, t["D"] if "D" in t else t["B"] @ t["A"])


def rank_of_form(t: dict[str, Tensor], r: int) -> int:
    """The rank of `product_of_form` of random tensors."""
    if "lambda_b" in t or "lambdas" in t:
        return r
    if "A_merged" in t:
        return 2 * r
    if "A2" in t:
        return r * r
    return min(t["C"].shape) * (min(t["D"].shape) if "D" in t else r)


@cases_where(lambda case: not case.how.get("dora"))  # whose change has no low rank
def test_the_rank_of_delta(case: Case):
    model, how = case.build(), VARIANTS[case.variant]
    r = case.how["r"]
    both = adapters.INITS[how.get("init", "kaiming")].starts_nonzero and how.get("trains") != "core"
    for adapter, delta in zip(
        adapters.attached(model).values(), adapters.deltas(model).values(), strict=True
    ):
        rank = 2 * r if both and how.get("trains") != "zero" else r
        if "form" in how:
            rank = rank_of_form(adapter.tensors(), r)
        A, B = adapter.factors()
        rank = min(rank, A.shape[-1], B.shape[-2])
        assert rank <= A.shape[-2] or "core" in adapter.tensors()
        matrices = delta if case.layer.kind == "experts" else delta.flatten(1)
        assert (torch.linalg.matrix_rank(matrices) == rank).all()


@every_case
def test_gradients_are_the_changed_weights_chained_to_the_factors(case: Case):
    """dL/dW of a plain layer at W + ΔW, then through the formula of ΔW."""
    model, x = case.build(), case.inputs()
    parameters = trained(model)
    y = model(*x)
    target = torch.randn_like(y)
    got = torch.autograd.grad((y * target).sum(), parameters)
    deltas = adapters.deltas(model)
    changed = changed_weights(model, deltas)
    leaves = {name: w.detach().clone().requires_grad_() for name, w in changed.items()}
    (on_plain(case, leaves, x) * target).sum().backward()
    outer = [leaf.grad.to_dense() for leaf in leaves.values() if leaf.grad is not None]
    expected = torch.autograd.grad(list(changed.values()), parameters, outer)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# The others' gradient is meant to be another: DoRA's norm, frequent tokens, the padding token.
@cases_where(
    lambda case: (
        not case.how.get("dora") and case.layer.name not in ("embedding-freq", "embedding-padding")
    )
)
def test_gradcheck(case: Case):
    model, x = case.build(), case.inputs()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = dict(list(named.items())[:8])  # an LSTM has dozens, all alike

    def forward(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(named, values, strict=True)), x)

    values = [p.detach().clone().requires_grad_() for p in named.values()]
    # Fast mode: differences along random directions, not one for each entry of each tensor.
    assert torch.autograd.gradcheck(forward, values, fast_mode=True)


@cases_where(lambda case: case.inputs()[0].is_floating_point())
def test_gradients_below_an_adapter_are_the_changed_weights(case: Case):
    """An adapter must pass gradients through the frozen base to the adapters before it."""
    model, x = case.build(), case.inputs()
    x = tuple(one.requires_grad_() for one in x)
    got = torch.autograd.grad(model(*x).square().sum(), x)
    weights = {k: v.detach() for k, v in changed_weights(model, adapters.deltas(model)).items()}
    expected = torch.autograd.grad(on_plain(case, weights, x).square().sum(), x)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@every_case
def test_merge_gives_the_same_output_and_unmerge_the_same_bits(case: Case):
    model, x = case.build(), case.inputs()
    before, base = model(*x), copy.deepcopy(adapters.base_state_dict(model))
    for _ in range(3):
        adapters.merge(model)
        assert not all(torch.equal(model.state_dict()[k], base[k]) for k in base)
        torch.testing.assert_close(model(*x), before, **EXACT)
        state = adapters.base_state_dict(model)
        assert all(torch.equal(state[k], base[k]) for k in base)
        adapters.unmerge(model)
        assert all(torch.equal(model.state_dict()[k], base[k]) for k in base)
        assert torch.equal(model(*x), before)


@every_case
def test_a_merged_copy_is_a_plain_model(case: Case):
    model, x = case.build(), case.inputs()
    before = model(*x)
    merged: Any = adapters.merged(model)
    torch.testing.assert_close(merged(*x), before, **EXACT)
    assert torch.equal(model(*x), before)
    assert type(merged.site) is type(case.plain().site)
    assert merged.state_dict().keys() == case.plain().state_dict().keys()


@every_case
def test_disabled_is_the_base_bit_for_bit(case: Case):
    model, x = case.build(), case.inputs()
    adapted = inside = model(*x)
    with pytest.raises(RuntimeError, match="inside"), adapters.disabled(model):
        inside = model(*x)
        raise RuntimeError("inside")
    assert torch.equal(model(*x), adapted)
    assert torch.equal(inside, case.plain()(*x))


@every_case
def test_detach_leaves_the_model_as_it_was(case: Case):
    model, x = case.plain(), case.inputs()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = copy.deepcopy(model)
    case.attach(model)
    move(model)
    assert all(".lora." in n for n, p in model.named_parameters() if p.requires_grad)
    model(*x)
    adapters.merge(model)
    adapters.detach(model)
    for now, was in zip(model.modules(), before.modules(), strict=True):
        assert type(now) is type(was)
        assert vars(now).keys() == vars(was).keys()
        assert not now._forward_hooks
    for (name, now), (was_name, was) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert (name, now.requires_grad) == (was_name, was.requires_grad)
        assert torch.equal(now, was)
    assert torch.equal(model(*x), before(*x))
    case.attach(model)


@every_case
def test_only_what_the_variant_says_trains(case: Case):
    model, x = case.build(), case.inputs()
    base = copy.deepcopy(adapters.base_state_dict(model))
    start = copy.deepcopy(model.state_dict())
    model(*x).square().sum().backward()
    torch.optim.SGD(trained(model), lr=0.1).step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(v, base[k]) for k, v in adapters.base_state_dict(model).items())
    zero = "A" if case.layer.kind == "embedding" or case.variant == "mica" else "B"
    moves = {"both": {"A", "B"}, "zero": {zero}, "core": {"core"}}[case.how.get("trains", "both")]
    if case.variant == "vera":
        moves = {"lambda_b", "lambda_d"}
    elif "form" in case.how and case.variant != "relora":
        moves = {*the_adapter(model).tensors()}
    moves = moves | ({"magnitude"} if case.how.get("dora") else set())
    for key, value in model.state_dict().items():
        moved = "lora" in key.split(".") and key.rpartition(".")[2] in moves
        assert torch.equal(value, start[key]) != moved, key
        is_stored = moved or key.endswith("_merged")
        assert (key in adapters.adapter_state_dict(model)) == is_stored, key


@every_layer
def test_base_keys_stay_what_they_were(case: Case):
    """A checkpoint of the base loads before and after attaching."""
    plain, model = case.plain(), case.build()
    assert adapters.base_state_dict(model).keys() == plain.state_dict().keys()
    changed = {k: v + 1 for k, v in plain.state_dict().items()}
    result = model.load_state_dict(changed, strict=False)
    assert set(result.missing_keys) == model.state_dict().keys() - changed.keys()
    assert not result.unexpected_keys
    plain.load_state_dict(changed)
    with adapters.disabled(model):
        assert torch.equal(model(*case.inputs()), plain(*case.inputs()))


@every_case
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent_and_whole(case: Case, how):
    model, x = case.build(), case.inputs()
    y = model(*x)
    twin = how(model)
    assert torch.equal(twin(*x), y)
    adapters.detach(twin)
    assert torch.equal(twin(*x), case.plain()(*x))
    assert torch.equal(model(*x), y)


@every_case
def test_train_equals_eval_without_dropout(case: Case):
    model, x = case.build(), case.inputs()
    assert torch.equal(model.train()(*x), model.eval()(*x))


@every_case
def test_dropout_is_on_in_training_alone_and_right_in_the_mean(case: Case):
    model, x = case.plain(), case.inputs()
    adapters.attach(model, "all", **case.how, dropout=0.5)
    case.train(model)
    without_dropout = case.build()
    assert torch.equal(model.eval()(*x), without_dropout(*x))
    torch.manual_seed(0)
    one, other = model.train()(*x), model(*x)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("layer", ["linear", "conv2d-same", "embedding", "transpose2d"])
def test_dropout_has_the_mean_of_none(layer: str):
    """Layers that are linear in ΔW: the mean over masks is the output without dropout."""
    case = next(c for c in CASES if (c.layer.name, c.variant) == (layer, "lora"))
    model, x = case.plain(), case.inputs()
    adapters.attach(model, "all", **case.how, dropout=0.5)
    move(model)
    draws = torch.stack([model(*x) for _ in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - model.eval()(*x)).abs() <= 5 * error + 1e-12).all()


@cases_where(lambda case: case.variant in ("lora", "dora", "pissa"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(case: Case, dtype: torch.dtype):
    """The adapter stays float32, and is merged in float32."""
    model = case.build(dtype=dtype)
    base = copy.deepcopy(adapters.base_state_dict(model))
    assert {p.dtype for p in trained(model)} == {torch.float32}
    x = tuple(one.to(dtype) if one.is_floating_point() else one for one in case.inputs())
    assert model(*x).dtype == dtype
    deltas = adapters.deltas(model)
    assert {delta.dtype for delta in deltas.values()} == {torch.float32}
    exact = changed_weights(model, {k: v.double() for k, v in deltas.items()})
    adapters.merge(model)
    for name, weight in exact.items():
        assert torch.equal(model.state_dict()[name], weight.float().to(dtype))
    adapters.unmerge(model)
    assert all(torch.equal(model.state_dict()[k], base[k]) for k in base)


def case_of(layer: str, variant: str = "lora") -> Case:
    return next(c for c in CASES if (c.layer.name, c.variant) == (layer, variant))


def test_input_by_keyword():
    model, (x,) = case_of("linear").build(), case_of("linear").inputs()
    assert torch.equal(model.site(input=x), model.site(x))


def test_merged_twice_or_not_at_all_is_an_error():
    model = CASES[0].build()
    with pytest.raises(adapters.AdapterError, match="no adapter is merged"):
        adapters.unmerge(model)
    adapters.merge(model)
    with pytest.raises(adapters.AdapterError, match="is merged into site: unmerge it"):
        adapters.merge(model)
    with pytest.raises(adapters.AdapterError, match="unmerge it"), adapters.disabled(model):
        pass
    adapters.unmerge(model)
    with (
        adapters.disabled(model),
        pytest.raises(adapters.AdapterError, match="no adapter is active"),
    ):
        adapters.merge(model)


@pytest.mark.parametrize("variant", ["lora", "pissa", "dora", "lora-xs"])
def test_the_padding_tokens_change_stays_zero(variant: str):
    case = case_of("embedding-padding", variant)
    model = case.plain()
    with torch.no_grad():
        model.site.weight[2] = 1.0  # a pretrained table may have other than zeros in that row
    case.attach(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*case.inputs()).pow(4).sum().backward()
        optimizer.step()
    assert not adapters.deltas(model)["site"][2].any()
    assert torch.equal(model(torch.tensor([2]))[0], model.site.weight[2])
    assert adapters.deltas(model)["site"].any()


def test_a_token_never_seen_keeps_its_vector():
    model = nn.Embedding(7, 4)
    adapters.attach(model, "embedding", r=2, alpha=2)
    optimizer = torch.optim.Adam(trained(model), lr=0.1)
    for _ in range(3):
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
    moved = adapters.deltas(model)[""].any(1)
    assert moved.tolist() == [False, True, True, False, False, False, False]


def test_kaiming_has_the_bound_of_the_layers_input():
    model = nn.Linear(400, 300)
    adapters.attach(model, r=200, alpha=1, init="kaiming")
    A = the_adapter(model).A
    bound = 400**-0.5
    assert 0.99 * bound < A.abs().max() <= bound
    assert abs(A.std().item() - bound / 3**0.5) < 0.01 * bound


def test_gaussian_is_standard_normal():
    model = nn.Linear(400, 300)
    adapters.attach(model, r=200, alpha=1, init="gaussian")
    A = the_adapter(model).A
    standard_error = A.numel() ** -0.5
    assert abs(A.mean()) < 4 * standard_error
    assert abs(A.std() - 1) < 4 * standard_error


def test_orthogonal_rows_are_orthonormal():
    model = nn.Linear(40, 30)
    adapters.attach(model, r=20, alpha=1, init="orthogonal")
    A = the_adapter(model).A
    torch.testing.assert_close(A @ A.T, torch.eye(20), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "milora", "svd", "olora", "mica"])
def test_inits_from_the_weight_are_what_their_papers_say(init: str):
    model = nn.Linear(12, 9).double()
    adapters.attach(model, r=4, alpha=8, init=init)
    adapter, W = the_adapter(model), model.weight
    start = adapter.B @ adapter.A
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        torch.testing.assert_close(start, Q[:, :4] @ R[:4], **EXACT)
        torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(4).double(), **EXACT)
        return
    if init in ("milora", "mica"):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        BtB = torch.eye(4).double() if init == "mica" else S[-4:].diag() / adapter.scale
        torch.testing.assert_close(adapter.B.T @ adapter.B, BtB, **EXACT)
        torch.testing.assert_close(U[:, :-4].T @ adapter.B, torch.zeros(5, 4).double(), **EXACT)
        minor = U[:, -4:] * S[-4:] @ Vh[-4:]
        expected = torch.zeros_like(W) if init == "mica" else minor
        torch.testing.assert_close(adapter.scale * start, expected, **EXACT)
        return
    residual = torch.linalg.svdvals(W - (adapter.scale if init == "pissa" else 1) * start)
    sigma = torch.linalg.svdvals(W)
    torch.testing.assert_close(residual[:5], sigma[4:], **EXACT)  # Eckart and Young
    if init == "pissa":
        torch.testing.assert_close(
            adapter.A.norm(dim=1), (sigma[:4] / adapter.scale).sqrt(), **EXACT
        )
    else:
        torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(4).double(), **EXACT)


@pytest.mark.parametrize("init", adapters.INITS)
def test_init_of_a_site_depends_on_seed_site_and_rank_alone(init: str):
    def drawn(r: int, seed: int, targets: dict[str, adapters.Target]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 20))
        torch.randn(seed + 7)  # the global stream is elsewhere each time
        inputs = torch.randn(50, 20, generator=torch.Generator().manual_seed(2))
        data = adapters.Calibration([inputs], lambda model, x: model(x).pow(3).sum())
        adapters.attach(model, targets, r=r, alpha=1, init=init, seed=seed, calibration=data)
        factor = "B" if init == "mica" else "A"  # the one that is not zero
        return {name: getattr(a, factor) for name, a in adapters.attached(model).items()}

    everything = drawn(8, 0, {"all": adapters.Target()})
    alone = drawn(8, 0, {"one": adapters.Target(match="2")})
    assert torch.equal(everything["2"], alone["2"])
    assert not torch.equal(everything["0"][:, 0], everything["2"][:, 0])
    if not adapters.INITS[init].is_random:
        return  # the factors are read from the weight, whatever the seed
    assert not torch.equal(drawn(8, 1, {"all": adapters.Target()})["2"], alone["2"])
    wider = drawn(16, 0, {"all": adapters.Target()})["2"]
    assert not (wider[:, None] == alone["2"][None]).all(-1).any()
