"""Models and data of the shapes that the protocols' experiments read, small and random."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.text_files import WORDS, save_jsonl, save_tokenizer
from tests.tiny_models import tiny_model

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


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


def save_model(family: str, kind: str, head: str = "language", **changes: Any) -> list[str]:
    """Writes a small model, with a tokenizer of a `kind`; gives the override of its path."""
    tiny_model(family, family, head, **changes)
    save_tokenizer(family, kind, chat_template=CHAT_TEMPLATE)
    return [f"model.path={family}"]


def save_gpt2() -> list[str]:
    """Writes a small GPT-2, whose tokenizer adds nothing and cannot pad."""
    return save_model("gpt2", "gpt", n_positions=520, n_embd=16, pad_token_id=None)


def glue(columns: Sequence[str], labels: Sequence[Any], splits: Sequence[str]) -> list[str]:
    """Writes a task of GLUE with its splits, and a small RoBERTa."""
    from datasets import Dataset, DatasetDict

    draw = random.Random(0)
    rows = [
        {**{name: sentence(draw, 5) for name in columns}, "label": labels[i % len(labels)]}
        for i in range(40)
    ]
    DatasetDict({split: Dataset.from_list(rows) for split in splits}).save_to_disk("glue")
    model = save_model("roberta", "bert", "masked", max_position_embeddings=514, pad_token_id=0)
    return ["data.train=glue", *model]


def mnli() -> list[str]:
    """Writes a task of MNLI's shape, and a small RoBERTa."""
    splits = ("train", "validation_matched", "validation_mismatched")
    return glue(("premise", "hypothesis"), (0, 1, 2), splits)


def task(*columns: str, labels: Sequence[Any] = (0, 1)) -> Callable[[], list[str]]:
    """What writes a task of GLUE with these columns, and a small RoBERTa."""
    return lambda: glue(columns, labels, ("train", "validation"))


def pairs(prompt: str, completion: str, end: str, *arguments: str) -> list[str]:
    """Writes rows of prompts and completions; gives the overrides that read them."""
    draw = random.Random(0)
    rows = [{prompt: sentence(draw, 6), completion: sentence(draw, 4) + end} for _ in range(24)]
    save_jsonl("pairs.jsonl", rows)
    return [f"{argument}=pairs.jsonl" for argument in arguments]


def chats(*arguments: str) -> list[str]:
    """Writes rows of chats; gives the overrides that read them."""
    draw = random.Random(0)
    roles = ("user", "assistant", "user", "assistant")
    chat = [[{"role": role, "content": sentence(draw, 5)} for role in roles] for _ in range(24)]
    save_jsonl("chats.jsonl", [{"messages": messages} for messages in chat])
    return [f"{argument}=chats.jsonl" for argument in arguments]


FILES: dict[str, Callable[[], list[str]]] = {
    "spam_gpt2": lambda: [*save_sms(spam=40, ham=60), *save_gpt2()],
    "glue_cola": task("sentence"),
    "glue_mnli": mnli,
    "glue_mrpc": task("sentence1", "sentence2"),
    "glue_qnli": task("question", "sentence"),
    "glue_qqp": task("question1", "question2"),
    "glue_rte": task("sentence1", "sentence2"),
    "glue_sst2": task("sentence"),
    "glue_stsb": task("sentence1", "sentence2", labels=(0.5, 1.0, 4.25)),
    "mnli_intruders": mnli,
    "e2e_gpt2": lambda: [
        *pairs("context", "completion", "", "data.train", "data.val", "data.test"),
        *save_gpt2(),
    ],
    "metamath": lambda: [
        *pairs("query", "response", " #### 18", "data.train", "data.test"),
        *save_model("llama", "gpt"),
    ],
    "no_robots": lambda: [*chats("data.train", "data.val"), *save_model("qwen3", "gpt")],
    "tulu": lambda: [*chats("data.train"), *save_model("llama", "gpt")],
}
"""What an experiment reads, small and random: writes it and gives the overrides of its paths."""

NEEDED = {
    "e2e_gpt2": ("data.train", "data.val", "data.test", "model.path"),
    "metamath": ("data.train", "data.test", "model.path"),
    "no_robots": ("data.train", "data.val", "model.path"),
}
"""The paths that an experiment needs, where these are not data.train and model.path alone."""


def paths(experiment: str) -> list[str]:
    """Overrides that give an experiment paths, at which nothing lies."""
    return [f"{key}=x" for key in NEEDED.get(experiment, ("data.train", "model.path"))]
