"""Packs of transformers' families: padded batches in micro-batches, with heads trained in full.

Independent truth: a plain loop over each run's own model, in float64: forward, backward of the mean
loss over all targets of a step, and torch's AdamW.

Run: make test ARGS=tests/packing/test_families.py
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters.model_call import logits
from lora_lab.adapters.pack import Pack, copy_sharing_weights
from lora_lab.config.components import Optimizer
from lora_lab.packing.optimizer import PackedOptimizer, optimizer_settings
from lora_lab.packing.recorded_step import RecordedStep
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.modules import Batch
from lora_lab.training.tasks import IGNORED, cross_entropy
from tests.adapters.cases import seeded

EXACT = 1e-10
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "use_cache": False}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 64}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
WHISPER = {"d_model": 16, "vocab_size": 40, "num_mel_bins": 4, "max_source_positions": 8}
WHISPER |= {f"{part}_layers": 1 for part in ("encoder", "decoder")}
WHISPER |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
WHISPER |= {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
IMAGES = {"image_size": 8, "patch_size": 4, "num_labels": 3}

FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "BertForSequenceClassification": ("BertConfig", SIZES, ("classifier", "*LayerNorm*")),
    "RobertaForSequenceClassification": ("RobertaConfig", SIZES, ("classifier",)),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, ("*ln_1", "*c_proj.bias")),
    "GPT2ForSequenceClassification": ("GPT2Config", {**GPT2, "pad_token_id": 0}, ("score",)),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, ("*norm",)),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED, ("*q_norm",)),
    "GemmaForCausalLM": ("GemmaConfig", GROUPED, ("*norm",)),
    "T5ForConditionalGeneration": ("T5Config", T5, ("*layer_norm",)),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER, ("*conv1",)),
    "ViTForImageClassification": ("ViTConfig", {**SIZES, **IMAGES}, ("classifier", "bias")),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 8},
        ("classifier", "*layernorm"),
    ),
}
"""A class of transformers, its config, and what is trained in full beside the adapters."""
QUICK = ("BertForSequenceClassification", "ConvNextForImageClassification")
SLOW = pytest.mark.slow
"""Left out of quick tests: eager attention, and families that are not QUICK."""
RUNS = (
    {"r": 1, "alpha": 2.0, "seed": 0},
    {"r": 2, "alpha": 8.0, "seed": 1, "scaling": "alpha"},
    {"r": 2, "alpha": 1.0, "seed": 2, "init": "gaussian"},
)


def family(name: str, attention: str) -> nn.Module:
    """A small model of a family, with random weights, in float64 and without dropout."""
    config_name, sizes, _ = FAMILIES[name]
    without_labels = "LM" in name or "Generation" in name
    attention = "eager" if "Conv" in name else attention
    sizes = {**sizes, "attn_implementation": attention}
    sizes |= {} if without_labels else {"num_labels": 3}
    model = getattr(transformers, name)(getattr(transformers, config_name)(**sizes)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for dropout in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    return model


def batch_of(name: str, rows: int, length: int, padding: int) -> Batch:
    """A batch for a family; the first row of text ends in so many tokens of padding."""
    if "Image" in name:
        return {"pixel_values": torch.randn(rows, 3, 8, 8).double()}, torch.arange(rows) % 3
    ids = torch.randint(3, 40, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length - padding :] = 0
    ids[mask == 0] = 0
    targets = torch.randint(0, 40, ids.shape).masked_fill(mask == 0, IGNORED)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if "Whisper" in name:
        features = torch.randn(rows, 4, 16).double()
        return {"input_features": features, "decoder_input_ids": ids}, targets
    if "T5" in name:
        inputs["decoder_input_ids"] = ids.roll(1, 1)
    return inputs, targets if "Class" not in name else torch.arange(rows) % 3


def steps_of(name: str) -> Iterator[list[Batch]]:
    """The micro-batches of four steps, of one shape; padding first occurs in the third."""
    for padding in (0, 0, 2, 1):
        yield [batch_of(name, 2, 5, padding), batch_of(name, 2, 5, 0)]


# Rates of their own, so that runs lie in several groups of the optimizer.
SETTINGS = {"_target_": "torch.optim.AdamW", "schedule": "linear", "warmup": 0, "eps": 1e-3}
RATES = (0.05, 0.02, 0.02)


def plain_losses(module: LoRAModule, name: str, steps: int) -> list[float]:
    """The loss of each step of one run, in a plain loop."""
    optimizer = torch.optim.AdamW(module.optimizer_groups(), lr=module.optimizer.lr, eps=1e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, batches in enumerate(steps_of(name)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        count = sum(int((targets != IGNORED).sum()) for _, targets in batches)
        loss = sum(cross_entropy(logits(module.model, x), y) for x, y in batches) / count
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore
        optimizer.step()
        losses.append(loss.item())  # pyright: ignore
    return losses


def packed_losses(base: nn.Module, modules: list[LoRAModule], name: str, steps: int) -> Tensor:
    """The losses of each step of all runs (steps, runs), in a pack."""
    settings = [optimizer_settings(module) for module in modules]
    runs = [adapters.attached(module.model) for module in modules]
    in_full = [adapters.also_trained(module.model) for module in modules]
    pack = Pack(base, runs, settings, in_full).train()
    optimizer, step = PackedOptimizer(modules, [pack], steps), RecordedStep(pack, cross_entropy)
    losses = []
    for number, batches in enumerate(steps_of(name)):
        sums = [step(*batch, add=i > 0) for i, batch in enumerate(batches)]
        count = sum(int((targets != IGNORED).sum()) for _, targets in batches)
        for parameter in step.trained:
            assert parameter.grad is not None
            parameter.grad /= count
        optimizer.set_learning_rates(number)
        optimizer.torch_optimizer.step()
        losses.append(sum(sums) / count)
    assert step.is_recordable
    return torch.stack(losses)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=SLOW)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else SLOW) for name in FAMILIES]
)
def test_a_family_in_a_pack_is_each_run_by_itself(name: str, attention: str):
    seeded(0)
    base, also_train = family(name, attention), FAMILIES[name][2]
    heads = [head for head in ("lm_head", "proj_out") if hasattr(base, head)]
    kind = "conv" if "Conv" in name else "linear"
    modules = []
    for run, rate in zip(RUNS, RATES, strict=True):
        model = copy_sharing_weights(base)
        target = {"t": adapters.Target(kind=kind, exclude=heads)}
        adapters.attach(model, target, also_train=also_train, **run)
        for parameter in adapters.also_trained(model).values():  # each run begins elsewhere
            parameter.value.data += 0.1 * torch.randn_like(parameter.value)
        optimizer = Optimizer(**{**SETTINGS, "lr": rate})
        modules.append(LoRAModule(model, "classification", 3, optimizer).train())
    copies = copy.deepcopy(modules)
    steps = len(list(steps_of(name)))
    expected = []
    for module in copies:
        seeded(1)
        expected.append(plain_losses(module, name, steps))
    seeded(1)
    losses = packed_losses(base, modules, name, steps)
    torch.testing.assert_close(losses.mT, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    # Their norms are computed in float32, whatever the model's dtype.
    within = 1e-5 if name.startswith(("Llama", "Qwen3", "Gemma", "T5")) else EXACT
    for module, copied in zip(modules, copies, strict=True):
        for (key, value), other in zip(
            adapters.adapter_state_dict(module.model).items(),
            adapters.adapter_state_dict(copied.model).values(),
            strict=True,
        ):
            assert (value - other).norm() <= within * other.norm(), key
    assert not math.isclose(expected[0][-1], expected[0][0], rel_tol=1e-3)
