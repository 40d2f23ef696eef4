"""Adapters on architectures of others: they change nothing at first, then W + ΔW is computed.

Independent truth: the base before, and the base with ΔW added to its weights by hand.

Run: make test ARGS=tests/adapters/test_zoo.py
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters.sites import candidate_sites
from tests.adapters import zoo

pytest.importorskip("transformers")


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_adapters_on_all_weights_compute_with_the_changed_weights(name: str):
    model, inputs = zoo.build(name)
    before, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    base = outputs(model, inputs)
    sites = adapters.attach(model, "all", r=2)
    torch.testing.assert_close(outputs(model, inputs), base, rtol=1e-12, atol=1e-12)
    for adapter in adapters.attached(model).values():
        for factor in (adapter.A, adapter.B):
            nn.init.normal_(factor, std=0.3)
    adapted = outputs(model, inputs)
    assert not torch.allclose(adapted, base, rtol=1e-4)
    with torch.no_grad():
        for site in sites:
            expected.get_parameter(site.key).add_(adapters.deltas(model)[site.name])
    torch.testing.assert_close(adapted, outputs(expected, inputs), rtol=1e-8, atol=1e-10)
    adapted.square().sum().backward()
    for site, adapter in adapters.attached(model).items():
        assert adapter.B.grad is not None, site
    adapters.merge(model)
    torch.testing.assert_close(outputs(model, inputs), adapted, rtol=1e-8, atol=1e-10)
    adapters.unmerge(model)
    adapters.detach(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    torch.testing.assert_close(outputs(model, inputs), base, rtol=1e-12, atol=1e-12)


GENERATING = [n for n, (_, task, _) in zoo.ARCHITECTURES.items() if task in zoo.GENERATE]


@pytest.mark.parametrize("name", GENERATING)
def test_cached_generation_is_that_of_the_merged_model(name: str):
    """Some models use other code, and read other weights, once they have a cache."""
    model, inputs = zoo.build(name)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def logits() -> Tensor:
        generated: Any = model.generate(  # pyright: ignore
            inputs["input_ids"], **settings, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(generated.logits)

    base = logits()
    adapters.attach(model, "all", r=2)
    for adapter in adapters.attached(model).values():
        nn.init.normal_(adapter.B if adapter.zero_factor == "B" else adapter.A, std=0.1)
    adapted = logits()
    assert not torch.allclose(adapted, base, rtol=1e-4)
    adapters.merge(model)
    torch.testing.assert_close(adapted, logits(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_the_shortest_call_works(name: str):
    model, inputs = zoo.build(name)
    assert adapters.attach(model, r=8)
    assert outputs(model, inputs).isfinite().all()


FOUR, FUSED = 2 * 4, 2 * 2
"""Of two blocks: q, k, v and out; or the three in one, and out."""
ATTENTION = {
    "albert": 4,  # one block, used twice
    "bart": 2 * 4 + 2 * (4 + 4),  # the decoder's blocks read the encoder too
    **dict.fromkeys(["beit", "bert", "deberta-v2", "distilbert", "electra", "gemma2"], FOUR),
    **dict.fromkeys(["llama", "opt", "qwen3", "roberta", "swinv2", "vit"], FOUR),
    **dict.fromkeys(["gpt_oss", "granitemoe", "mixtral", "qwen3_moe"], FOUR),
    **dict.fromkeys(["bloom", "falcon", "gpt2", "gpt_neox", "phi3"], FUSED),
    "deepseek_v3": 2 * 5,  # queries by way of a lower rank, keys and values by way of one more
    "deberta-v2, relative": FOUR + 2 * 2,  # keys and queries of positions
    "longformer": FOUR + 2 * 3,  # q, k, v of the global attention
    "mobilevit": 9 * 4,  # 2 + 4 + 3 blocks
    "recurrent_gemma": 4,  # one block of three
    "segformer": 2 * (FOUR + 2),  # two stages; a convolution in each block
    "t5": 2 * 4 + 2 * (4 + 4),
    **{"mamba": 0, "resnet": 0},
}
"""Architecture → how many linear layers and convolutions its attention has, counted by hand."""


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_attention_has_the_layers_that_it_computes_with(name: str):
    model, _ = zoo.build(name)
    sites = [site for site in candidate_sites(model) if site.attention]
    assert len(sites) == ATTENTION[name], [site.name for site in sites]
