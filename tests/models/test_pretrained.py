"""Models of transformers with their weights, from a folder.

Independent truth: transformers' own from_pretrained, autograd without checkpoints, and a file too
large to be read.

Run: make test ARGS=tests/models/test_pretrained.py
"""

import json
import shutil
import struct
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_lab.models.pretrained import load_weights, new_parameters, pretrained
from lora_lab.models.transformers_config import HEADS, config_of
from lora_lab.training.pretrained_base import draw_new
from tests.tiny_models import tiny_model

CASES = {
    # family, head of the saved model, head that is asked for → the new parameters
    ("bert", "masked", "classification"): [
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
        *("classifier.weight", "classifier.bias"),
    ],
    ("roberta", "masked", "tokens"): ["classifier.weight", "classifier.bias"],
    ("roberta", "masked", "masked"): [],
    ("gpt2", "language", "language"): [],
    ("gpt2", "language", "classification"): ["score.weight"],
    ("llama", "language", "language"): [],
    ("qwen3", "language", "language"): [],
    ("t5", "seq2seq", "seq2seq"): [],
    ("vit", "none", "image"): ["classifier.weight", "classifier.bias"],
}


def on_meta(*arguments: Any, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return pretrained(*arguments, **settings)


@pytest.mark.parametrize(("family", "saved", "head"), CASES)
def test_weights_are_those_that_transformers_loads(family: str, saved: str, head: Any):
    tiny_model(family, "model", saved)
    classes = 3 if HEADS[head].has_labels else None
    stream = torch.get_rng_state()
    new = new_parameters(on_meta("model", head, classes), "model")
    model = load_weights("model", head, classes)
    assert torch.equal(stream, torch.get_rng_state())
    assert new == CASES[family, saved, head]
    auto = getattr(transformers, HEADS[head].auto_class)
    labels = {"num_labels": 3} if classes else {}
    reference = auto.from_pretrained("model", dtype=torch.float32, **labels).state_dict()
    state = model.state_dict()
    assert list(state) == list(reference)
    assert len(state) > len(new)
    for key in state.keys() - set(new):
        assert torch.equal(state[key], reference[key]), key


def test_new_parameters_are_found_without_reading_a_weight():
    sizes: Any = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8}
    config = transformers.LlamaConfig(**sizes, vocab_size=32000)
    config.save_pretrained("large")
    model = on_meta("large", "classification", 2)
    header, end = {}, 0
    for key, tensor in model.state_dict().items():
        if key != "score.weight":
            bounds = [end, end := end + 4 * tensor.numel()]
            header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": bounds}
    text = json.dumps(header).encode()
    with Path("large/model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 6e9  # 6 GB, which take no space on the disk
    before = getrusage(RUSAGE_SELF).ru_maxrss
    assert new_parameters(model, "large") == ["score.weight"]
    assert getrusage(RUSAGE_SELF).ru_maxrss < before + 300_000  # KiB


def test_a_new_head_is_drawn_by_the_seed_alone():
    tiny_model("roberta", "model", "masked")
    model = load_weights("model", "classification", 3)
    names = new_parameters(model, "model")
    draws = []
    for seed in (0, 0, 1, None):
        torch.rand(7)
        draws.append(draw_new(model, names, seed))
    torch.manual_seed(0)
    one, same, other, shared = draws
    for name in names:
        assert torch.equal(one[name], same[name])
        assert name.endswith("bias") or not torch.equal(one[name], other[name])
        assert name.endswith("bias") or not torch.equal(one[name], shared[name])
    large = load_weights("model", "classification", 3000)
    values = draw_new(large, ["classifier.out_proj.weight"], 0)["classifier.out_proj.weight"]
    assert values.std().item() == pytest.approx(large.config.initializer_range, rel=0.02)  # pyright: ignore


def test_a_head_of_another_size_is_an_error_or_drawn_anew():
    tiny_model("bert", "model", "classification", num_labels=3)
    assert new_parameters(on_meta("model", "classification", 3), "model") == []
    with pytest.raises(ValueError, match=r"classifier.bias is 3 in the file, and 2 with this data"):
        new_parameters(on_meta("model", "classification", 2), "model")
    for classes in (2, 3):
        model = on_meta("model", "classification", classes)
        names = new_parameters(model, "model", new_head=True)
        assert names == ["classifier.weight", "classifier.bias"]
        loaded = load_weights("model", "classification", classes, new_head=True)
        assert loaded.get_parameter("classifier.weight").shape == (classes, 32)


def test_generate_uses_its_cache_and_training_does_not():
    tiny_model("llama", "model", "language")
    model: Any = load_weights("model", "language").eval()
    tokens = torch.tensor([[7, 9, 11]])
    assert model(tokens).past_key_values is None
    calls = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert calls == [3, 1, 1, 1]
    for n in range(3, 7):
        assert generated[0, n] == model(generated[:, :n]).logits[0, -1].argmax()


def test_gradient_checkpointing_changes_no_gradient():
    tiny_model("gpt2", "model", "language")
    tokens, gradients = torch.arange(7, 15)[None], []
    for checkpointing in (False, True):
        model: Any = load_weights("model", "language", gradient_checkpointing=checkpointing)
        model.requires_grad_(False)
        weight = model.transformer.h[0].attn.c_attn.weight.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.numel()) or tensor,
            lambda tensor: tensor,
        ):
            loss = model(tokens).logits.square().sum()
        loss.backward()
        gradients.append((weight.grad, sum(saved)))
    (plain, stored), (checkpointed, fewer) = gradients
    torch.testing.assert_close(checkpointed, plain)
    assert fewer < stored


def test_dropout_replaces_every_dropout_of_the_config():
    tiny_model("bert", "model", "none")
    model = pretrained("model", "classification", 2, dropout=0.0)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert {m.p for m in pretrained("model", "tokens", 2).modules() if hasattr(m, "p")} == {0.1}
    tiny_model("llama", "llama", "none")  # its head for tokens has a rate that no config has
    model = pretrained("llama", "tokens", 2, dropout=0.0)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_dropout_leaves_out_no_whole_layers():
    config = transformers.OPTConfig(layerdrop=0.25, vocab_size=40)
    config.save_pretrained("model")
    config = config_of("model", "language", None, None, False, dropout=0.1)
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.1, 0.1, 0.25)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_classifier_reads_the_last_token_before_the_padding(family: str):
    tiny_model(family, "model", "none", pad_token_id=None)
    model: Any = load_weights("model", "classification", 3, pad_token_id=0).eval()
    row = torch.randint(7, 40, (1, 6))
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(row).logits)


BAD = {
    "folder": (["./modle", "masked"], "path=./modle: there is no such folder; nearest: ./model"),
    "no config": (["empty", "classification", 2], "path=empty: the folder has no config.json"),
    "below": ([".", "masked"], r"path=\.: .* no config.json.*; nearest: code"),
    "no model": (["other", "masked"], "path=other: no model of transformers"),
    "head": (["model", "seq2seq"], r"head=seq2seq: bert \(model\) has no such head; it has class"),
    "tokens": (["model", "masked", 50], "path=model: it knows 40 tokens, and data.tokenizer has"),
    "code": (["code", "masked"], "path=code: it holds Python code, which model.remote_code=true"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case: str):
    tiny_model("bert", "model", "masked")
    for folder, config in (("other", {"a": 1}), ("code", {"auto_map": {"AutoConfig": "c.C"}})):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps(config))
    Path("empty").mkdir()
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        on_meta(*arguments)


@pytest.mark.parametrize("case", ["missing", "damaged", "another"])
def test_bad_weights(case: str):
    tiny_model("bert", "model", "masked")
    file = Path("model/model.safetensors")
    if case == "missing":
        file.unlink()
    elif case == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tiny_model("gpt2", "other", "language")
        shutil.copy("other/model.safetensors", file)
    message = {"missing": "no file named", "damaged": "cannot be read", "another": "none of the"}
    with pytest.raises(ValueError, match=f"path=model: .*{message[case]}"):
        new_parameters(on_meta("model", "masked"), "model")
