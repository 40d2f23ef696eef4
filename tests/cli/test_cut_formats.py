"""`lora-lab cut` of each format of adapters, and of what is special in them.

Independent truth: numpy's SVD of PEFT's own ΔW; PEFT loads the folders that are written; torch's
convolution with W + the cut ΔW; our reader of LyCORIS, which is held to PEFT elsewhere.
Run: make test ARGS=tests/cli/test_cut_formats.py
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters.stored import read_updates
from tests.cli.conftest import Run


class Model(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.inner = nn.ModuleDict({"site": layer})


def nearest(matrix: Tensor, k: int) -> Tensor:
    U, S, Vh = np.linalg.svd(matrix.detach().double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :k] * S[:k]) @ Vh[:k])


def adapted(layer: nn.Module, config: Any) -> Any:
    """PEFT's model with random factors, saved in the folder `adapter`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(Model(layer), config)  # pyright: ignore
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.randn_like(parameter)
    model.save_pretrained("adapter")
    return model


def loaded_site(layer: nn.Module) -> Any:
    model: Any = peft.PeftModel.from_pretrained(Model(layer), "small")  # pyright: ignore
    return model.base_model.model.inner["site"]


def layer_of(kind: str) -> Any:
    torch.manual_seed(0)
    return nn.Linear(24, 36) if kind == "linear" else nn.Conv2d(6, 36, 2)


LYCORIS = {
    "loha": lambda **settings: peft.LoHaConfig(r=2, alpha=5, **settings),
    "lokr": lambda **settings: peft.LoKrConfig(r=2, alpha=5, **settings),
    "lokr-whole": lambda **settings: peft.LoKrConfig(r=30, alpha=30, **settings),
}


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("algorithm", LYCORIS)
def test_loha_and_lokr_become_lora(lora_lab: Run, algorithm: str, kind: str):
    layer = layer_of(kind)
    save_file({"inner.site.weight": layer.weight.detach().clone()}, "base.safetensors")
    model = adapted(layer, LYCORIS[algorithm](target_modules=["site"]))
    delta = model.base_model.model.inner["site"].get_delta_weight("default")
    expected = nearest(delta.flatten(1), 3)
    # As PEFT's folder
    base = ["--base", "base.safetensors"] if kind == "conv2d" and algorithm != "lokr-whole" else []
    code, printed = lora_lab("cut", "adapter", "--rank", "3", "--to", "small", *base)
    assert code == 0, printed
    assert ("taken for linear" in printed) == (kind == "linear" and algorithm != "lokr-whole")
    site = loaded_site(layer_of(kind))
    assert site.r["default"] == 3
    product = site.get_delta_weight("default").flatten(1)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)
    # As a file of LyCORIS
    name = "lora_unet_inner_site"
    stored = load_file("adapter/adapter_model.safetensors")
    parts = {f"{name}.{key.rpartition('.')[2]}": tensor for key, tensor in stored.items()}
    parts[f"{name}.alpha"] = torch.tensor(30.0 if algorithm == "lokr-whole" else 5.0)
    metadata = {"ss_network_dim": "2", "ss_sd_model_name": "mine"}
    save_file(parts, "one.safetensors", metadata)
    code, printed = lora_lab("cut", "one.safetensors", "--rank", "3", "--to", "of_file", *base)
    assert code == 0, printed
    tensors = load_file("of_file/one.safetensors")
    up, down = (tensors[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
    assert down.shape == (3, *layer.weight.shape[1:])
    assert up.shape == (36, 3, *[1] * (layer.weight.dim() - 2))
    product = tensors[f"{name}.alpha"] / 3 * up.flatten(1).double() @ down.flatten(1).double()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
    names = ("lora_up.weight", "lora_down.weight", "alpha")
    assert tensors.keys() == {f"{name}.{part}" for part in names}
    with safe_open("of_file/one.safetensors", "pt") as file:
        assert file.metadata() == metadata | {"ss_network_dim": "Dynamic"}


def test_a_kohya_file_is_cut(lora_lab: Run):
    torch.manual_seed(0)
    tensors = {}
    for site, r in {"lora_unet_a": 4, "lora_unet_b": 2, "lora_te1_c": 6}.items():
        kernel = (3, 3) if site == "lora_te1_c" else ()
        tensors[f"{site}.lora_up.weight"] = torch.randn(7, r, *[1] * len(kernel)).half()
        tensors[f"{site}.lora_down.weight"] = torch.randn(r, 5, *kernel).half()
        tensors[f"{site}.alpha"] = torch.tensor(3.0)
    tensors["lora_unet_a.dora_scale"] = torch.rand(7, 1)
    save_file(tensors, "one.safetensors")
    code, printed = lora_lab("cut", "one.safetensors", "--rank", "2", "--to", "small")
    assert code == 0, printed
    small = load_file("small/one.safetensors")
    assert small.keys() == tensors.keys()
    assert torch.equal(small["lora_unet_a.dora_scale"], tensors["lora_unet_a.dora_scale"])
    for key in (key for key in small if "lora_unet_b" in key):
        assert torch.equal(small[key], tensors[key])
    for site, r in {"lora_unet_a": 4, "lora_te1_c": 6}.items():
        (up, down), (small_up, small_down) = (
            [file[f"{site}.lora_{part}.weight"] for part in ("up", "down")]
            for file in (tensors, small)
        )
        assert small_down.shape[1:] == down.shape[1:]
        assert small_down.dtype == small_up.dtype == torch.half
        before = 3 / r * up.flatten(1).double() @ down.flatten(1).double()
        after = small_up.flatten(1).double() @ small_down.flatten(1).double()
        after *= small[f"{site}.alpha"] / 2
        torch.testing.assert_close(after, nearest(before, 2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("same_filters", [True, False])
@torch.no_grad()
def test_a_grouped_convolution_is_cut_where_that_gains(lora_lab: Run, same_filters: bool):
    torch.manual_seed(0)
    layer = nn.Conv1d(8, 12, 3, groups=2)
    model = adapted(layer, peft.LoraConfig(r=8, lora_alpha=4, target_modules=["site"]))
    # Two groups with four rows of A each; a group's rows have zeros in the channels of the other.
    A = model.base_model.model.inner["site"].lora_A["default"].weight
    A[:4, 4:], A[4:, :4] = 0, 0
    if same_filters:
        A[4:, 4:] = A[:4, :4]
    model.save_pretrained("adapter")
    before = read_updates(Path("adapter"))["inner.site"].product()
    assert torch.linalg.matrix_rank(before) == (4 if same_filters else 8)
    # Two groups of 3 rows are fewer than the 8 that there are; two of 4 or 5 are not.
    for k in (3,) if same_filters else (3, 4, 5):
        code, printed = lora_lab("cut", "adapter", "--rank", str(k), "--to", "small")
        assert code == 0, printed
        assert ("since PEFT has a rank for each group" in printed) == (k > 3)
        x, site = torch.randn(2, 8, 9), loaded_site(layer)
        assert site.r["default"] == (8 if k > 3 else 6)
        delta = before if k > 3 else nearest(before, 3)
        added = F.conv1d(x, delta.view(12, 4, 3).float(), groups=2)
        torch.testing.assert_close(site(x) - layer(x), added, rtol=1e-4, atol=1e-4)
        shutil.rmtree("small")


@torch.no_grad()
def test_intruders_of_a_grouped_convolution(lora_lab: Run):
    """They are scaled where the groups share their filters; else the site stays, which is said."""
    for same_filters in (True, False):
        torch.manual_seed(0)
        layer = nn.Conv1d(8, 12, 3, groups=2)
        save_file({"inner.site.weight": layer.weight.clone()}, "base.safetensors")
        model = adapted(layer, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["site"]))
        A = model.base_model.model.inner["site"].lora_A["default"].weight
        A[:2, 4:], A[2:, :4] = 0, 0
        if same_filters:
            A[2:, 4:] = A[:2, :4]
        model.save_pretrained("adapter")
        arguments = ["--scale-intruders", "0", "--base", "base.safetensors"]
        code, printed = lora_lab("cut", "adapter", *arguments, "--to", f"mild {same_filters}")
        assert code == 0, printed
        assert ("as they were, their intruders too" in printed) != same_filters
        new, old = (
            read_updates(Path(folder))["inner.site"].product()
            for folder in (f"mild {same_filters}", "adapter")
        )
        W = layer.weight.double().flatten(1)
        if same_filters:
            U, S, Vh = np.linalg.svd((W + old).numpy(), full_matrices=False)
            cosines = np.abs(np.linalg.svd(W.numpy(), full_matrices=False)[0].T @ U[:, :10]).max(0)
            chosen = np.flatnonzero(cosines < 0.5)
            assert len(chosen)
            left = old - torch.from_numpy((U[:, chosen] * S[chosen]) @ Vh[chosen])
            torch.testing.assert_close(new, nearest(left, 2), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(new, old)


@torch.no_grad()
def test_factors_of_a_cut_can_train_where_the_update_has_a_lower_rank(lora_lab: Run):
    model = nn.ModuleDict({"low": nn.Linear(9, 7), "zero": nn.Linear(9, 7)})
    adapters.attach(model, r=6, alpha=6)
    A, B = adapters.attached(model)["low"].factors()
    B.copy_(torch.randn(7, 2) @ torch.randn(2, 6))  # of rank 2
    adapters.save(model, "ours")
    expected = B.double() @ A.double()
    assert lora_lab("cut", "ours", "--rank", "4", "--to", "small")[0] == 0
    adapters.detach(model)
    adapters.load(model, "small")
    low, zero = (adapters.attached(model)[name] for name in ("low", "zero"))
    assert (low.r, zero.r) == (2, 1)
    torch.testing.assert_close(low.B.double() @ low.A.double(), expected)
    assert zero.A.any()
    assert not zero.B.any()
    with torch.enable_grad():
        for name, layer in model.items():
            layer(torch.randn(5, 9)).square().sum().backward()
            gradient = adapters.attached(model)[name].B.grad
            assert gradient is not None
            assert gradient.abs().min() > 0, name
