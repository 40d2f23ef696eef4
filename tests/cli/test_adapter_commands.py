"""`lora-lab cut`: what it writes.

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
    """The nearest matrix of rank k, by numpy; of a stack that of each."""
    U, S, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[..., :k] * S[..., None, :k]) @ Vh[..., :k, :])


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
