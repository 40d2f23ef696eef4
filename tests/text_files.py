"""Small files of rows, and a tokenizer that is built here: words are its tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("good", "bad", "film", "the", "is", "was", "very", "not", "a", "plot", "user", "answer")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>")
IDS = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}


def text_of(row: int) -> str:
    """A text of 2 to 6 words, another for each of the first hundreds of rows."""
    return " ".join(WORDS[(row * step + step) % len(WORDS)] for step in range(1, 3 + row % 5))


def save_jsonl(path: str, rows: Sequence[dict[str, Any]]) -> str:
    """Writes rows, one a line, and gives the path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_rows(path: str, count: int) -> str:
    """Writes rows of a text and a label, good or bad."""
    labels = ("good", "bad")
    return save_jsonl(path, [{"text": text_of(i), "label": labels[i % 2]} for i in range(count)])


def save_tokenizer(folder: str, kind: str = "bert", **settings: Any) -> str:
    """Saves a tokenizer of WORDS, and gives its folder.

    `t5` puts <eos> behind a text; `bert` puts [CLS] before and [SEP] behind it and knows pairs;
    `gpt` adds nothing and has no padding token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    special: dict[str, Any] = {"eos_token": "<eos>", "unk_token": "[UNK]"}
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[(token, IDS[token]) for token in ("[CLS]", "[SEP]")],
        )
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        special |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    if kind == "t5":
        eos = [("<eos>", IDS["<eos>"])]
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="$A <eos>", special_tokens=eos
        )
        special |= {"pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings).save_pretrained(
        folder
    )
    return folder
