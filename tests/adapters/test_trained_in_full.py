"""Parameters that train in full beside the adapters, over a table of layers that hold them.

The truth is a plain copy of the model in float64 with W + ΔW and the trained values written into
its parameters, its gradients by torch's autograd with those parameters unfrozen, and a plain loop.

Run: make test ARGS=tests/adapters/test_trained_in_full.py
"""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Target
from lora_lab.adapters.watch import KINDS_ON_READING

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


class Net(nn.Module):
    """(B, T) tokens → (B, 3), through layers of many kinds and bare parameters of 0 to 2 dims."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=1)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.statistics = nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.body = nn.ModuleDict({"fc": nn.Linear(6, 5), "up": nn.Linear(5, 6)})
        self.mix = nn.Parameter(torch.eye(6) + 0.1 * torch.randn(6, 6))
        self.shift = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, T, 6)
        x = self.norm(x + self.conv(x.mT).mT)
        x = self.statistics(x.mT).mT
        x = self.lstm(x + self.attention(x, x, x)[0])[0]
        x = x + self.body["up"](self.body["fc"](x).tanh())
        return self.head(self.scale * (x.mean(1) @ self.mix).tanh() + self.shift)


def plain(dtype: torch.dtype = torch.float64) -> Net:
    torch.default_generator.manual_seed(0)
    model = Net().to(dtype)
    model.statistics.running_mean = torch.randn(6, dtype=dtype)
    return model.eval()


def frozen(dtype: torch.dtype = torch.float64) -> Net:
    """The base as it is under adapters: an LSTM whose weights take gradients sums otherwise."""
    return plain(dtype).requires_grad_(False)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(TOKENS)


def keys_of(*modules: str) -> set[str]:
    names = [name for name, _ in plain().named_parameters()]
    return {n for n in names if any(n == m or n.startswith(f"{m}.") for m in modules)}


BIASES = {n for n, _ in plain().named_parameters() if n.rpartition(".")[2] == "bias"}
CASES: dict[str, tuple[list[str], set[str]]] = {
    "head": (["head"], {"head.weight", "head.bias"}),
    "bias-of-an-adapted-linear": (["body.fc.bias"], {"body.fc.bias"}),
    "biases": (["bias"], BIASES),
    "norms": (["norm*", "stat*"], keys_of("norm", "statistics")),
    "embedding": (["embed"], {"embed.weight"}),
    "conv": (["conv.weight"], {"conv.weight"}),
    "attention": (["attention"], keys_of("attention")),
    "lstm": (["lstm.*"], keys_of("lstm")),
    "2-d": (["mix"], {"mix"}),
    "1-d": (["s?ift"], {"shift"}),
    "0-d": (["scale"], {"scale"}),
    "many": (["head", "bias", "embed", "mix"], keys_of("head", "embed", "mix") | BIASES),
}
every_case = pytest.mark.parametrize(("globs", "keys"), CASES.values(), ids=CASES)
TOKENS = torch.tensor([[1, 2, 3, 0], [4, 4, 6, 1], [5, 0, 2, 2]])


def attached(globs: list[str], name: str = "default", seed: int = 1, model: Any = None) -> Any:
    """A model with adapters wherever they fit, and everything that trains moved."""
    model = model or plain()
    adapters.attach(model, "all", r=2, alpha=3, also_train=globs, name=name, seed=seed)
    move(model, seed)
    return model


def move(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator).to(parameter)
            if key.startswith("embed.lora.") and key.endswith(".A"):
                step[:, 1] = 0  # the padding token, whose change stays zero
            parameter.data.add_(step, alpha=0.3)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The plain model's parameters with ΔW added and the trained values in place, by hand."""
    weights = {key: value.clone() for key, value in adapters.base_state_dict(model).items()}
    deltas = adapters.deltas(model)
    for site, adapter in adapters.attached(model).items():
        path = site.rpartition(".")[0] if adapter.kind in KINDS_ON_READING else site
        weight = weights[".".join(filter(None, [path, adapter.parameter]))]
        (weight if adapter.rows is None else weight[slice(*adapter.rows)]).add_(deltas[site])
    return weights | {k: p.value.detach() for k, p in adapters.also_trained(model).items()}


@every_case
def test_outputs_and_gradients_are_those_of_a_plain_model(globs: list[str], keys: set[str]):
    model = attached(globs)
    also_trained = adapters.also_trained(model)
    assert set(also_trained) == keys
    assert not {site for site in adapters.attached(model) if site in keys}
    weights = trained_weights(model)
    leaves = {key: weights[key].clone().requires_grad_() for key in keys}
    expected = functional_call(plain(), weights | leaves, (TOKENS,))
    y = model(TOKENS)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(output(model), expected, **EXACT)
    assert not torch.allclose(y, output(plain()))
    # A cubic loss, so that the gradient depends on the values
    grads = torch.autograd.grad(y.pow(3).sum(), [also_trained[key].value for key in leaves])
    truth = torch.autograd.grad(expected.pow(3).sum(), [*leaves.values()])
    for one, other in zip(grads, truth, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("globs", "keys", "dtype"),
    [*((*case, torch.float64) for case in CASES.values()), (*CASES["many"], torch.bfloat16)],
    ids=[*CASES, "many-bfloat16"],
)
def test_merge_disabled_and_detach(globs: list[str], keys: set[str], dtype: torch.dtype):
    base = plain(dtype)
    model = attached(globs, model=copy.deepcopy(base))
    assert {p.value.dtype for p in adapters.also_trained(model).values()} <= {
        torch.promote_types(dtype, torch.float32)
    }
    y, values = output(model), adapters.also_trained(model)
    with adapters.disabled(model):
        assert torch.equal(output(model), output(frozen(dtype)))
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in base.state_dict().items())
    adapters.merge(model)
    for key, parameter in values.items():
        assert torch.equal(model.state_dict()[key], parameter.value.to(dtype))
    if dtype == torch.float64:
        torch.testing.assert_close(output(model), y, **EXACT)
    saved = adapters.base_state_dict(model)
    assert saved.keys() == base.state_dict().keys()
    assert all(torch.equal(saved[k], v) for k, v in base.state_dict().items())
    with pytest.raises(AdapterError, match="unmerge it first"):
        adapters.merge(model)
    adapters.unmerge(model)
    assert torch.equal(output(model), y)
    merged = adapters.merged(model)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    for key, parameter in values.items():
        assert torch.equal(merged.get_parameter(key), parameter.value.to(dtype))
    adapters.detach(model)
    assert torch.equal(output(model), output(base))
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in base.modules()]
    assert all(p.requires_grad for p in model.parameters())


@every_case
def test_each_name_has_values_of_its_own(globs: list[str], keys: set[str]):
    model = attached(globs)
    one = output(model)
    attached(["head.bias", "lstm"], "second", seed=2, model=model)
    second = output(model)
    with torch.no_grad():
        adapters.attach(model, {}, r=1, alpha=1, also_train=["head"], name="head")
        adapters.also_trained(model)["head.bias"].value.add_(1)
    assert sorted(adapters.names(model)) == ["default", "head", "second"]
    assert not adapters.attached(model)
    third = output(model)
    torch.testing.assert_close(third, output(plain()) + 1, **EXACT)
    for name, y in (("second", second), ("default", one), ("head", third)):
        adapters.switch(model, name)
        assert torch.equal(output(model), y)
        trains = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trains
        assert all(f".lora.{name}." in f".{key}" for key in trains)
    assert set(adapters.also_trained(model, "default")) == keys
    adapters.switch(model, None)
    assert torch.equal(output(model), output(frozen()))
    adapters.detach(model, "default")
    adapters.switch(model, "second")
    assert torch.equal(output(model), second)


@every_case
def test_copies(globs: list[str], keys: set[str]):
    model = attached(globs)
    y = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), y)
        move(twin, 5)
        assert not torch.equal(output(twin), y)
        assert torch.equal(output(model), y)
        adapters.detach(twin)
        assert torch.equal(output(twin), output(plain()))


@every_case
def test_saved_and_loaded(globs: list[str], keys: set[str], tmp_path: Path):
    model = attached(globs)
    adapters.save(model, tmp_path)
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert about["also_trained"].keys() == keys
    assert about["base"] == adapters.weights_hash(plain().state_dict())
    fresh = plain()
    with torch.no_grad():  # as a new head, which each model draws for itself
        for key in keys:
            fresh.get_parameter(key).add_(1)
    adapters.load(fresh, tmp_path)
    assert torch.equal(output(fresh), output(model))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in fresh.named_parameters() if p.requires_grad] == names
    # What a checkpoint holds
    state, fresh = adapters.adapter_state_dict(model), attached(globs, seed=8)
    assert set(state) == set(names)
    assert fresh.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(output(fresh), output(model))


def test_a_head_alone_is_saved_and_loaded(tmp_path: Path):
    model, fresh = plain(), plain()
    adapters.attach(model, {}, r=1, alpha=1, also_train="head")
    move(model)
    adapters.save(model, tmp_path)
    adapters.load(fresh, tmp_path)
    assert torch.equal(output(fresh), output(model))
    merged = adapters.merged(fresh)
    assert torch.equal(output(merged.requires_grad_(False)), output(model))
    with pytest.raises(AdapterError, match="there is no adapter 'other'; on the model: default"):
        adapters.save(model, tmp_path, "other")


@every_case
def test_a_training_loop_is_the_plain_one(globs: list[str], keys: set[str]):
    """AdamW with weight decay, on what trains in full alone: the same numbers, bit for bit."""
    ours, theirs = plain(), plain()
    adapters.attach(ours, {}, r=1, alpha=1, also_train=globs)
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_(key in keys)
    (group,) = adapters.parameter_groups(ours, 0.05, ratio=16, weight_decay=0.1)
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.1)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    ours.train()
    theirs.train().statistics.eval()
    optimizers = [torch.optim.AdamW([group]), torch.optim.AdamW(trained, 0.05, weight_decay=0.1)]
    for _ in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(TOKENS).pow(2).sum().backward()
            optimizer.step()
    for key, parameter in adapters.also_trained(ours).items():
        assert torch.equal(parameter.value, theirs.get_parameter(key))
    assert torch.equal(ours(TOKENS), theirs(TOKENS))


def test_counts_and_groups():
    model = attached(["head", "norm"])
    cost, none = adapters.count(model), adapters.count(attached([]))
    assert (cost.also_trained, cost.also_trained_bytes) == (6 * 3 + 3 + 12, 8 * 33)
    assert (none.also_trained, none.also_trained_bytes) == (0, 0)
    head = 2 * (6 + 3)  # the factors that the head no longer has
    assert (cost.trainable, cost.frozen) == (none.trainable - head, none.frozen)
    assert cost.optimizer_bytes == 2 * 8 * (cost.trainable + 33)
    assert cost.adapter_bytes == 8 * cost.trainable
    *_, last = adapters.parameter_groups(model, 0.1, ratio=4)
    assert [id(p) for p in last["params"]] == [
        id(p.value) for p in adapters.also_trained(model).values()
    ]
    assert len(adapters.parameter_groups(model, 0.1, ratio=4)) == 3
    assert len(adapters.parameter_groups(attached([]), 0.1, ratio=4)) == 2


def test_low_rank_alone_disabled_and_its_change():
    """What cuts of ΔW need: the base's weights at all sites, and trained values elsewhere."""
    model = attached(["head", "bias"])
    weights = adapters.base_state_dict(model)
    weights |= {key: p.value.detach() for key, p in adapters.also_trained(model).items()}
    with adapters.disabled(model, also_trained=False):
        y = output(model)
    expected = functional_call(plain(), weights, (TOKENS,))
    torch.testing.assert_close(y, expected, **EXACT)
    assert not torch.allclose(output(model), y)


def test_a_combination_is_the_weighted_sum():
    model = attached(["head", "norm"])
    attached(["head.bias"], "second", 2, model)
    base = plain().state_dict()
    one, other = (adapters.also_trained(model, name) for name in ("default", "second"))
    with pytest.raises(AdapterError, match=r"head\.weight: a weight takes an adapter or trains in"):
        adapters.combine(model, {"default": 0.5, "second": -2.0}, "mix")
    adapters.detach(model, "second")
    adapters.attach(model, "conv", r=1, alpha=1, also_train=["head"], name="second")
    move(model, 3)
    other = adapters.also_trained(model, "second")
    adapters.combine(model, {"default": 0.5, "second": -2.0}, "mix")
    for key, mixed in adapters.also_trained(model).items():
        expected = base[key] + 0.5 * (one[key].value - base[key])
        if key in other:
            expected = expected - 2 * (other[key].value - base[key])
        torch.testing.assert_close(mixed.value.detach(), expected, **EXACT)


def test_another_adapter_reads_the_base_where_one_trains_in_full():
    """One name trains the weight of `fc` in full, another has a factored adapter on it."""
    model = attached(["body.fc"])
    adapters.attach(model, "linear", r=2, alpha=3, name="second", dora=True)
    move(model)
    assert "body.fc" in adapters.attached(model)
    weights = trained_weights(model)
    y = functional_call(plain(), weights, (TOKENS,))
    torch.testing.assert_close(output(model), y, **EXACT)


def test_dora_beside_a_trained_bias():
    model = plain()
    adapters.attach(model, {"fc": Target(match="body.fc")}, r=2, alpha=3, dora=True,
                    also_train=["bias"])  # fmt: skip
    move(model)
    expected = functional_call(plain(), trained_weights(model), (TOKENS,))
    torch.testing.assert_close(output(model), expected, **EXACT)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight
        self.count = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("globs", "says"),
    [
        (["hed"], r"'hed' fits no parameter; nearest: head"),
        (["head", "*.lora.*"], r"'\*\.lora\.\*' fits no parameter"),
        ("head.wight", r"'head\.wight' fits no parameter; nearest: head\.weight"),
    ],
)
def test_globs_that_fit_nothing(globs: Any, says: str):
    model = attached(["norm"])
    with pytest.raises(AdapterError, match=says):
        adapters.attach(model, r=1, alpha=1, also_train=globs, name="second")


@pytest.mark.parametrize(
    ("globs", "says"),
    [
        (["out"], r"'out\.weight' is tied to embed\.weight: each name's trained copy would change"),
        (["out", "embed"], r"'embed\.weight' is tied to out\.weight.*'out\.weight' is tied to emb"),
        (["count"], r"'count' is of torch\.int8, which takes no gradient"),
        (["normed"], r"'normed\.parametrizations\.weight\.original0' is held by a Parametriz"),
    ],
)
def test_parameters_that_cannot_train_beside_their_base(globs: list[str], says: str):
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tied()
        with pytest.raises(AdapterError, match=says):
            adapters.select(model, globs)


def test_the_plan_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    keys = adapters.select(model, ["head", "bias"])
    assert set(keys) == {"head.weight"} | BIASES
    sites = adapters.find_sites(model, {"a": Target()}, trained_in_full=keys)
    assert {site.name for site in sites} == set(adapters.attached(attached(["head"])))
    with pytest.raises(
        AdapterError, match=r"'a' picks only what trains in full \(also_train\): he"
    ):
        adapters.find_sites(model, {"a": Target(match="head")}, trained_in_full=keys)
    with pytest.raises(AdapterError, match="on the meta device"):
        adapters.attach(model, {}, r=1, alpha=1, also_train=["head"])


def test_names_that_are_taken():
    model = attached(["head"])
    for glob in ("head.bias", "conv.weight"):
        with pytest.raises(AdapterError, match="adapter 'default' sits on"):
            adapters.attach(model, {}, r=1, alpha=1, also_train=glob)
    with pytest.raises(AdapterError, match="adapter 'default' sits on head"):
        adapters.attach(model, {"h": Target(match="head")}, r=1, alpha=1)
    assert set(adapters.also_trained(model)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda a: a["also_trained"]["head.bias"].update(shape=[4]),
            r"'head\.bias' has shape \[3\]",
        ),
        (
            lambda a: a["also_trained"].update({"hed.bias": {"shape": [3]}}),
            "'hed.bias' fits no par",
        ),
        (
            lambda a: a["also_trained"].update({"norm.bias": {"shape": [6]}}),
            "there is no tensor norm.bias",
        ),
        (lambda a: a.pop("also_trained"), "unknown tensor head.weight"),
    ],
)
def test_folders_that_do_not_fit(change: Any, says: str, tmp_path: Path):
    adapters.save(attached(["head"]), tmp_path)
    about = json.loads((tmp_path / "adapter.json").read_text())
    change(about)
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    model = plain()
    with pytest.raises(AdapterError, match=says):
        adapters.load(model, tmp_path)
    assert not adapters.names(model)
