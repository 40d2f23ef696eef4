"""Adapters beside PEFT's: the same outputs and gradients, and each reads the other's folders.

The truth is PEFT itself, its layers with the same factors and its models from saved folders.

Run: make test ARGS=tests/adapters/test_peft.py
"""

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding as PeftEmbedding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from lora_lab.adapters import Target
from lora_lab.adapters.embedding import EmbeddingAdapter
from lora_lab.adapters.peft import load_peft, save_peft


@dataclass(frozen=True)
class Kind:
    """A layer that PEFT adapts right, and inputs it takes."""

    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]


def tokens() -> Tensor:
    return torch.randint(0, 11, (3, 8))


KINDS = [
    Kind("linear", lambda: nn.Linear(7, 5), lambda: torch.randn(4, 7)),
    Kind("linear-no-bias", lambda: nn.Linear(4, 9, bias=False), lambda: torch.randn(2, 3, 4)),
    Kind("gpt2-conv1d", lambda: Conv1D(5, 7), lambda: torch.randn(2, 3, 7)),
    Kind("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    Kind(
        "conv2d",
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)),
        lambda: torch.randn(2, 4, 8, 7),
    ),
    Kind(
        "conv2d-same",
        lambda: nn.Conv2d(3, 5, 3, padding="same", bias=False),
        lambda: torch.randn(2, 3, 6, 6),
    ),
    Kind("conv3d", lambda: nn.Conv3d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 4, 5, 4)),
    Kind("conv3d-1x1x3", lambda: nn.Conv3d(4, 6, (1, 1, 3)), lambda: torch.randn(2, 4, 4, 5, 4)),
    Kind("embedding", lambda: nn.Embedding(11, 6), tokens),
    Kind("embedding-padding", lambda: nn.Embedding(11, 6, padding_idx=2), tokens),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
lora_and_dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def holding(layer: nn.Module, name: str = "site") -> Any:
    model = nn.Sequential()
    model.add_module(name, layer)
    return model


class Net(nn.Module):
    """Layers of all kinds, with names that end alike."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.fc = nn.Linear(12, 9)
        self.block = nn.ModuleDict({"fc": nn.Linear(9, 10), "fc1": nn.Linear(10, 7)})
        self.fc1 = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        x = self.grouped(self.conv(x).tanh()).tanh().mean(-1)
        return self.fc1(self.block["fc1"](self.block["fc"](self.fc(x).tanh()).tanh()).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": 11,
    }
    return GPT2LMHeadModel(GPT2Config(**size, tie_word_embeddings=False)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**size, **heads, vocab_size=11, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Moves everything that trains as training would: never the padding token."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, EmbeddingAdapter) and module.padding is not None:
            module.A[:, module.padding] = 0
        if isinstance(module, PeftEmbedding) and module.base_layer.padding_idx is not None:
            module.lora_embedding_A["default"][:, module.base_layer.padding_idx] = 0


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def relative(value: Tensor, truth: Tensor) -> float:
    return float(((value - truth).abs().max() / truth.abs().max()).detach())


def from_peft(base: nn.Module, folder: Path) -> Any:
    """PEFT's model of that folder; a missing tensor is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, str(folder)).eval()


def peft_of(base: nn.Module, **config: Any) -> Any:
    """A base with PEFT's adapter, its factors random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **config}
        model = get_peft_model(base, LoraConfig(**config)).eval()
    shake(model)
    return model


# The same factors give the same outputs and gradients.


@every_kind
@lora_and_dora
def test_outputs_and_gradients_are_pefts(kind: Kind, dora: bool):
    torch.manual_seed(0)
    ours, x = holding(kind.make()), kind.input()
    theirs = peft_of(copy.deepcopy(ours), target_modules=["site"], use_dora=dora)
    adapters.attach(ours, "all", r=2, alpha=3, dora=dora)
    adapter: Any = adapters.attached(ours)["site"]
    layer = theirs.base_model.model.site
    A, B = (
        (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
        if isinstance(layer, PeftEmbedding)
        else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    pairs = [(adapter.A, A), (adapter.B, B)]
    if dora:
        pairs.append((adapter.magnitude, layer.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for parameter, peft_parameter in pairs:
            parameter.copy_(peft_parameter.view(parameter.shape))
    y, truth = ours(x), theirs(x)
    assert relative(y, truth) < 1e-6
    assert relative(y, layer.base_layer(x)) > 1e-2
    target = torch.randn_like(truth)
    (y - target).square().mean().backward()
    (truth - target).square().mean().backward()
    for parameter, peft_parameter in pairs:
        assert parameter.grad is not None
        assert peft_parameter.grad.abs().max() > 1e-4
        assert relative(parameter.grad, peft_parameter.grad.view(parameter.shape)) < 1e-6


# Our folders in PEFT, and back.


@every_kind
@lora_and_dora
def test_every_kind_loads_in_peft_and_back(kind: Kind, dora: bool, tmp_path: Path):
    torch.manual_seed(0)
    base, x = holding(kind.make()), kind.input()
    ours = copy.deepcopy(base)
    adapters.attach(ours, "all", r=2, alpha=3, dora=dora)
    shake(ours)
    save_peft(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == isinstance(base.site, Conv1D)
    y = outputs(ours, x)
    assert relative(y, outputs(base, x)) > 1e-2
    again = copy.deepcopy(base)
    (site,) = load_peft(again, tmp_path, "again")
    assert (site.name, adapters.names(again)) == ("site", ["again"])
    assert torch.equal(outputs(again, x), y)
    assert relative(outputs(from_peft(base, tmp_path), x), y) < 1e-5


ATTACHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"scaling": "alpha/sqrt(r)"},
    "alpha": {"scaling": "alpha"},
    "patterns": {
        "rank_pattern": {"fc": 3, "block.fc1": 4, "grouped": 1},
        "alpha_pattern": {"block.fc": 7.5, "block.fc1": 1},
    },
    "patterns-rslora": {
        "scaling": "alpha/sqrt(r)",
        "rank_pattern": {"fc": 3, "embed": 5},
        "alpha_pattern": {"fc1": 0.3},
    },
    "dora": {"dora": True, "targets": {"all": Target(exclude="grouped")}},
    "dora-pissa": {"dora": True, "init": "pissa", "targets": {"all": Target(exclude="grouped")}},
    "pissa": {"init": "pissa"},
    "pissa-rslora": {"init": "pissa", "scaling": "alpha/sqrt(r)"},
    "olora": {"init": "olora", "rank_pattern": {"fc": 1}},
    "svd": {"init": "svd"},
    "lora-xs": {"init": "svd", "trains": "core"},
    "lora-fa": {"trains": "zero"},
    "dropout": {"dropout": 0.5},
    "one-layer": {"targets": {"fc": Target(match="fc")}},
}


def attached_net(how: dict[str, Any]) -> Net:
    model = net()
    adapters.attach(model, **{"targets": "all", "r": 2, "alpha": 3.3, **how})
    shake(model)
    return model


@pytest.mark.parametrize("how", ATTACHED.values(), ids=ATTACHED)
def test_every_way_loads_in_peft_and_back(how: dict[str, Any], tmp_path: Path):
    ours, x = attached_net(how), tokens()
    y = outputs(ours, x)
    assert relative(y, outputs(net(), x)) > 1e-2
    save_peft(ours, tmp_path)
    theirs = from_peft(net(), tmp_path)
    assert relative(outputs(theirs, x), y) < 1e-5
    attached = adapters.attached(ours)
    adapted = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "scaling")}
    assert {n: m.scaling["default"] for n, m in adapted.items()} == pytest.approx(
        {site: adapter.scale for site, adapter in attached.items()}, rel=3e-16, abs=0
    )
    again = net()
    sites = load_peft(again, tmp_path)
    assert relative(outputs(again, x), y) < 1e-6
    assert {site.name for site in sites} == set(attached)
    for site, adapter in adapters.attached(again).items():
        delta, truth = adapters.deltas(again)[site], adapters.deltas(ours)[site]
        assert relative(delta, truth) < 1e-6
        assert adapter.scale == pytest.approx(attached[site].scale, rel=3e-16, abs=0)
        assert adapter.r == len(attached[site].factors()[0])
        assert adapter.recipe.dropout == (attached[site].recipe.dropout if site != "embed" else 0)


@pytest.mark.parametrize("r", [1, 3, 7])
@pytest.mark.parametrize("alpha", [0.1, 1.7, 8, 1e-7, 3.14159, 1e6, 1 / 3])
def test_the_scale_is_the_same_number(alpha: float, r: int, tmp_path: Path):
    for scaling in adapters.SCALINGS:
        base = holding(nn.Linear(8, 8), "fc")
        ours = copy.deepcopy(base)
        adapters.attach(ours, r=r, alpha=alpha, scaling=scaling)
        save_peft(ours, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert scaling in ("alpha", "none") or config["lora_alpha"] == alpha
        peft_scale = from_peft(base, tmp_path).base_model.model.fc.scaling["default"]
        scale = adapters.attached(ours)["fc"].scale
        # Not every float is the quotient of another and r: then it is the next one.
        assert abs(peft_scale - scale) <= (math.ulp(scale) if scaling == "alpha" else 0)


def test_one_of_several_and_a_combination_of_them(tmp_path: Path):
    ours, x = attached_net({}), tokens()
    adapters.attach(ours, "linear", r=3, alpha=1, name="other", seed=5)
    shake(ours)
    adapters.combine(ours, {"default": 0.4, "other": -1.5}, "both")
    for name in ("default", "other", "both"):
        adapters.switch(ours, name)
        y = outputs(ours, x)
        adapters.switch(ours, None)
        save_peft(ours, tmp_path / name, name)
        assert relative(outputs(from_peft(net(), tmp_path / name), x), y) < 1e-5


def test_merged_is_written_as_unmerged(tmp_path: Path):
    ours, x = attached_net({}), tokens()
    y = outputs(ours, x)
    adapters.merge(ours)
    save_peft(ours, tmp_path)
    assert relative(outputs(from_peft(net(), tmp_path), x), y) < 1e-5


def test_gpt2(tmp_path: Path):
    ours, x = gpt2(), tokens()
    targets = {"linear": Target("linear"), "wte": Target("embedding", "*.wte")}
    adapters.attach(ours, targets, r=2, alpha=4, dora=True, rank_pattern={"*.mlp.c_fc": 4})
    shake(ours)
    y = outputs(ours, x)
    assert relative(y, outputs(gpt2(), x)) > 1e-2
    save_peft(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # lm_head is an nn.Linear
        theirs = from_peft(gpt2(), tmp_path)
    assert relative(outputs(theirs, x), y) < 1e-5
    again = gpt2()
    load_peft(again, tmp_path)
    assert torch.equal(outputs(again, x), y)


# PEFT's folders here.


@every_kind
@lora_and_dora
def test_every_kind_that_peft_saved(kind: Kind, dora: bool, tmp_path: Path):
    torch.manual_seed(0)
    base, x = holding(kind.make()), kind.input()
    theirs = peft_of(copy.deepcopy(base), target_modules=["site"], use_dora=dora)
    theirs.save_pretrained(str(tmp_path))
    (site,) = load_peft(base, tmp_path)
    y = outputs(theirs, x)
    assert relative(outputs(base, x), y) < 1e-6
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    assert len(trained) == 3 if dora else 2
    assert adapters.count(base).trainable == site.trainable_parameters
    assert relative(outputs(adapters.merged(base), x), y) < 1e-5


LIST = ["fc", "fc1", "conv", "embed"]
PEFTS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": LIST},
    "regex": {"target_modules": r".*\.fc1?|embed"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": LIST, "exclude_modules": ["block.fc"]},
    "patterns": {
        "target_modules": LIST,
        "rank_pattern": {"block.fc": 3, "fc": 4, "embed": 1},
        "alpha_pattern": {"fc1": 11, "conv|embed": 0.7},
    },
    "patterns-rslora": {
        "target_modules": LIST,
        "use_rslora": True,
        "rank_pattern": {"fc1": 5},
        "alpha_pattern": {".*fc1?": 2},
    },
    "dora": {"target_modules": LIST, "use_dora": True},
    "dropout": {"target_modules": LIST, "lora_dropout": 0.3},
    "gaussian": {"target_modules": ["fc", "conv"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["fc", "fc1"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("config", PEFTS.values(), ids=PEFTS)
def test_every_config_that_peft_saved(config: dict[str, Any], tmp_path: Path):
    theirs, x = peft_of(net(), **config), tokens()
    theirs.save_pretrained(str(tmp_path))
    ours = net()
    load_peft(ours, tmp_path)
    y = outputs(theirs, x)
    assert relative(y, outputs(net(), x)) > 1e-2
    assert relative(outputs(ours, x), y) < 1e-6


def test_gpt2_that_peft_saved(tmp_path: Path):
    theirs, x = peft_of(gpt2(), target_modules=["c_attn", "c_fc", "wte"], use_dora=True), tokens()
    theirs.save_pretrained(str(tmp_path))
    ours = gpt2()
    assert len(load_peft(ours, tmp_path)) == 5
    assert relative(outputs(ours, x), outputs(theirs, x)) < 1e-6


def test_an_embeddings_weights_that_peft_saves_with_it(tmp_path: Path):
    theirs, x = peft_of(llama(), target_modules=["embed_tokens", "q_proj", "lm_head"]), tokens()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(str(tmp_path))
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = llama()
    load_peft(ours, tmp_path)
    assert relative(outputs(ours, x), outputs(theirs, x)) < 1e-6
    other: Any = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 2] += 1e-3
    with pytest.raises(
        adapters.AdapterError, match=r"is not this model's 'model\.embed_tokens\.wei"
    ):
        load_peft(other, tmp_path)


def test_a_grouped_convolution_of_blocks_that_peft_saved(tmp_path: Path):
    torch.manual_seed(0)
    base, x = holding(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 6, 6)
    theirs = peft_of(copy.deepcopy(base), target_modules=["site"], r=4)
    A = theirs.base_model.model.site.lora_A["default"].weight
    with torch.no_grad():
        A[:2, 2:], A[2:, :2] = 0, 0
    theirs.save_pretrained(str(tmp_path))
    load_peft(base, tmp_path)
    assert relative(outputs(base, x), outputs(theirs, x)) < 1e-6
    assert adapters.attached(base)["site"].r == 4


def test_the_scale_is_pefts_also_where_the_rank_is_not(tmp_path: Path):
    """It has rank groups · 7 in PEFT and 7 here, where alpha is not always a third of PEFT's."""
    tensors = {"lora_A.weight": torch.zeros(21, 6, 3), "lora_B.weight": torch.zeros(6, 7, 1)}
    for alpha in range(1, 30):
        named = {f"base_model.model.site.{key}": tensor for key, tensor in tensors.items()}
        write(tmp_path, named, r=21, lora_alpha=alpha)
        model = holding(nn.Conv1d(6, 6, 3, groups=3))
        load_peft(model, tmp_path)
        adapter = adapters.attached(model)["site"]
        assert (adapter.r, adapter.scale) == (7, alpha / 21)


# What is refused.


class Squared(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight**2, self.bias)


def padded() -> nn.Embedding:
    layer = nn.Embedding(11, 6, padding_idx=2)
    nn.init.normal_(layer.weight)
    return layer


DIFFERS_IN_PEFT: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2), False, r"dilation=\(2,\)"),
    "dilation-same": (
        lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
        False,
        r"dilation=\(2, 2\)",
    ),
    "reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        False,
        "padding_mode='reflect'",
    ),
    "circular": (
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        False,
        "padding_mode='circular'",
    ),
    "grouped-dora": (lambda: nn.Conv2d(4, 6, 3, groups=2), True, "groups=2 with DoRA"),
    "padding-dora": (padded, True, "padding_idx=2 with DoRA"),
    "subclass": (lambda: Squared(4, 6), False, "Squared computes otherwise"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), False, "this weight of ConvTranspose2d"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), False, "this weight of MultiheadAttention"),
    "lstm": (lambda: nn.LSTM(4, 4), False, "this weight of LSTM"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), False, "this weight of Bilinear"),
    "bag": (lambda: nn.EmbeddingBag(11, 4), False, "this weight of EmbeddingBag"),
}


@pytest.mark.parametrize("case", DIFFERS_IN_PEFT.values(), ids=DIFFERS_IN_PEFT)
def test_layers_that_peft_computes_differently_are_not_saved(case: Any, tmp_path: Path):
    make, dora, says = case
    model = nn.ModuleDict({"right": nn.Linear(3, 3), "site": make()})
    adapters.attach(model, "all", r=1, alpha=1, dora=dora)
    with pytest.raises(adapters.AdapterError, match=rf"cannot hold this adapter: 'site.*{says}"):
        save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", DIFFERS_IN_PEFT.values(), ids=DIFFERS_IN_PEFT)
def test_layers_that_peft_computes_differently_are_not_loaded(case: Any, tmp_path: Path):
    make, dora, says = case
    model = holding(make())
    tensors = {f"lora_{part}.weight": torch.zeros(1, 1) for part in "AB"}
    write(tmp_path, {f"base_model.model.site.{k}": t for k, t in tensors.items()}, use_dora=dora)
    with pytest.raises(adapters.AdapterError, match=rf"does not fit: 'site'.*{says}"):
        load_peft(model, tmp_path)


def test_what_peft_makes_of_those_layers():
    """The refusals are needed: PEFT's outputs are not those of the weight that it would merge."""
    for name in ("dilation-same", "reflect", "circular", "subclass"):
        torch.manual_seed(0)
        make, _, _ = DIFFERS_IN_PEFT[name]
        base = holding(make())
        x = torch.randn(2, 4, 8, 8)[tuple([slice(None)] * base.site.weight.dim() + [0] * 4)[:4]]
        theirs = peft_of(copy.deepcopy(base), target_modules=["site"])
        layer = theirs.base_model.model.site
        with torch.no_grad():
            base.site.weight += layer.get_delta_weight("default")
        assert relative(outputs(theirs, x), outputs(base, x)) > 0.05


def test_the_model_itself_is_not_saved(tmp_path: Path):
    model = nn.Linear(3, 3)
    adapters.attach(model, r=1, alpha=1)
    with pytest.raises(adapters.AdapterError, match="'': it is the model itself"):
        save_peft(model, tmp_path)


def test_a_tied_weight_is_neither_saved_nor_loaded(tmp_path: Path):
    def tied() -> Any:
        model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "head": nn.Linear(6, 11, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    adapters.attach(model, {"embed": Target("embedding", tied=True)}, r=2, alpha=1)
    with pytest.raises(adapters.AdapterError, match="'embed': its weight is tied"):
        save_peft(model, tmp_path)
    assert not [*tmp_path.iterdir()]
    untied = nn.ModuleDict({"embed": nn.Embedding(11, 6)})
    adapters.attach(untied, "embedding", r=2, alpha=1)
    save_peft(untied, tmp_path)
    with pytest.raises(adapters.AdapterError, match="the weight of 'embed' is tied"):
        load_peft(tied(), tmp_path)


def test_dora_on_some_sites_is_not_saved(tmp_path: Path):
    model = net()
    adapters.attach(model, {"fc": Target(match="fc")}, r=2, alpha=1, dora=True)
    adapters.attach(model, {"fc1": Target(match="fc1")}, r=2, alpha=1, name="plain")
    model.fc.lora.active = "default"  # pyright: ignore
    with pytest.raises(adapters.AdapterError, match="'fc1': it has no DoRA magnitude"):
        save_peft(model, tmp_path)


def test_no_such_adapter(tmp_path: Path):
    with pytest.raises(adapters.AdapterError, match="no adapter is active; on the model: none"):
        save_peft(net(), tmp_path / "out")
    with pytest.raises(adapters.AdapterError, match="no adapter 'other'; on the model: default"):
        save_peft(attached_net({}), tmp_path / "out", "other")
    assert not (tmp_path / "out").exists()


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def fc(**changes: Tensor | None) -> dict[str, Tensor]:
    """The tensors of PEFT's adapter on `fc`, changed."""
    tensors = {"fc.lora_A.weight": torch.zeros(2, 12), "fc.lora_B.weight": torch.zeros(9, 2)}
    changed = {**tensors, **changes}
    return {f"base_model.model.{key}": t for key, t in changed.items() if t is not None}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': must be one of LORA, VERA, LOHA, LOKR"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
        ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"kasa_config": {"beta": 1}}, "kasa_config="),
        ({"ensure_weight_tying": True, "modules_to_save": ["x"]}, "ensure_weight_tying=True with"),
        ({"not_made_yet": 3}, "not_made_yet=3: there is nothing like it here"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4': PEFT changes the base",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
    ],
)
def test_configs_that_are_no_lora(config: dict[str, Any], says: str, tmp_path: Path):
    write(tmp_path, fc(), **config)
    model = net()
    with pytest.raises(adapters.AdapterError, match=says):
        load_peft(model, tmp_path)
    assert not adapters.attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (fc(), {"r": 4}, r"'fc': tensors must be .*\[4, 12\].* they are .*\[2, 12\]"),
        (fc(), {"use_dora": True}, r"'fc': .*'lora_magnitude_vector': \[9\]"),
        (fc(**{"fc.lora_B.weight": None}), {}, r"'lora_B.weight': \[9, 2\]"),
        (fc(**{"fc.lora_B.bias": torch.zeros(9)}), {}, r"they are .*'lora_B.bias'"),
        (fc(**{"fc.lora_A.weight": torch.zeros(2, 11)}), {}, r"they are .*\[2, 11\]"),
        (fc(**{"fv.lora_A.weight": torch.zeros(2, 1)}), {}, "no layer 'fv'; nearest: fc"),
        (fc(**{"fc.weird": torch.zeros(2)}), {}, "unknown tensor base_model.model.fc.weird"),
        ({"fc.lora_A.weight": torch.zeros(2, 12)}, {}, "unknown tensor fc.lora_A.weight"),
        (fc(**{"fc.bias": torch.full((9,), 7.0)}), {}, "is not this model's 'fc.bias'"),
        ({}, {}, "it holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict, config: dict, says: str, tmp_path: Path):
    write(tmp_path, tensors, **config)
    model = net()
    with pytest.raises(adapters.AdapterError, match=says):
        load_peft(model, tmp_path)
    assert not adapters.attached(model)


def test_every_misfit_is_named(tmp_path: Path):
    write(tmp_path, fc(**{"fc.x": torch.zeros(1), "nix.lora_A.weight": torch.zeros(1)}), r=3)
    with pytest.raises(adapters.AdapterError) as raised:
        load_peft(net(), tmp_path)
    for what in ("model.fc.x", "no layer 'nix'", "'fc': tensors must be"):
        assert what in str(raised.value)


def test_a_dense_grouped_convolution_of_pefts_is_not_loaded(tmp_path: Path):
    """Its ΔW reads the channels of other groups: PEFT itself cannot merge it."""
    theirs = peft_of(net(), target_modules=["grouped"], r=4)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(adapters.AdapterError, match="'grouped': A takes channels of other groups"):
        load_peft(net(), tmp_path)
    with pytest.raises(NotImplementedError):
        theirs.merge_adapter()


def test_a_padding_token_that_peft_changes_is_not_loaded(tmp_path: Path):
    tensors = {
        "site.lora_embedding_A": torch.ones(2, 11),
        "site.lora_embedding_B": torch.ones(6, 2),
    }
    write(tmp_path, {f"base_model.model.{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(adapters.AdapterError, match="A changes the padding token 2"):
        load_peft(holding(padded()), tmp_path)


def test_no_files(tmp_path: Path):
    with pytest.raises(adapters.AdapterError, match="no PEFT adapter can be read from"):
        load_peft(net(), tmp_path / "nowhere")
    write(tmp_path, fc())
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(adapters.AdapterError, match="no PEFT adapter can be read from"):
        load_peft(net(), tmp_path)
