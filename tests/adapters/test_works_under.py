"""Adapters under torch.compile, autocast, checkpointing, vmap, torch's fast path, DDP and FSDP.

The truth is the same model in a plain forward pass, or in one process.

Run: make test ARGS=tests/adapters/test_works_under.py
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lab import adapters
from tests.adapters import two_processes
from tests.adapters.cases import Case, cases_where, every_layer, move, trained
from tests.adapters.two_processes import everything, step

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], ["all"]], ids=str)
@pytest.mark.slow
def test_compile_without_a_graph_break(options: list[str]):
    """In another process: the type checks of the tests' import hook cannot be compiled."""
    command = [sys.executable, "-m", "tests.adapters.compiled", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@every_layer
def test_autocast(case: Case):
    model = case.build(dtype=torch.float32)
    x = tuple(one.float() if one.is_floating_point() else one for one in case.inputs())
    exact = model(*x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*x)
        plain = case.plain(torch.float32)(*x)
    assert y.dtype == plain.dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in trained(model))


@pytest.mark.parametrize(
    ("target", "tied"), [("embedding", False), ("linear", False), ("it", True)]
)
@pytest.mark.parametrize("size", [60, 40])
def test_resizing_a_table_with_an_adapter_is_an_error(target: str, tied: bool, size: int):
    """transformers would copy W + ΔW into a new layer without an adapter, or overwrite W."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=50, tie_word_embeddings=tied)
    model, x = LlamaForCausalLM(config), torch.tensor([[1, 2, 3]])
    targets = {"it": adapters.Target("embedding", tied=True)} if tied else target
    adapters.attach(model, targets, r=2)
    move(model)
    y = model(x).logits
    with pytest.raises(adapters.AdapterError, match="Resize a model's embeddings before attach"):
        model.resize_token_embeddings(size, mean_resizing=False)
    assert torch.equal(model(x).logits, y)
    adapters.detach(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model(x).logits.shape[-1] == size


def test_checkpointing_without_reentry():
    model, x = everything(), torch.randn(4, 5).double()
    plain = torch.autograd.grad(model(x).square().sum(), trained(model))
    y = checkpoint(model, x, use_reentrant=False)
    assert isinstance(y, Tensor)
    again = torch.autograd.grad(y.square().sum(), trained(model))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


NO_VMAP = ("lstm", "gru")
"""Layers that torch itself cannot batch over their weights."""


@cases_where(lambda case: case.variant == "lora" and case.layer.name in NO_VMAP)
def test_vmap_is_not_for_plain_recurrent_layers_either(case: Case):
    plain, x = case.plain(), case.inputs()
    stacked = {key: torch.stack([value, value]) for key, value in plain.named_parameters()}
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda parameters: functional_call(plain, parameters, x))(stacked)


@cases_where(lambda case: case.variant == "lora" and case.layer.name not in NO_VMAP)
def test_vmap_over_adapters_of_one_base(case: Case):
    """What packing does: many adapters, one base and one batch."""
    models = [case.build() for _ in range(3)]
    for seed, model in enumerate(models):
        move(model, seed=seed)
    x = case.inputs()
    stacked = {
        key: torch.stack([dict(m.named_parameters())[key] for m in models])
        .detach()
        .requires_grad_()
        for key, p in models[0].named_parameters()
        if p.requires_grad
    }
    base = models[0]

    def one_run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(base, parameters, x)

    y = vmap(one_run)(stacked)
    alone = [model(*x) for model in models]
    torch.testing.assert_close(y, torch.stack(alone), rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for i, model in enumerate(models):
        alone[i].square().sum().backward()
        for key, value in stacked.items():
            grad, expected = value.grad, dict(model.named_parameters())[key].grad
            if expected is not None:
                assert grad is not None
                torch.testing.assert_close(grad[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("targets", ["all", "linear", "attention"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_eval_fast_path_of_a_transformer_encoder_sees_the_adapters(targets: str, masked: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    adapters.attach(model, targets, r=2, alpha=2)
    base = model.eval()(torch.zeros(1, 2, 16))
    move(model)
    x = torch.randn(2, 3, 16)
    mask = torch.tensor([[False, False, False], [False, False, True]]) if masked else None
    with torch.no_grad():
        fast = model.eval()(x, src_key_padding_mask=mask)
        slow = model.train()(x, src_key_padding_mask=mask)
        keep = ~mask if mask is not None else torch.ones(2, 3, dtype=torch.bool)
        torch.testing.assert_close(fast[keep], slow[keep], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model.eval()(torch.zeros(1, 2, 16)), base)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path):
    """Half the batch in each of two gloo processes gives the step of the full batch."""
    mp.spawn(two_processes.work, (str(tmp_path),), nprocs=2)  # pyright: ignore
    for way, targets in two_processes.WAYS.items():
        model = everything(targets)
        torch.manual_seed(1)
        step(model, trained(model), torch.randn(4, 5).double())
        expected, got = adapters.adapter_state_dict(model), torch.load(tmp_path / f"{way}.pt")
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-12)
