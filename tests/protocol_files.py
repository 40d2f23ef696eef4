"""Models and data of the shapes that the protocols' experiments read, small and random."""

import random
from collections.abc import Callable
from pathlib import Path

from tests.text_files import WORDS, save_tokenizer
from tests.tiny_models import tiny_model


def sentence(draw: random.Random, most: int) -> str:
    """Some words, at most `most`."""
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def save_sms(path: str = "SMSSpamCollection.tsv", spam: int = 747, ham: int = 4825) -> list[str]:
    """Writes a file as UCI's SMS Spam Collection; gives the overrides of spam_gpt2 that read it."""
    draw = random.Random(0)
    labels = ["spam"] * spam + ["ham"] * ham
    draw.shuffle(labels)
    texts = [sentence(draw, 8) for _ in labels]
    texts[3] = " ".join(["good"] * 200)  # longer than what is read of it
    Path(path).write_text("".join(f"{a}\t{b}\n" for a, b in zip(labels, texts, strict=True)))
    return [f"data.train={path}"]


def save_gpt2(folder: str = "gpt2") -> list[str]:
    """Writes a small GPT-2 of two layers, with a tokenizer that adds nothing and cannot pad."""
    tiny_model("gpt2", folder, "language", n_positions=128, n_embd=16, pad_token_id=None)
    save_tokenizer(folder, "gpt")
    return [f"model.path={folder}"]


FILES: dict[str, Callable[[], list[str]]] = {
    "spam_gpt2": lambda: [*save_sms(spam=40, ham=60), *save_gpt2()],
}
"""What an experiment reads, small and random: writes it and gives the overrides of its paths."""
