"""Adapters read from files without a model: ΔW of each kind, and what is refused.

Independent truth: PEFT's own ΔW (`get_delta_weight`, and merged weights for DoRA); what our
adapters add to a layer's weight; Tucker's sum written out in loops.
Run: make test ARGS=tests/adapters/test_stored.py
"""

import json
import math
import random
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from lora_lab.adapters import AdapterError
from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.peft_tensors import alpha_for_scale
from lora_lab.adapters.scaling import SCALINGS
from lora_lab.adapters.stored import StoredUpdate, read_updates
from lora_lab.adapters.watch import KINDS_ON_READING
from tests.adapters.cases import Case, cases_where

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(7, 5),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "grouped": lambda: nn.Conv1d(8, 12, 3, groups=2),
    "gpt2": lambda: Conv1D(5, 7),
    "embedding": lambda: nn.Embedding(11, 6),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"site": 2}, "alpha_pattern": {"sit.": 5}},
    "dora": {"use_dora": True},
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Holder(nn.Module):
    """A model with one layer, which PEFT adapts; never called."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.inner = nn.ModuleDict({"site": layer})


def peft_model(layer: nn.Module, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Holder(layer), config)  # pyright: ignore
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            low = 0.5 if "magnitude" in name else 0.0
            parameter.data = torch.rand_like(parameter) + low
    return model


def matrix(weight: Tensor, layer: nn.Module) -> Tensor:
    flat = weight.detach().double().flatten(1)
    return flat.T if isinstance(layer, Conv1D | nn.Embedding) else flat


# Not DoRA on a grouped convolution, whose norm PEFT takes over the wrong channels.
@pytest.mark.parametrize(
    ("kind", "variant"), [p for p in product(LAYERS, VARIANTS) if p != ("grouped", "dora")]
)
def test_a_peft_folder_gives_pefts_update(kind: str, variant: str):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    W = matrix(layer.weight, layer)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["site"], **VARIANTS[variant]}
    model = peft_model(layer, LoraConfig(fan_in_fan_out=kind == "gpt2", **settings))
    if kind == "grouped":  # the channels of a group alone: else ΔW is no weight of the layer
        A = model.base_model.model.inner["site"].lora_A["default"].weight
        for j in range(2):
            size = len(A) // 2
            A.data[j * size : (j + 1) * size, (1 - j) * 4 : (2 - j) * 4] = 0
    save_file({"inner.site.weight": layer.weight.detach().contiguous()}, "base.safetensors")
    model.save_pretrained("peft")
    update = read_updates(Path("peft"))["inner.site"]
    base = Checkpoint(Path("base.safetensors")).matrix("inner.site", update)
    assert base is not None
    torch.testing.assert_close(base.double(), W)
    assert update.shape == tuple(W.shape)
    if kind == "grouped":  # which PEFT does not merge
        delta, x = update.delta(base).float().view(layer.weight.shape), torch.randn(2, 8, 9)
        added = model.base_model.model.inner["site"](x) - layer(x)
        torch.testing.assert_close(F.conv1d(x, delta, groups=2), added, rtol=1e-4, atol=1e-5)
        return
    merged = model.merge_and_unload().inner["site"]
    expected = matrix(merged.weight, layer) - W
    torch.testing.assert_close(update.delta(base), expected, rtol=1e-5, atol=1e-5)


@cases_where(lambda case: case.variant == "lora" or case.layer.name in ("linear", "embedding"))
def test_our_folder_gives_our_update(case: Case):
    model = case.build().float()
    adapters.save(model, "ours")
    updates = read_updates(Path("ours"))
    if case.layer.kind == "experts":  # each of them is an update: see test_stored_experts.py
        names = [f"{site}.{e}" for site in adapters.attached(model) for e in range(3)]
        assert [*updates] == names
        return
    assert updates.keys() == adapters.attached(model).keys()
    for site, adapter in adapters.attached(model).items():
        path = site.rpartition(".")[0] if adapter.kind in KINDS_ON_READING else site
        weight = adapter.weight_of(model.get_submodule(path)).detach()
        expected = adapter.weight_to_matrix(adapter.delta(weight)).detach().double()
        delta = updates[site].delta(adapter.weight_to_matrix(weight))
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


ALGORITHMS = ("loha", "lokr", "lokr-both", "lokr-whole")
# A matrix has no kernel for the Tucker form, and PEFT 0.21 stores that of a conv1d with a dimension
# more. Nor does it compute lokr-whole of a conv1d as LyCORIS: it multiplies w₁ (2 dimensions) by w₂
# (3) from the last dimension on.
LYCORIS = [
    *((algorithm, kind, "flat") for algorithm, kind in product(ALGORITHMS, ["linear", "conv2d"])),
    *((algorithm, "conv1d", "flat") for algorithm in ALGORITHMS[:3]),
    *((algorithm, "conv2d", "tucker") for algorithm in ALGORITHMS),
]


@pytest.mark.parametrize(("algorithm", "kind", "form"), LYCORIS)
def test_a_lycoris_file_gives_pefts_update(algorithm: str, kind: str, form: str):
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(24, 36), "conv1d": nn.Conv1d(24, 36, 3)}.get(kind)
    layer = layer or nn.Conv2d(24, 36, (3, 2) if algorithm == "loha" else 3)
    settings: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["site"]}
    settings["use_effective_conv2d"] = form == "tucker"
    if algorithm == "lokr-both":
        settings |= {"decompose_both": True, "decompose_factor": 6}
    if algorithm == "lokr-whole":
        # LyCORIS scales two whole factors by 1, PEFT by alpha/r.
        settings |= {"r": 30, "alpha": 30}
    model = peft_model(
        layer, LoHaConfig(**settings) if algorithm == "loha" else LoKrConfig(**settings)
    )
    tensors = {
        key.rpartition("inner.site.")[2].replace(".default", ""): parameter.detach().contiguous()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(
        {f"lora_unet_inner_site.{part}": tensor for part, tensor in tensors.items()}
        | {"lora_unet_inner_site.alpha": torch.tensor(float(settings["alpha"]))},
        "one.safetensors",
    )
    update = read_updates(Path("one.safetensors"))["lora_unet_inner_site"]
    delta = model.base_model.model.inner["site"].get_delta_weight("default")
    expected = delta.detach().double().flatten(1)
    torch.testing.assert_close(update.product(), expected, rtol=1e-5, atol=1e-5)
    assert update.shape == tuple(expected.shape)
    model.save_pretrained("peft")
    of_folder = read_updates(Path("peft"))["inner.site"]
    torch.testing.assert_close(of_folder.product(), expected, rtol=1e-5, atol=1e-5)
    save_file({"inner.site.weight": layer.weight.detach().clone()}, "base.safetensors")
    W = Checkpoint(Path("base.safetensors")).matrix("lora_unet_inner_site", update)
    assert W is not None
    assert torch.equal(W, layer.weight.flatten(1))


def test_a_tucker_lora_is_the_sum_written_out():
    torch.manual_seed(0)
    up, down, mid = torch.randn(3, 2, 1, 1), torch.randn(2, 4, 1, 1), torch.randn(2, 2, 3, 2)
    layer = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}
    parts = {f"lora_te_x.{part}": tensor for part, tensor in layer.items()}
    save_file(parts | {"lora_te_x.alpha": torch.tensor(1.0)}, "one.safetensors")
    expected = torch.zeros(3, 4, 3, 2, dtype=torch.float64)
    for o in range(3):
        for i in range(4):
            for p in range(2):
                for q in range(2):
                    expected[o, i] += 0.5 * up[o, p, 0, 0] * mid[p, q] * down[q, i, 0, 0]
    product = read_updates(Path("one.safetensors"))["lora_te_x"].product()
    torch.testing.assert_close(product, expected.flatten(1), rtol=1e-6, atol=1e-6)


UP_AND_DOWN = {"a.lora_up.weight": torch.ones(3, 2), "a.lora_down.weight": torch.ones(2, 4)}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "diff": ({"a.diff": torch.ones(2, 2)}, "a.diff is a full difference, of no low rank"),
    "oft": ({"a.oft_blocks": torch.ones(2, 2)}, "a.oft_blocks turns W instead of adding to it"),
    "peft": ({"a.lora_A.weight": torch.ones(2, 2)}, "is of PEFT's format: give its folder"),
    "unknown": ({"a.b.weight": torch.ones(2, 2)}, "a.b.weight is no part of LoRA, LoHa or LoKr"),
    "lacking": ({"a.lora_up.weight": torch.ones(2, 2)}, "a: there is no lora_down.weight, only"),
    "shapes": (
        UP_AND_DOWN | {"a.lora_down.weight": torch.ones(3, 4)},
        "a: B (3, 2) and A (3, 4) do not fit",
    ),
    "dora over inputs": (
        UP_AND_DOWN | {"a.dora_scale": torch.ones(1, 4)},
        "a: dora_scale (1, 4) is not over the 3 outputs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_lycoris_file_holds_and_is_not_read(name: str):
    tensors, message = REFUSED[name]
    save_file(tensors, "one.safetensors")
    with pytest.raises(AdapterError) as error:
        read_updates(Path("one.safetensors"))
    assert message in str(error.value)


def test_folders_that_hold_no_adapter_or_a_damaged_one():
    Path("empty").mkdir()
    with pytest.raises(AdapterError, match="empty holds no adapter: PEFT's folders have"):
        read_updates(Path("empty"))
    Path("cut.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(AdapterError, match="no tensors can be read from cut"):
        read_updates(Path("cut.safetensors"))
    peft_model(nn.Linear(7, 5), LoraConfig(r=2, target_modules=["site"])).save_pretrained("peft")
    config = json.loads(Path("peft/adapter_config.json").read_text())
    Path("peft/adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(AdapterError, match="json says r=3"):
        read_updates(Path("peft"))
    Path("peft/adapter_config.json").write_text(json.dumps(config | {"peft_type": "VERA"}))
    with pytest.raises(AdapterError, match="does not say how many inputs each layer has"):
        read_updates(Path("peft"))


def test_a_block_of_rows_is_found_in_its_parameter():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    adapters.attach(model, "all", r=2, alpha=2)
    adapters.save(model, "ours")
    updates = read_updates(Path("ours"))
    weight = torch.randn(24, 8)
    save_file({"m.attn.in_proj_weight": weight}, "base.safetensors")
    base = Checkpoint(Path("base.safetensors"))
    for i, letter in enumerate("qkv"):
        site = f"attn.in_proj_weight_{letter}"
        W = base.matrix(site, updates[site])
        assert W is not None
        assert torch.equal(W, weight[8 * i : 8 * (i + 1)])
    assert base.matrix("attn.out_proj.weight", updates["attn.out_proj.weight"]) is None


@pytest.mark.parametrize(
    ("site", "key", "has_weight"),
    [
        ("encoder.fc", "bert.encoder.fc.weight", True),
        ("bert.encoder.fc", "encoder.fc.weight", True),
        ("block.0.fc", "fc.weight", False),
        ("lora_te1_encoder_fc", "encoder.fc.weight", True),
        ("lycoris_encoder_fc", "encoder.fc.weight", True),
        ("lora_unet_encoder_fc", "fc.weight", False),
        # Of two, the one that has more of the name, or is a layer's weight, or has fewer dots.
        ("lycoris_encoder_fc", "encoder.fc.weight fc.weight", True),
        ("lora_te1_fc", "te1.fc.weight fc.weight", True),
        ("lora_unet_a_b", "a.b.weight a.b", True),
        ("lora_unet_a_b_c", "a_b.c.weight a.b.c.weight", True),
        ("lora_unet_a_b", "a.b.weight a.b_c.weight a.weight", True),
        # Of two that begin otherwise none can be told to be the one.
        ("encoder.fc", "bert.encoder.fc.weight other.encoder.fc.weight", False),
    ],
)
def test_which_weight_of_a_base_is_a_sites(site: str, key: str, has_weight: bool):
    keys = key.split()
    tensors = {other: torch.zeros(3, 4) for other in reversed(keys)}
    save_file(tensors | {keys[0]: torch.ones(3, 4)}, "base.safetensors")
    update = StoredUpdate(torch.ones(2, 4), torch.ones(3, 2))
    W = Checkpoint(Path("base.safetensors")).matrix(site, update)
    assert (W is not None) == has_weight
    assert W is None or W.all()


def test_our_folder_says_which_way_round_a_square_weight_lies():
    model = nn.ModuleDict({"gpt2": Conv1D(6, 6), "linear": nn.Linear(6, 6)})
    adapters.attach(model, r=2, alpha=2)
    adapters.save(model, "ours")
    save_file(
        {k: v.clone() for k, v in adapters.base_state_dict(model).items()}, "base.safetensors"
    )
    base, updates = Checkpoint(Path("base.safetensors")), read_updates(Path("ours"))
    for site, layer in model.items():
        W = base.matrix(site, updates[site])
        assert W is not None
        weight = layer._parameters["weight"]
        assert weight is not None
        assert torch.equal(W.double(), matrix(weight, layer))
    # A folder of an earlier version has not this key, and loads.
    description = json.loads(Path("ours/adapter.json").read_text())
    for site in description["sites"].values():
        del site["transposed"]
    Path("ours/adapter.json").write_text(json.dumps(description))
    assert not read_updates(Path("ours"))["gpt2"].transposed
    adapters.detach(model)
    adapters.load(model, "ours")


def test_alpha_gives_exactly_the_scale_of_before():
    drawn = random.Random(0)
    exact = 0
    for _ in range(2000):
        r, k, before = drawn.randint(2, 300), drawn.randint(1, 300), drawn.uniform(0.1, 64)
        for scaling, scale_of in SCALINGS.items():
            scale = scale_of(before, r)
            alpha = alpha_for_scale(scale, k, scaling)
            exact += scale_of(alpha, k) == scale
            assert abs(scale_of(alpha, k) - scale) <= math.ulp(scale)
            steps = [alpha]
            for direction in (0, math.inf):  # no other float gives it where this one does not
                step = alpha
                for _ in range(4):
                    steps.append(step := math.nextafter(step, direction))
            assert scale_of(alpha, k) == scale or scale not in [scale_of(a, k) for a in steps]
    assert exact > 5000
    assert alpha_for_scale(SCALINGS["alpha/sqrt(r)"](16, 32), 32, "alpha/sqrt(r)") == 16


def test_a_checkpoint_is_a_file_a_folder_or_shards():
    tensors = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    for folder in ("one", "shards", "two"):
        Path(folder).mkdir()
    save_file(tensors, "one/model.safetensors")
    save_file({"a": tensors["a"]}, "shards/1.safetensors")
    save_file({"b": tensors["b"]}, "shards/2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("one/model.safetensors", "one", "shards"):
        checkpoint = Checkpoint(Path(path))
        assert checkpoint.shapes == {"a": (2, 2), "b": (3,)}
        assert torch.equal(checkpoint.tensor("b"), tensors["b"])
    Path("shards/2.safetensors").unlink()
    for path, message in {
        "shards": "shards lacks 2.safetensors, which model.safetensors.index.json names",
        "two": "two has no model.safetensors or model.safetensors.index.json",
        "one/config.json": "is no .safetensors file",
    }.items():
        with pytest.raises(AdapterError, match=message):
            Checkpoint(Path(path))
    assert load_file("one/model.safetensors").keys() == tensors.keys()
