"""Adapters on q, k and v of a fused layer, each by itself.

Truth: the fused weight plus the products of each block's factors, added up by hand; PEFT on the
exported folder; the count that LLMs-from-scratch prints for a GPT-2 whose q, k and v are layers of
their own. Run: make test ARGS=tests/adapters/test_blocks.py
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from lora_lab import adapters
from lora_lab.adapters.pack import Pack
from lora_lab.adapters.target import Target, TargetError

QKV = Target(kind="linear", match="*.c_attn.weight_?")
REST = Target(kind="linear", exclude="*.c_attn")
EACH = {"linear": REST, "qkv": QKV}


def gpt2(seed: int = 0, **sizes: Any) -> Any:
    """A GPT-2 of two layers, in float64, that classifies by the last token."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**{**small, **dropouts, **sizes}, pad_token_id=0)
    torch.manual_seed(seed)
    return transformers.GPT2ForSequenceClassification(config).double()


def attach(model: Any, targets: Any = EACH, **settings: Any) -> Any:
    """The model with adapters of which no tensor is zero."""
    adapters.attach(model, targets, **{"r": 2, "alpha": 6, **settings})
    torch.manual_seed(1)
    for adapter in adapters.attached(model).values():
        for tensor in adapter.tensors().values():
            tensor.normal_(std=0.3)
    return model


TOKENS = torch.arange(1, 25).view(3, 8)


def test_each_block_changes_its_own_columns_of_the_weight():
    model = attach(gpt2(), {"qv": Target(match="*.c_attn.weight_[qv]")}, dropout=0.5).eval()
    expected = gpt2().eval()
    for i in range(2):
        weight = expected.transformer.h[i].attn.c_attn.weight.data  # (in 32, out 96)
        for block, start in (("q", 0), ("v", 64)):
            adapter: Any = adapters.attached(model)[f"transformer.h.{i}.attn.c_attn.weight_{block}"]
            assert (adapter.A.shape, adapter.B.shape) == ((2, 32), (32, 2))
            weight[:, start : start + 32] += 3 * (adapter.B @ adapter.A).T
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, expected(TOKENS).logits, atol=1e-12)
        before = model(TOKENS).logits
        weight = model.transformer.h[0].attn.c_attn.weight
        assert torch.allclose(weight, expected.transformer.h[0].attn.c_attn.weight, atol=1e-12)
        adapters.merge(model)
        assert torch.allclose(model(TOKENS).logits, before, atol=1e-12)
        adapters.unmerge(model)
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("settings", [{}, {"init": "pissa"}, {"form": "vera"}, {"form": "loha"}])
def test_a_folder_and_pefts_folder_give_the_same_outputs(tmp_path: Path, settings: dict[str, Any]):
    targets = {"linear": REST, "qkv": QKV} if settings.get("form") is None else {"qkv": QKV}
    model = attach(gpt2(), targets, **settings).eval()
    adapters.save(model, tmp_path / "ours")
    adapters.save_peft(model, tmp_path / "peft")
    again = gpt2().eval()
    adapters.load(again, tmp_path / "ours")
    peft = PeftModel.from_pretrained(gpt2().eval(), tmp_path / "peft").eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.equal(again(TOKENS).logits, expected)
        assert torch.allclose(peft(TOKENS).logits, expected, atol=1e-12)
        joined = gpt2().eval()
        adapters.load_peft(joined, tmp_path / "peft")
        assert torch.allclose(joined(TOKENS).logits, expected, atol=1e-12)


def test_a_pack_gives_what_each_run_gives():
    runs = [attach(gpt2(), r=r, alpha=a) for r, a in ((1, 3), (2, 1), (2, 8))]
    pack = Pack(gpt2(), [adapters.attached(run) for run in runs])
    outputs = pack(TOKENS)
    for run, output in zip(runs, outputs, strict=True):
        assert torch.allclose(run(TOKENS).logits, output, atol=1e-12)
    outputs.square().sum().backward()
    stacked = pack.stacks[0][1].adapter.A.grad
    alone = copy.deepcopy(runs[0])
    alone(TOKENS).logits.square().sum().backward()
    first: Any = next(iter(adapters.attached(alone).values()))
    assert torch.allclose(stacked[0][:1], first.A.grad, rtol=1e-10)


def trainable(targets: Any) -> int:
    """The numbers that train in a GPT-2 of 124M parameters with 2 classes and r = 16."""
    config: Any = transformers.GPT2Config()
    config.num_labels = 2
    with torch.device("meta"):
        model = transformers.GPT2ForSequenceClassification(config)
    assert sum(p.numel() for p in model.parameters()) == 124_441_344  # the head has no bias
    recipe = adapters.Recipe(r=16, alpha=16)
    sites = adapters.find_sites(model, targets, recipe, over_rank="allow")
    return sum(site.trainable_parameters for site in sites)


def test_the_counts_on_gpt2_are_the_published_ones():
    assert trainable(EACH) == 2_666_528
    # One A for q, k and v: two A of 16 × 768 less in each of the 12 layers.
    assert trainable("linear") == 2_666_528 - 12 * 2 * 16 * 768 == 2_371_616


def test_blocks_are_picked_by_globs_that_fit_them_alone():
    layers = {name for name, m in gpt2().named_modules() if type(m).__name__ == "Conv1D"}
    names = [s.name for s in adapters.find_sites(gpt2(), {"all": Target(kind="linear")})]
    assert set(names) == layers | {"score"}
    of_attention = {"attention": Target(kind="attention", match=["*", "*.c_attn.weight_q"])}
    assert not any("weight_" in s.name for s in adapters.find_sites(gpt2(), of_attention))
    each = [
        s.name for s in adapters.find_sites(gpt2(), EACH) if s.name.startswith("transformer.h.0")
    ]
    blocks = [f"transformer.h.0.attn.c_attn.weight_{block}" for block in "qkv"]
    assert each[:4] == [*blocks, "transformer.h.0.attn.c_proj"]


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (
            {"linear": Target(kind="linear"), "q": Target(match="*.c_attn.weight_q")},
            {},
            r"c_attn' is picked by the target 'linear', and its block .*weight_q' by 'q'",
        ),
        ({"q": Target(match="*.c_attn.weight_[qv]")}, {"dora": True}, "dora=true: .*weight_q"),
        ({"q": Target(match="*.c_attn.weight_x")}, {}, "nearest names: .*c_attn"),
    ],
)
def test_what_cannot_be(targets: Any, settings: dict[str, Any], message: str):
    with pytest.raises(adapters.AdapterError, match=message):
        adapters.attach(gpt2(), targets, r=1, **settings)


def test_other_layers_have_no_blocks():
    fused = nn.ModuleDict({"c_attn": nn.Linear(4, 12)})
    with pytest.raises(TargetError):
        adapters.attach(fused, {"q": Target(match="*weight_q")}, r=1)
