"""`lora-lab cut` and `extract`: what they write.

Independent truth: PEFT loads the folders that are written, and its model gives what the base gives
with W + the SVD-cut ΔW of numpy; PEFT's own reduce_intruder_dimension; our `adapters.load`.
Run: make test ARGS=tests/cli/test_adapter_commands.py
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from tests.cli.conftest import Run
from tests.cli.peft_folders import gpt2, llama, peft_folder
from tests.conftest import Lab, only_run

TOKENS = torch.arange(12).view(2, 6)


CONFIGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (llama, {}),
    "rslora": (llama, {"use_rslora": True}),
    "dora": (llama, {"use_dora": True}),
    "patterns": (llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*": 3}}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head in full": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    layers = dict(model.named_modules())
    return {name: m for name, m in layers.items() if isinstance(m, peft.tuners.lora.LoraLayer)}


def nearest(matrix: Tensor, k: int) -> Tensor:
    U, S, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :k] * S[:k]) @ Vh[:k])


def loaded(model: nn.Module, folder: str) -> Any:
    return peft.PeftModel.from_pretrained(model, folder).eval()  # pyright: ignore


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_peft_loads_a_cut_that_is_w_plus_the_cut_update(lora_lab: Run, name: str):
    make, settings = CONFIGS[name]
    adapted = peft_folder(make(), **settings).eval()
    code, printed = lora_lab("cut", "adapter", "--rank", "2", "--to", "small")
    assert code == 0, printed
    # Each layer's B A is replaced by its nearest matrix of rank 2 in PEFT's own model.
    for module in lora_layers(adapted).values():
        if "default" in module.lora_embedding_A:
            A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        product, r = nearest(B @ A, 2), len(A)
        U, S, Vh = torch.linalg.svd(product)
        B.data.copy_((U[:, :r] * S[:r]).float())
        A.data.copy_(Vh[:r].float())
    small = loaded(make(), "small")
    torch.testing.assert_close(small(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-5, atol=1e-5)
    for key, tensor in load_file("small/adapter_model.safetensors").items():
        if "lora_A" in key or "lora_embedding_A" in key:
            assert len(tensor) == 2
    before, after = (
        sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for folder in ("adapter", "small")
    )
    assert f"bytes    {before:,} → {after:,}" in printed


@torch.no_grad()
def test_energy_gives_each_site_its_rank(lora_lab: Run):
    adapted = peft_folder(llama())
    assert lora_lab("cut", "adapter", "--energy", ".8", "--to", "small")[0] == 0
    with open("small/sites.csv") as file:
        rows = {row["site"]: row for row in csv.DictReader(file)}
    ranks = set()
    for name, module in lora_layers(adapted).items():
        sigma = np.linalg.svd(module.get_delta_weight("default"), compute_uv=False)
        share = np.cumsum(sigma**2) / np.sum(sigma**2)
        k = 1 + int(np.sum(share < 0.8))
        ranks.add(k)
        row = rows[name.removeprefix("base_model.model.")]
        assert row["rank"] == (f"4 → {k}" if k < 4 else "4")
        assert abs(float(row["kept"].rstrip("%")) / 100 - share[k - 1]) < 1e-4
    assert len(ranks) > 1
    loaded(llama(), "small")(TOKENS)


def test_intruders_are_scaled_as_peft_scales_them(lora_lab: Run):
    adapted = peft_folder(llama()).eval()
    save_file({k: v.clone() for k, v in llama().state_dict().items()}, "base.safetensors")
    arguments = ["--scale-intruders", "0.25", "--base", "base.safetensors", "--to", "mild"]
    code, printed = lora_lab("cut", "adapter", *arguments)
    assert code == 0, printed
    reduce_intruder_dimension(adapted, mitigation_lambda=0.25, logging_sink=None)
    mild = loaded(llama(), "mild")
    ours = lora_layers(mild)
    for name, module in lora_layers(adapted).items():
        theirs = module.get_delta_weight("intruder_reduced")
        delta = ours[name].get_delta_weight("default")
        torch.testing.assert_close(delta, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "pissa", "lora_xs", "dora", "lora_fa", "rslora"])
def test_a_runs_adapter_is_cut_and_loads(lab: Lab, lora_lab: Run, adapter: str):
    assert lab("shift", "adapter.r=4", f"adapter={adapter}") == 0
    run = only_run().path
    code, printed = lora_lab("cut", str(run), "--rank", "1", "--to", "small")
    assert code == 0, printed
    (base,) = Path("bases").glob("*.safetensors")
    deltas = []
    for folder in (run / "adapter", Path("small")):
        model = nn.ModuleDict({"linear": nn.Linear(12, 9, bias="linear.bias" in load_file(base))})
        model.load_state_dict(load_file(base))
        adapters.load(model, folder)
        (attached,) = adapters.attached(model).values()
        A, B = attached.factors()
        deltas.append((attached.scale * B @ A).detach())
    assert np.linalg.matrix_rank(deltas[1].numpy(), tol=1e-5) == 1
    torch.testing.assert_close(deltas[1].double(), nearest(deltas[0], 1), rtol=1e-4, atol=1e-5)


def test_advice_is_that_of_the_run(lab: Lab, lora_lab: Run):
    assert lab("digits", "adapter.r=4") == 0
    run = only_run().path
    ranks = yaml.safe_load((run / "advice.yaml").read_text())["adapter"]["rank_pattern"]
    code, printed = lora_lab("cut", str(run), "--advice", "--to", "small")
    assert code == 0, printed
    tensors = load_file("small/adapter.safetensors")
    assert {key[:-2]: len(t) for key, t in tensors.items() if key.endswith(".A")} == ranks


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_peft_loads_what_is_extracted(lora_lab: Run, make: Callable[[], Any]):
    before, after = make(), make()
    for parameter in after.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    before.save_pretrained("before")
    after.save_pretrained("after", max_shard_size="8KB")
    assert Path("after/model.safetensors.index.json").exists()
    code, printed = lora_lab("extract", "--before", "before", "--after", "after", "--rank", "3")
    assert code == 0, printed
    expected, held, total = make(), 0.0, 0.0
    for name, module in expected.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            change = after.get_parameter(key) - parameter
            total += change.square().sum().item()
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and change.dim() == 2:
                cut = nearest(change, 3)
                held += cut.square().sum().item()
                parameter.add_(cut)
    theirs = loaded(make(), "extracted")
    torch.testing.assert_close(theirs(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert f"{held / total:.2%} of ‖W − W₀‖² over all" in printed
    assert "of one dimension, with the norm of their change" in printed


@torch.no_grad()
def test_what_an_adapter_cannot_hold_is_said(lora_lab: Run):
    before: dict[str, Tensor] = {
        "fc.weight": torch.zeros(6, 4),
        "tok_embeddings.weight": torch.zeros(9, 4),
        "conv.weight": torch.zeros(6, 4, 3),
        "experts": torch.zeros(2, 4, 4),
    }
    after = {key: torch.randn_like(tensor) for key, tensor in before.items()}
    save_file(before, "before.safetensors")
    save_file(after, "after.safetensors")
    given = ["--before", "before.safetensors", "--after", "after.safetensors"]
    code, printed = lora_lab("extract", *given, "--energy", "1")
    assert code == 0, printed
    assert "not held experts: it is no layer's `weight`" in printed
    assert "layers are told by their names" in printed
    tensors = load_file("extracted/adapter_model.safetensors")
    prefix = "base_model.model."
    A, B = (tensors[f"{prefix}tok_embeddings.lora_embedding_{part}"] for part in "AB")
    torch.testing.assert_close((B @ A).T, after["tok_embeddings.weight"])
    A, B = (tensors[f"{prefix}conv.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(B.flatten(1) @ A.flatten(1), after["conv.weight"].flatten(1))
