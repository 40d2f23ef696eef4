"""Mixtures in PEFT's folders, whose experts PEFT adapts as parameters (target_parameters).

The truth is PEFT itself: its models from the folders that are written here, and the folders that it
writes.

Run: make test ARGS=tests/adapters/test_peft_experts.py
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Target
from lora_lab.adapters.peft import load_peft, save_peft
from lora_lab.adapters.peft_parameters import is_held_as_parameter, reason_no_parameter, targeted
from tests.adapters import zoo
from tests.adapters.cases import LoopedExperts
from tests.adapters.test_experts import MIXTURES, moved

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
]


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


EVERY: Any = {
    "experts": Target("experts"),
    "linear": Target("linear", exclude="lm_head", r=3, alpha=2.0),
    "routers": Target("weight", r=1),
}
"""Experts, linear layers (also those that PEFT takes for experts by their names), and routers."""
OURS: dict[str, Any] = {
    "experts": "experts",
    "all": EVERY,
    "one parameter": {"down": Target("experts", match="*.1.*down_proj")},
    "rslora": {"experts": Target("experts"), "attention": Target("attention")},
    "patterns": "experts",
    "pissa": "experts",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"scaling": "alpha/sqrt(r)", "dropout": 0.1},
    "patterns": {"rank_pattern": {"*.1.*down_proj": 1}, "alpha_pattern": {"*gate_up*": 5.0}},
    "pissa": {"init": "pissa"},
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("all", name) for name in MIXTURES),
        *(("experts", "mixtral"), ("one parameter", "gpt_oss"), ("rslora", "deepseek_v3")),
        *(("patterns", "qwen3_moe"), ("pissa", "gpt_oss")),
    ],
)
def test_a_mixture_loads_in_peft_and_back(way: str, name: str, tmp_path: Path):
    base, inputs = zoo.build(name)
    model = moved(copy.deepcopy(base), OURS[way], **SETTINGS.get(way, {}))
    expected = logits(model, inputs)
    assert not torch.allclose(expected, logits(base, inputs), rtol=1e-3)
    save_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(theirs, inputs), expected, rtol=1e-6, atol=1e-8)
    load_peft(base, tmp_path)
    torch.testing.assert_close(logits(base, inputs), expected, rtol=1e-9, atol=1e-10)


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
THEIRS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": BOTH},
    "reversed": {"target_modules": [], "target_parameters": BOTH[::-1]},
    "one": {"target_modules": [], "target_parameters": BOTH[:1], "use_rslora": True},
    "rank": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [*BOTH, "gate.weight", "router.weight"],
        "rank_pattern": {"down_proj": 1, r".*\.1\..*gate_up_proj": 4},
        "alpha_pattern": {"gate_up_proj": 5},
    },
    "renamed": {"target_modules": ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]},
}
"""Configs of PEFT's; by the last it takes experts for layers of transformers 4."""


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("rank", name) for name in MIXTURES),
        *(("experts", "mixtral"), ("reversed", "gpt_oss"), ("one", "granitemoe")),
        # PEFT renames no layer of gpt_oss and granitemoe.
        *(("renamed", name) for name in ("mixtral", "qwen3_moe", "deepseek_v3")),
    ],
)
def test_a_mixture_that_peft_saved(way: str, name: str, tmp_path: Path):
    base, inputs = zoo.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a new model with an adapter that is not loaded
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, **THEIRS[way]))
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    expected = logits(theirs, inputs)
    theirs.save_pretrained(str(tmp_path))
    load_peft(base, tmp_path)
    torch.testing.assert_close(logits(base, inputs), expected, rtol=1e-6, atol=1e-8)


def test_what_peft_has_no_parameters_for_is_refused(tmp_path: Path):
    model, _ = zoo.build("deepseek_v3")
    dense = {"dense": Target("linear", match="*.0.mlp.*_proj")}
    adapters.attach(model, dense, r=2, dora=True)
    with pytest.raises(AdapterError, match=r"0\.mlp\.gate_proj': PEFT has no DoRA for target_par"):
        save_peft(model, tmp_path)
    adapters.detach(model)
    adapters.attach(model, {"bias": Target(match="model.embed_tokens")}, r=2)
    save_peft(model, tmp_path)  # an embedding is no parameter
    model, _ = zoo.build("gpt_oss")
    adapters.attach(model, {"bias": Target(match="*down_proj_bias")}, r=2)
    with pytest.raises(AdapterError, match="cannot adapt this weight of GptOssExperts"):
        save_peft(model, tmp_path)


class TopKRouter(nn.Module):
    weight: nn.Parameter


class MoEGate(TopKRouter):
    pass


class TopKGating(TopKRouter):
    pass


def test_what_peft_holds_as_a_parameter():
    linear, other = nn.Linear(2, 2), nn.Bilinear(2, 2, 2)
    held = is_held_as_parameter
    for Router in (TopKRouter, MoEGate, TopKGating):
        assert held(Router(), "gate.weight", "weight", True)
        assert reason_no_parameter(Router(), "weight", False) is None
    for name in ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "q_proj"):
        assert held(linear, f"mlp.{name}", "linear", True) == (name != "q_proj")
        assert not held(linear, f"mlp.{name}", "linear", False), "PEFT renames in mixtures alone"
    assert not held(other, "mix.weight", "weight", True)
    assert reason_no_parameter(linear, "linear", False) is None
    assert "wherever it is read" in str(reason_no_parameter(other, "weight", False))
    for layer, kind in ((Conv1D(2, 2), "linear"), (nn.Conv2d(2, 2, 1), "conv")):
        assert "is not read" in str(reason_no_parameter(layer, kind, False))


def test_target_parameters_are_names_or_their_ends():
    model = nn.ModuleDict({"experts": LoopedExperts()})
    adapters.attach(model, "experts", r=1)
    keys = ["experts.up_proj", "experts.down_proj"]
    for target, picked in (("up_proj", keys[:1]), (keys[1], keys[1:]), ("proj", []), ("A", [])):
        assert targeted(model, [target]) == picked
