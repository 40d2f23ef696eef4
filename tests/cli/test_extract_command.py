"""`lora-lab extract`: what it writes and prints.

Independent truth: numpy's SVD of W − W₀, and PEFT, which loads what is written. The formats, kinds
of layers and tied weights: tests/analysis/test_extract.py.
Run: make test ARGS=tests/cli/test_extract_command.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.cli.conftest import Run
from tests.cli.peft_folders import gpt2, llama
from tests.cli.test_adapter_commands import TOKENS, loaded, nearest


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
    assert "not held experts: PEFT cannot adapt this weight of UnknownModule" in printed
    assert "layers are told by their names" in printed
    tensors = load_file("extracted/adapter_model.safetensors")
    prefix = "base_model.model."
    A, B = (tensors[f"{prefix}tok_embeddings.lora_embedding_{part}"] for part in "AB")
    torch.testing.assert_close((B @ A).T, after["tok_embeddings.weight"])
    A, B = (tensors[f"{prefix}conv.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(B.flatten(1) @ A.flatten(1), after["conv.weight"].flatten(1))
