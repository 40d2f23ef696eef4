"""What trains in full, in PEFT's folders and from them: modules_to_save, and bias.

The truth is PEFT itself: its models from our folders, and the outputs of models that it saved.

Run: make test ARGS=tests/adapters/test_peft_in_full.py
"""

import copy
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Target
from lora_lab.adapters.peft import load_peft, save_peft

TOKENS = torch.tensor([[3, 5, 9, 0], [1, 1, 8, 4]])
QUERY = {"query": Target(match="*.query")}


@cache
def _bert() -> nn.Module:
    torch.default_generator.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    config = BertConfig(**size, num_attention_heads=2, vocab_size=11, max_position_embeddings=8)
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # Biases are zero and norms one otherwise, and a mistake could hide.
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model.eval()


def bert() -> Any:
    return copy.deepcopy(_bert())


@torch.no_grad()
def move(model: nn.Module) -> None:
    torch.default_generator.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.5 * torch.randn_like(parameter)


@torch.no_grad()
def output(model: Any) -> Tensor:
    y = model(TOKENS)
    return y if isinstance(y, Tensor) else y.logits


def attached(globs: list[str], targets: Any = None, model: Any = None, **how: Any) -> Any:
    model = model or bert()
    adapters.attach(model, QUERY if targets is None else targets, r=2, alpha=3,
                    also_train=globs, **how)  # fmt: skip
    move(model)
    return model


def in_peft(folder: Path, base: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base or bert(), str(folder)).eval()


LAST, NORM = "bert.encoder.layer.1", "bert.encoder.layer.0.output.LayerNorm"
WAYS: dict[str, tuple[list[str], Any, dict[str, Any]]] = {
    "head": (["classifier"], QUERY, {"modules_to_save": ["classifier"], "bias": "none"}),
    "norms": (["*.LayerNorm"], QUERY, {"bias": "none"}),
    "a norm's weight": ([f"{NORM}.weight"], QUERY, {"modules_to_save": [NORM], "bias": "none"}),
    "all biases": (["bias"], QUERY, {"modules_to_save": None, "bias": "all"}),
    "biases of what is adapted": (["*.query.bias"], QUERY, {"bias": "lora_only"}),
    "all biases, all adapted": (["bias"], "linear", {"bias": "all"}),
    "head and biases": (["classifier", "bias"], QUERY, {"modules_to_save": ["classifier"],
                                                        "bias": "all"}),
    "embeddings": (["*.word_embeddings", "bert.pooler"], QUERY, {"bias": "none"}),
    "a block": ([LAST], {"q": Target(match="*.0.*.query")}, {"bias": "none"}),
    "no adapter": (["classifier", "*.LayerNorm"], {}, {"bias": "none"}),
}  # fmt: skip


@pytest.mark.parametrize(("globs", "targets", "config"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_our_folders_in_peft_and_back(
    globs: list[str], targets: Any, config: dict[str, Any], dora: bool, tmp_path: Path
):
    ours = attached(globs, targets, dora=dora)
    y = output(ours)
    assert (y - output(bert())).abs().max() > 1e-2
    save_peft(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: written[key] for key in config} == config
    # PEFT sums DoRA's norms otherwise.
    bound = 1e-5 if dora else 1e-6
    torch.testing.assert_close(output(in_peft(tmp_path)), y, rtol=bound, atol=bound)
    fresh = bert()
    load_peft(fresh, tmp_path)
    assert torch.equal(output(fresh), y)
    values = adapters.also_trained(fresh)
    for key, parameter in adapters.also_trained(ours).items():
        assert torch.equal(values[key].value, parameter.value)


PEFTS: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["classifier"]},
    "task_type": {"task_type": "SEQ_CLS"},
    "norms": {"modules_to_save": ["LayerNorm"]},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "both": {"modules_to_save": ["classifier", "pooler"], "bias": "all"},
    "dora": {"modules_to_save": ["classifier"], "bias": "all", "use_dora": True},
}


@pytest.mark.parametrize("config", PEFTS.values(), ids=PEFTS)
def test_folders_that_peft_saved(config: dict[str, Any], tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bias="all": the adapter cannot be switched off
        config = {"r": 2, "lora_alpha": 3, "target_modules": ["query"], **config}
        theirs = get_peft_model(bert(), LoraConfig(**config)).eval()
    move(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = bert()
    load_peft(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    count, trained = adapters.count(ours), (p for p in theirs.parameters() if p.requires_grad)
    assert count.trainable + count.also_trained == sum(p.numel() for p in trained)


def test_a_task_type_for_auto_peft_model(tmp_path: Path):
    """With a task_type PEFT asks for the head's tensors, trained or not."""
    base = bert()
    base.save_pretrained(str(tmp_path / "base"))
    ours = attached([])
    save_peft(ours, tmp_path, task_type="SEQ_CLS", base_model=str(tmp_path / "base"))
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-6, atol=1e-6)


class Net(nn.Module):
    """Names that end alike, a bare parameter, and a norm with statistics."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(4))
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block["norm"](self.block["fc"](x + self.start)).tanh())


def net() -> Net:
    torch.default_generator.manual_seed(0)
    return Net().eval()


def test_names_that_end_alike(tmp_path: Path):
    """PEFT compares the end of names: `fc` alone would take `block.fc`, and its adapter, too."""
    ours, x = net(), torch.randn(3, 4)
    attached(["fc", "block.norm"], {"fc": Target(match="block.fc")}, ours)
    save_peft(ours, tmp_path)
    torch.testing.assert_close(in_peft(tmp_path, net())(x), ours(x))
    fresh = net()
    load_peft(fresh, tmp_path)
    assert torch.equal(fresh(x), ours(x))
    assert adapters.also_trained(fresh).keys() == {
        "fc.weight", "fc.bias", "block.norm.weight", "block.norm.bias"}  # fmt: skip


def test_what_peft_cannot_hold(tmp_path: Path):
    bare = attached(["start"], {"fc": Target(match="fc")}, net())
    inside: Any = net()
    inside.block = nn.TransformerEncoderLayer(4, 2, 8)
    inside.block.gain = nn.Parameter(torch.ones(4))
    attached(["block.gain"], {"a": Target(match="*.linear1")}, inside)
    for model, how, says in (
        (bare, {}, "start: of the model itself, and PEFT trains modules of a model"),
        (inside, {}, r"'block': PEFT trains all of this module.*adapter in it \(block\.linear1\)"),
    ):
        with pytest.raises(AdapterError, match=f"PEFT cannot hold this adapter: {says}"):
            save_peft(model, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_the_head_of_a_task(tmp_path: Path):
    """PEFT trains all of a SEQ_CLS model's classifier in full, unless there is no task_type."""
    ours = attached([], "linear")
    save_peft(ours, tmp_path, task_type="SEQ_CLS")
    torch.testing.assert_close(output(in_peft(tmp_path)), output(ours))


def test_statistics_that_peft_moved_are_not_loaded(tmp_path: Path):
    config = LoraConfig(r=1, target_modules=["block.fc"], modules_to_save=["norm"])
    theirs = get_peft_model(net(), config)
    theirs.train()(torch.randn(5, 4))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"norm\.running_mean is not this model's 'block\.norm"):
        load_peft(net(), tmp_path)


def test_tensors_of_another_shape(tmp_path: Path):
    save_peft(attached(["classifier"]), tmp_path)
    other = bert()
    other.classifier = nn.Linear(12, 3)
    with pytest.raises(AdapterError, match=r"classifier\.weight has shape \[2, 12\], this model's"):
        load_peft(other, tmp_path)
