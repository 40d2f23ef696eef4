"""VeRA, LoHa and LoKr beside PEFT's: ΔW, outputs, gradients, first values, folders both ways.

The truth is PEFT's layers with the same tensors, and its models from saved folders.

Run: make test ARGS=tests/adapters/test_peft_forms.py
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from lora_lab.adapters import load_peft, save_peft
from tests.adapters.test_peft import outputs, relative, shake


class Net(nn.Module):
    """Convolutions and linear layers of several sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 8, (3, 2), padding=1, dilation=(1, 2))
        self.grouped = nn.Conv2d(8, 12, 3, padding="same", groups=2)
        self.conv1d = nn.Conv1d(12, 16, 3, stride=2)
        self.fc = nn.Linear(16, 24)
        self.block = nn.ModuleDict({"fc": nn.Linear(24, 10)})
        self.gpt2 = Conv1D(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, 5, 5) → (B, 12)."""
        x = self.grouped(self.conv(x).tanh()).tanh().flatten(2)
        return self.gpt2(self.block["fc"](self.fc(self.conv1d(x).tanh().mean(-1)).tanh()).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def inputs() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(3, 6, 5, 5).double()


pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]

LINEAR = ["fc", "block.fc"]
LAYERS = [*LINEAR, "conv", "grouped", "conv1d"]
PEFTS: dict[str, Any] = {
    "vera": VeraConfig(r=3, target_modules=LINEAR),
    "vera-drawn-again": VeraConfig(r=3, target_modules=LINEAR, save_projection=False),
    "vera-gpt2": VeraConfig(r=3, target_modules=["gpt2"], fan_in_fan_out=True),
    "loha": LoHaConfig(r=2, alpha=6, target_modules=LAYERS),
    "loha-large": LoHaConfig(r=4, alpha=3, target_modules=LAYERS),
    # PEFT rounds the scale of LoHa to float32, in which these are exact.
    "loha-patterns": LoHaConfig(
        r=2, alpha=6, target_modules=LAYERS, rank_pattern={"fc": 3}, alpha_pattern={"conv": 1.25}
    ),
    "lokr": LoKrConfig(r=1, alpha=2, target_modules=LAYERS),
    "lokr-whole": LoKrConfig(r=3, alpha=2, target_modules=LAYERS[:-1]),
    "lokr-both": LoKrConfig(r=1, alpha=2, target_modules=LAYERS, decompose_both=True),
    "lokr-saved": LoKrConfig(r=1, alpha=2, target_modules=["fc"], modules_to_save=["block.fc"]),
}


def of_peft(config: Any) -> Any:
    """PEFT's model with tensors that are all moved."""
    theirs: Any = get_peft_model(net(), copy.deepcopy(config)).double().eval()
    shake(theirs)
    return theirs


def loaded(base: nn.Module, folder: Path) -> Any:
    return PeftModel.from_pretrained(base, str(folder)).double().eval()


@pytest.mark.parametrize("config", PEFTS.values(), ids=PEFTS)
def test_what_peft_saved_gives_its_outputs_gradients_and_update(config: Any, tmp_path: Path):
    theirs, ours, x = of_peft(config), net(), inputs()
    theirs.save_pretrained(str(tmp_path))
    sites = load_peft(ours, tmp_path)
    ours.double()
    y = theirs(x)
    assert relative(y, net()(x)) > 1e-2
    assert relative(ours(x), y) < 1e-12
    for site, delta in adapters.deltas(ours).items():
        layer = theirs.base_model.model.get_submodule(site)
        assert relative(delta, layer.get_delta_weight("default")) < 1e-12
    (y**2).sum().backward()
    (ours(x) ** 2).sum().backward()
    trained = parameters(theirs)
    in_full = sum(p.value.numel() for p in adapters.also_trained(ours).values())
    assert adapters.count(ours).trainable == sum(p.numel() for p in trained) - in_full
    assert adapters.count(ours).trainable == sum(site.trainable_parameters for site in sites)
    assert norms(parameters(ours)) == pytest.approx(norms(trained), rel=1e-9)
    save_peft(ours, tmp_path / "again")
    assert relative(outputs(loaded(net(), tmp_path / "again"), x), y) < 1e-6


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def norms(parameters: list[nn.Parameter]) -> list[float]:
    """Of their gradients, in order."""
    return sorted(p.grad.norm().item() for p in parameters if p.grad is not None)


OURS: dict[str, dict[str, Any]] = {
    "vera": {"form": "vera", "targets": "linear", "scaling": "none"},
    "vera-scaled": {"form": "vera", "targets": "linear", "dropout": 0.5},
    "loha": {"form": "loha", "rank_pattern": {"fc": 3}, "alpha_pattern": {"conv": 0.7}},
    "loha-rslora": {"form": "loha", "scaling": "alpha/sqrt(r)"},
    "lokr": {"form": "lokr", "r": 1},
    "lokr-both": {"form": "lokr_both", "r": 1},
    "loha-and-head": {"form": "loha", "also_train": ["fc.*"]},
}


def attached(how: dict[str, Any]) -> Net:
    model = net()
    rest = {name: adapters.Target(match=name) for name in LAYERS if name not in ("fc",)}
    rest |= {} if "also_train" in how else {"fc": adapters.Target(match="fc")}
    adapters.attach(model, **{"targets": rest, "r": 2, "alpha": 3.3, **how})
    return model


@pytest.mark.parametrize("how", OURS.values(), ids=OURS)
def test_our_folders_give_our_outputs_in_peft(how: dict[str, Any], tmp_path: Path):
    ours, x = attached(how), inputs()
    assert torch.equal(ours(x), net()(x))
    shake(ours)
    y = outputs(ours.eval(), x)
    save_peft(ours, tmp_path)
    assert relative(outputs(loaded(net(), tmp_path), x), y) < 1e-6
    again = net()
    load_peft(again, tmp_path)
    assert relative(outputs(again, x), y) < 1e-6
    for site, adapter in adapters.attached(again).items():
        ours_there = adapters.attached(ours)[site]
        assert adapter.recipe.form == ours_there.recipe.form
        if adapter.recipe.form != "vera":
            assert adapter.scale == pytest.approx(ours_there.scale, rel=3e-16, abs=0)


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("vera", VeraConfig(r=64, target_modules=["0"])),
        ("loha", LoHaConfig(r=30, target_modules=["0"])),
        ("lokr", LoKrConfig(r=3, target_modules=["0"])),
        ("lokr_both", LoKrConfig(r=3, target_modules=["0"], decompose_both=True)),
    ],
)
def test_first_values_are_distributed_as_pefts(form: str, config: Any):
    """The tensors have the same zeros, and uniform numbers of the same bounds."""
    model = nn.Sequential(nn.Linear(400, 900))
    theirs = dict(get_peft_model(copy.deepcopy(model), config).named_parameters())
    theirs |= dict(get_peft_model(copy.deepcopy(model), config).named_buffers())
    of_theirs = sorted(
        (tuple(t.shape), t.abs().max().item(), t.std().item())
        for name, t in theirs.items()
        if ("lokr" in name or "hada" in name or "model.0.vera" in name) and t.numel()
    )
    adapters.attach(model, r=config.r, form=form)
    (adapter,) = adapters.attached(model).values()
    of_ours = sorted(
        (tuple(t.shape), t.abs().max().item(), t.std().item()) for t in adapter.tensors().values()
    )
    assert [shape for shape, *_ in of_ours] == [shape for shape, *_ in of_theirs]
    for (shape, top, std), (_, their_top, their_std) in zip(of_ours, of_theirs, strict=True):
        assert (top == 0) == (their_top == 0), shape
        assert top == pytest.approx(their_top, rel=0.1)
        assert std == pytest.approx(their_std, rel=0.15, abs=1e-7)


def test_veras_random_factors_are_parts_of_one():
    model = nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 12), nn.Linear(12, 30))
    adapters.attach(model, r=4, form="vera", scaling="none")
    small, large, same = adapters.attached(model).values()
    bounds = [(6 / n) ** 0.5 for n in (12, 30)]
    torch.testing.assert_close(small.A / bounds[0], large.A[:, :12] / bounds[1])
    assert torch.equal(small.B[:12], large.B)
    assert torch.equal(small.A, same.A)
    assert not torch.allclose(small.A[:, 0], small.B[:4, 0])
    adapters.attach(model, r=4, form="vera", scaling="none", seed=1, name="other")
    assert not torch.equal(adapters.attached(model, "other")["0"].A, small.A)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "dora": (nn.Linear(4, 6), {"form": "loha", "dora": True}, "'site': PEFT's LOHA has no DoRA"),
    "gpt2": (Conv1D(4, 6), {"form": "lokr"}, "is not for Conv1D, whose weight is in × out"),
    "conv3d": (nn.Conv3d(4, 6, 2), {"form": "loha"}, "is not for Conv3d"),
    "padding": (
        nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        {"form": "loha"},
        "padding_mode='circular', and PEFT's ΔW pads with zeros",
    ),
    "whole": (nn.Conv1d(4, 6, 3), {"form": "lokr"}, "PEFT's LoKr is no Kronecker product"),
    "bias": (
        nn.Linear(4, 6),
        {"form": "loha", "also_train": ["site.bias"]},
        "site.bias: PEFT's LOHA trains no biases",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_hold_is_not_saved(case: Any, tmp_path: Path):
    layer, how, says = case
    model = nn.ModuleDict({"site": copy.deepcopy(layer)})
    adapters.attach(model, r=3, targets="all", **how)
    with pytest.raises(adapters.AdapterError, match="PEFT cannot hold this adapter") as error:
        save_peft(model, tmp_path / "out")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_vera_of_several_ranks_or_seeds_is_not_saved(tmp_path: Path):
    model = net()
    adapters.attach(model, "linear", r=2, form="vera", rank_pattern={"fc": 3})
    with pytest.raises(adapters.AdapterError, match=r"one rank for all sites, here are \[2, 3\]"):
        save_peft(model, tmp_path)
    adapters.detach(model)
    adapters.attach(model, "linear", r=2, form="vera")
    adapters.attached(model)["fc"].A.data[0, 0] += 1
    with pytest.raises(adapters.AdapterError, match="one A and one B for all sites"):
        save_peft(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank_dropout": 0.1}, "rank_dropout=0.1: there is nothing like it here"),
        ({"r": 3}, r"'fc': tensors must be .*they are"),
        ({"alpha": 9}, None),
    ],
)
def test_folders_that_do_not_fit(change: dict[str, Any], says: str | None, tmp_path: Path):
    theirs = of_peft(LoHaConfig(r=2, alpha=6, target_modules=["fc"]))
    theirs.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = net()
    if says is None:
        load_peft(model, tmp_path)
        return
    with pytest.raises(adapters.AdapterError, match=says):
        load_peft(model, tmp_path)
    assert not adapters.attached(model)


def test_a_kernels_tensor_and_an_unknown_layer_are_refused(tmp_path: Path):
    config = LoHaConfig(r=2, target_modules=["conv"], use_effective_conv2d=True)
    of_peft(config).save_pretrained(str(tmp_path))
    with pytest.raises(adapters.AdapterError, match="hada_t1 is of the form with a tensor for the"):
        load_peft(net(), tmp_path)
    of_peft(LoHaConfig(r=2, target_modules=["fc"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace(".fc.", ".fv."): t for k, t in load_file(path).items()}, path)
    with pytest.raises(adapters.AdapterError, match=r"no layer 'fv'.*nearest: fc"):
        load_peft(net(), tmp_path)


@pytest.mark.parametrize(("form", "kind"), [("vera", "conv"), ("loha", "embedding")])
def test_kinds_that_a_form_is_not_for(form: str, kind: str):
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 3, 2), "embedding": nn.Embedding(5, 4)})
    says = f"form={form}: '{kind}' is of kind {kind}, it is for linear"
    with pytest.raises(adapters.AdapterError, match=says):
        adapters.attach(model, kind, r=2, form=form)


@pytest.mark.parametrize("other", [{"init": "pissa"}, {"trains": "zero"}])
def test_a_form_with_an_init_of_its_own_takes_no_other(other: dict[str, Any]):
    with pytest.raises(adapters.AdapterError, match="with form=loha, which decides that itself"):
        adapters.attach(nn.Linear(4, 4), r=2, form="loha", **other)
