"""Small models of architectures that others wrote, with random weights: name → model and inputs.

Each is made from a config of transformers, in float64 and without dropout, so that what an adapter
does can be compared to the last digits. A new architecture is one line of ARCHITECTURES.
"""

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 64},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_layers": 2, "n_heads": 4},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "embedding_size": 32},
    **{"dim": 32, "hidden_dim": 64, "word_embed_proj_dim": 32, "state_size": 8, "embed_dim": 16},
    **{"image_size": 16, "patch_size": 4, "num_channels": 3, "num_local_experts": 4},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_rate": 0.0},
    **{"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "seq_classif_dropout": 0.0},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_dropout": 0.0},
}
"""Values of configs: each config takes those that it has."""

Architecture = tuple[str, str, dict[str, Any]]
CAUSAL, MASKED, IMAGE = "CausalLM", "MaskedLM", "ImageClassification"
GENERATE = ("CausalLM", "Seq2SeqLM")
"""What generates text, with a cache."""
SEQUENCES, TWO_SEQUENCES = "SequenceClassification", "Seq2SeqLM"

ARCHITECTURES: dict[str, Architecture] = {
    "albert": ("albert", MASKED, {}),
    "bart": ("bart", TWO_SEQUENCES, {}),
    "beit": ("beit", IMAGE, {}),
    "bert": ("bert", SEQUENCES, {}),
    "bloom": ("bloom", CAUSAL, {}),
    "deberta-v2": ("deberta-v2", SEQUENCES, {}),
    "deberta-v2, relative": (
        "deberta-v2",
        SEQUENCES,
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        CAUSAL,
        {
            **{"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
            **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
            **{"v_head_dim": 8, "head_dim": None, "num_key_value_heads": 4, "n_shared_experts": 1},
        },
    ),
    "distilbert": ("distilbert", SEQUENCES, {}),
    "electra": ("electra", SEQUENCES, {}),
    "falcon": ("falcon", CAUSAL, {"head_dim": None}),
    "gemma2": ("gemma2", CAUSAL, {}),
    "gpt2": ("gpt2", CAUSAL, {}),
    "gpt_neox": ("gpt_neox", CAUSAL, {}),
    "gpt_oss": ("gpt_oss", CAUSAL, {"intermediate_size": 24}),
    "granitemoe": ("granitemoe", CAUSAL, {}),
    "llama": ("llama", CAUSAL, {}),
    "longformer": ("longformer", SEQUENCES, {"attention_window": 8}),
    "mamba": ("mamba", CAUSAL, {}),
    "mixtral": ("mixtral", CAUSAL, {}),
    "mobilevit": (
        "mobilevit",
        IMAGE,
        {
            **{"image_size": 64, "patch_size": 2, "hidden_sizes": [16, 24, 32]},
            "neck_hidden_sizes": [8, 8, 16, 24, 24, 32, 64],
        },
    ),
    "opt": ("opt", CAUSAL, {}),
    "phi3": ("phi3", CAUSAL, {}),
    "qwen3_moe": ("qwen3_moe", CAUSAL, {}),
    "qwen3": ("qwen3", CAUSAL, {}),
    "recurrent_gemma": ("recurrent_gemma", CAUSAL, {"num_hidden_layers": 3, "lru_width": 32}),
    "resnet": ("resnet", IMAGE, {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}),
    "roberta": ("roberta", SEQUENCES, {"max_position_embeddings": 66}),
    "segformer": (
        "segformer",
        IMAGE,
        {"num_attention_heads": [1, 2, 2, 2], "hidden_sizes": [8, 16, 16, 16], "image_size": 32},
    ),
    "swinv2": (
        "swinv2",
        IMAGE,
        {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "num_attention_heads": None},
    ),
    "t5": ("t5", TWO_SEQUENCES, {"decoder_start_token_id": 1}),
    "vit": ("vit", IMAGE, {}),
}
"""Name → type of model, what it computes, and values that its config takes besides SIZES."""


def build(name: str, **more: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model of a name, with weights drawn from one seed, and inputs for it.

    `more` are further values of its config.
    """
    import transformers

    kind, task, values = ARCHITECTURES[name]
    config_class = transformers.AutoConfig.for_model(kind).__class__
    default = config_class()
    values = {
        **{key: value for key, value in SIZES.items() if hasattr(default, key)},
        **values,
        **more,
    }
    config = config_class(**{key: value for key, value in values.items() if value is not None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config).double().eval()
        if hasattr(config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # other implementations take no float64
        # Norms and biases begin at 1 and 0, where much stays hidden.
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        size = values.get("image_size", 16)
        if task == IMAGE:
            return model, {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}
        tokens = {"input_ids": torch.randint(3, 40, (2, 8))}
    if task == TWO_SEQUENCES:
        tokens["decoder_input_ids"] = tokens["input_ids"].flip(1)
    return model, tokens
