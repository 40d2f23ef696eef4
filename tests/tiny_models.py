"""Small pretrained models, made from configs and saved as transformers saves them, with tokenizers.

`tiny_model("bert", folder, "classification")` writes a folder that model.path takes.
"""

from pathlib import Path
from typing import Any

import torch

WORDS = "the a cat dog bird fish runs sleeps eats sees big small red blue and not in on good bad"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "vocab_size": 40}
_IDS = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 6}
_GROUPED = {**_SIZES, **_IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**_SIZES, "max_position_embeddings": 64, "pad_token_id": 0}),
    "roberta": ("RobertaConfig", {**_SIZES, **_IDS, "max_position_embeddings": 66}),
    "gpt2": (
        "GPT2Config",
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64},
    ),
    "llama": ("LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "t5": (
        "T5Config",
        {
            **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            **{"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 6, "decoder_start_token_id": 0},
        },
    ),
    "vit": (
        "ViTConfig",
        {**_SIZES, "vocab_size": None, "image_size": 16, "patch_size": 4, "num_channels": 3},
    ),
}
"""Family → its config's class in transformers, and the sizes."""


def tiny_model(family: str, folder: Path | str, head: str, seed: int = 0, **changes: Any) -> Path:
    """Writes a model of a family with random weights, and a tokenizer (or image processor).

    `head` is one of model.head, or `none` for the model below the head. `changes` are values of the
    config, as num_labels=3.
    """
    import transformers

    from lora_lab.models.transformers_config import HEADS

    name, sizes = TINY[family]
    settings = {key: value for key, value in {**sizes, **changes}.items() if value is not None}
    config = getattr(transformers, name)(**settings)
    auto = getattr(transformers, "AutoModel" if head == "none" else HEADS[head].auto_class)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        # Norms and biases begin at 1 and 0: alike, they would hide errors of names.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    if family == "vit":
        size = {"height": config.image_size, "width": config.image_size}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    else:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer() -> Any:
    """A tokenizer of words, those of VOCABULARY; two texts become [CLS] one [SEP] other [SEP]."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    tokens = {f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
