"""Small models of transformers, and adapters that PEFT saves for them."""

import warnings
from typing import Any

import peft
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)


def llama(layers: int = 2, tie_word_embeddings: bool = False) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
    sizes["num_hidden_layers"] = layers
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, vocab_size=20)
    config.tie_word_embeddings = tie_word_embeddings
    return LlamaForCausalLM(config).eval()


def gpt2(tie_word_embeddings: bool = False) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**sizes, vocab_size=20, tie_word_embeddings=tie_word_embeddings)
    return GPT2LMHeadModel(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_local_experts": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=20)).eval()


@torch.no_grad()
def peft_folder(model: Any, **settings: Any) -> Any:
    """PEFT's model with random factors, saved in the folder `adapter`."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained("adapter")
    return adapted
