"""`lora-lab extract`: what it writes and prints.

Independent truth: numpy's SVD of W − W₀, and PEFT, which loads what is written. The formats, kinds
of layers and tied weights: tests/analysis/test_extract.py.
Run: make test ARGS=tests/cli/test_extract_command.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_lab import adapters
from tests.cli.conftest import Run
from tests.cli.peft_folders import gpt2, llama, mixtral
from tests.cli.test_adapter_commands import TOKENS, loaded, nearest
from tests.vision import use_torchvision


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
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
    for key, parameter in expected.named_parameters():
        change = after.get_parameter(key) - parameter
        total += change.square().sum().item()
        if change.dim() > 1:
            cut = nearest(change, 3)  # of each expert, where the parameter is of experts
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
    assert "not held experts: its name does not tell what layer it is of" in printed
    assert "--format lora_lab holds experts\n" in printed
    assert "layers are told by their names" in printed
    tensors = load_file("extracted/adapter_model.safetensors")
    prefix = "base_model.model."
    A, B = (tensors[f"{prefix}tok_embeddings.lora_embedding_{part}"] for part in "AB")
    torch.testing.assert_close((B @ A).T, after["tok_embeddings.weight"])
    A, B = (tensors[f"{prefix}conv.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(B.flatten(1) @ A.flatten(1), after["conv.weight"].flatten(1))


@torch.no_grad()
def test_what_is_printed(lora_lab: Run):
    for name in ("before", "after"):
        model = llama(layers=1, tie_word_embeddings=True)
        if name == "after":
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(name)
    given = ["extract", "--before", "before", "--after", "after"]
    code, printed = lora_lab(*given, "--rank", "20")
    assert code == 0, printed
    assert "model.embed_tokens shares its adapter with lm_head.weight" in printed
    assert "--rank 20 exceeds the rank of 8 of 8 weights, where r is the weight's" in printed
    assert "in PEFT's format" in printed
    code, printed = lora_lab(*given, "--rank", "9", "--format", "lora_lab", "--to", "ours")
    assert code == 0, printed
    assert "in our format" in printed
    assert "--rank 9 exceeds the rank of 2 of 8 weights" in printed  # 8 rows: k_proj, v_proj
    assert "shares its adapter" not in printed
    model = llama(layers=1, tie_word_embeddings=True)
    adapters.load(model, "ours")
    assert adapters.attached(model)["model.layers.0.self_attn.k_proj"].r == 8
    code, printed = lora_lab(*given, "--rank", "1", "--format", "kohya", "--to", "no")
    assert code == 2
    assert "argument --format: invalid choice: 'kohya' (choose from" in printed


@torch.no_grad()
def test_a_folder_of_timm_is_read_by_timm(lora_lab: Run):
    use_torchvision()
    timm: Any = pytest.importorskip("timm")
    sizes: dict[str, Any] = {"num_classes": 3, "embed_dim": 12, "depth": 1, "num_heads": 2}
    sizes |= {"img_size": 32, "patch_size": 16}
    states = {}
    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        states[name] = timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()
        Path(name).mkdir()
        save_file(states[name], f"{name}/model.safetensors")
        about = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": sizes}
        Path(name, "config.json").write_text(json.dumps(about | {"pretrained_cfg": {}}))
    given = ["extract", "--before", "before", "--after", "after", "--format", "lora_lab"]
    code, printed = lora_lab(*given, "--rank", "1000")
    assert code == 0, printed
    assert "told by their names" not in printed
    torch.manual_seed(0)
    model, after = timm.create_model("vit_tiny_patch16_224", **sizes), states["after"]
    adapters.load(model, "extracted")
    adapters.merge(model)
    assert adapters.attached(model)["patch_embed.proj"].kind == "conv"
    for key, weight in model.state_dict().items():
        if key in after and weight.dim() > 1:
            torch.testing.assert_close(weight, after[key], rtol=1e-5, atol=1e-5)
