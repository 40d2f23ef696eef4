"""data=words: which token has which word's class, a run from the command, and refused inputs.

Truth: each word tokenized by itself and laid out in plain loops; for bad inputs, the file, the line
and the nearest name that their messages have to say. Run: make test ARGS=tests/data/test_words.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lora_lab import train
from lora_lab.data import tokens
from lora_lab.data.words import Words
from tests.conftest import only_run
from tests.text_files import save_jsonl
from tests.tiny_models import tiny_model

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PIECES = (*SPECIAL, "the", "wa", "##sh", "##ing", "##ton", "is", "dog", "##s", "in", ".")
ROWS = [
    {"words": ["washington", "is", "in", "washing", "."], "labels": ["B", "O", "O", "B", "O"]},
    {"words": ["the", "dogs"], "labels": ["O", "I"]},
    {"words": ["dog", "cat", "washs"], "labels": ["I", "B", "O"]},
    {"words": ["in", "the", "washing", "dogs", "."], "labels": ["O", "O", "B", "I", "O"]},
]
CLASSES = ["B", "I", "O"]


def save_tokenizer(folder: str, kind: str = "pieces") -> str:
    """`pieces`: BERT's, with special tokens; `bytes`: GPT-2's without merges, a token a byte."""
    special: dict[str, str] = {}
    if kind == "pieces":
        ids = {piece: i for i, piece in enumerate(PIECES)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))  # pyright: ignore
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = ("pad", "unk", "cls", "sep")
        special = {f"{n}_token": token for n, token in zip(names, SPECIAL, strict=True)}
    else:
        ids = {byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}
        tokenizer = Tokenizer(models.BPE(ids, []))  # pyright: ignore
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", str(Path("cache").absolute()))
    save_jsonl("train.jsonl", ROWS)
    save_jsonl("val.jsonl", ROWS[1:])
    save_tokenizer("tokenizer")


def words_data(**change: Any) -> Words:
    settings = {"train": "train.jsonl", "val": "val.jsonl", "words": "words", "labels": "labels"}
    settings |= {"tokenizer": "tokenizer", "batch_size": 2, "seed": 0, "phase": "adapt"}
    return Words(**{**settings, **change})


def ready(**change: Any) -> Words:
    data = words_data(**change)
    data.setup("fit")
    return data


def by_hand(
    rows: Sequence[dict[str, Any]], kind: str, max_length: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Padded ids and targets of rows, each word tokenized by itself."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(kind)
    start, end, room = ([2], [3], 2) if kind == "pieces" else ([], [], 0)
    ids, targets = [], []
    for row in rows:
        row_ids, row_targets = [], []
        for word, label in zip(row["words"], row["labels"], strict=True):
            # A byte-level tokenizer has the space before a word in the word's tokens.
            text = word if kind == "pieces" else f" {word}"
            pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
            row_ids += pieces
            row_targets += [CLASSES.index(label)] + [-100] * (len(pieces) - 1)
        cut = max_length - room if max_length else None
        ids.append(start + row_ids[:cut] + end)
        targets.append([-100] * len(start) + row_targets[:cut] + [-100] * len(end))
    width = max(map(len, ids))
    return (
        [row + [0] * (width - len(row)) for row in ids],
        [row + [-100] * (width - len(row)) for row in targets],
    )


@pytest.mark.parametrize("max_length", [None, 6, 4])
@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_the_first_token_of_a_word_has_its_class(kind: str, max_length: int | None):
    data = ready(tokenizer=save_tokenizer(kind, kind), max_length=max_length)
    assert data.sizes == {"out_features": 3}
    assert list(data.class_names) == CLASSES
    for numbers in ([3, 0], [1], [2, 1, 3]):
        inputs, targets = data.train[torch.tensor(numbers)]
        expected = by_hand([ROWS[i] for i in numbers], kind, max_length)
        assert (inputs["input_ids"].tolist(), targets.tolist()) == expected
        if kind == "pieces":
            assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] != 0).long())
    (_, targets), *_ = data.val_dataloader()
    assert targets.tolist() == by_hand(ROWS[1:], kind, max_length)[1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "saved", "hub", "numbers"])
def test_all_kinds_of_sources_and_classes(kind: str):
    expected = ready().train[slice(0, 4)][1]
    names = ("B", "I", "O")
    path = f"rows.{kind}"
    rows = Dataset.from_list(ROWS)
    if kind == "jsonl":
        path = "train.jsonl"
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "folder":
        Path(path).mkdir()
        for name in ("train", "val"):
            save_jsonl(f"{path}/{name}.jsonl", ROWS)
    elif kind == "saved":
        DatasetDict({"train": rows, "validation": rows}).save_to_disk(path)
    elif kind == "hub":  # a ClassLabel's names, in their own order
        names = ("O", "I", "B", "unseen")
        feature = {"words": List(Value("string")), "labels": List(ClassLabel(names=[*names]))}
        numbered = [{**r, "labels": [names.index(n) for n in r["labels"]]} for r in ROWS]
        Dataset.from_list(numbered, features=Features(feature)).save_to_disk(path)
    else:
        names = ("0", "1", "2")
        numbers = [{**r, "labels": [CLASSES.index(n) for n in r["labels"]]} for r in ROWS]
        save_jsonl(path := "numbers.jsonl", numbers)
    data = ready(train=path, val=path)
    assert data.class_names == names
    if kind == "hub":
        expected = torch.where(expected >= 0, 2 - expected, expected)
    assert torch.equal(data.train[slice(0, 4)][1], expected)


def test_words_are_tokenized_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    encode = tokens._encoded
    monkeypatch.setattr(tokens, "_encoded", lambda *args: calls.append(args[0]) or encode(*args))
    ready(val="train.jsonl")
    ready(val="train.jsonl", seed=1, limit=3)
    assert calls == ["train.jsonl"]
    targets = ready(val="train.jsonl", classes=["O", "I", "B"]).train[slice(1, 2)][1]
    assert targets.tolist() == [[-100, 0, 1, -100, -100]]
    assert calls == ["train.jsonl"] * 2


def test_the_command_trains_a_bert(monkeypatch: pytest.MonkeyPatch):
    tiny_model("bert", "model", "masked")
    save_tokenizer("model")
    settings = "name=ours model=pretrained model.path=model model.head=tokens base=pretrained"
    settings += " data=words data.train=train.jsonl data.val=val.jsonl data.batch_size=2"
    settings += (
        " data.metrics=[accuracy,f1,matthews] also_train=[classifier] target.linear.match=*.query"
    )
    settings += " trainer.max_epochs=20 optimizer.lr=0.01 trainer.accelerator=cpu tracking=off"
    settings += " trainer.check_val_every_n_epoch=1 figures=false spectra.truncation=none"
    monkeypatch.setattr(sys, "argv", ["lora-lab train", *settings.split()])
    train.main()
    run = only_run()
    losses, accuracy = run.curve("val/loss"), run.curve("val/accuracy")
    assert losses[20] < losses[0] / 2
    # Shares of the 10 words of val.jsonl, whose tokens are 26 with special ones.
    assert all(abs(10 * share - round(10 * share)) < 1e-5 for share in accuracy.values())
    assert 0.1 < accuracy[6] < 1
    for metric in ("val/f1", "val/matthews"):
        assert run.curve(metric)[20] > run.curve(metric)[0]


AS_TRAIN, AS_VAL = {"train": "bad.jsonl", "val": None}, {"val": "bad.jsonl"}
GOOD = ROWS[0]
BAD_INPUTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "numbers differ": (
        [GOOD, {"words": ["the", "dog"], "labels": ["O"]}],
        AS_TRAIN,
        r"^train=bad.jsonl, line 2: 'words' has 2 words and 'labels' 1 labels$",
    ),
    "new in validation": (
        [GOOD, {"words": ["the", "dog"], "labels": ["O", "II"]}],
        AS_VAL,
        r"^val=bad.jsonl, line 2: label 2 of 'labels' is 'II', .*of training \(B, I, O\).*: I$",
    ),
    "no words": (
        [GOOD, {"words": [], "labels": []}],
        AS_TRAIN,
        r"^train=bad.jsonl, line 2: 'labels' is an empty list$",
    ),
    "no words but labels": (
        [GOOD, {"words": [], "labels": ["O"]}],
        AS_TRAIN,
        r"^train=bad.jsonl, line 2: 'words' is an empty list$",
    ),
    "words missing": ([GOOD, {"labels": ["O"]}], AS_TRAIN, r"line 2: 'words' is missing$"),
    "words are a text": (
        [{**GOOD, "words": "the dog"}],
        AS_VAL,
        r"^val=bad.jsonl, line 1: 'words' is a str, not a list$",
    ),
    "labels are a text": ([{**GOOD, "labels": "O"}], AS_TRAIN, r"1: 'labels' is a str, not a list"),
    "empty word": (
        [GOOD, {"words": ["the", ""], "labels": ["O", "B"]}],
        AS_TRAIN,
        r"^train=bad.jsonl, line 2: word 2 of 'words' is an empty text$",
    ),
    "number for a word": ([{**GOOD, "words": [1] * 5}], AS_TRAIN, r"word 1 of 'words' is a int"),
    "label missing": (
        [{"words": ["the", "dog"], "labels": ["O", None]}],
        AS_TRAIN,
        r"line 1: label 2 of 'labels' is missing",
    ),
    "label that is ignored": (
        [{"words": ["the", "dog"], "labels": [0, -100]}],
        AS_TRAIN,
        r"line 1: label 2 of 'labels' is -100, which in targets is no class",
    ),
    "one class": (
        [{"words": ["the"], "labels": ["O"]}],
        AS_TRAIN,
        r"^labels=labels: all labels of train=bad.jsonl are 'O'$",
    ),
    "no words column": ([], {"words": "word"}, r"^words=word: train=train.jsonl .*nearest: words$"),
    "no labels column": ([], {"labels": "tags"}, r"^labels=tags: train=train.jsonl has no such c"),
    "slow tokenizer": (
        [],
        {"tokenizer": "slow"},
        r"^tokenizer=slow: ByT5Tokenizer is not a fast one",
    ),
}


@pytest.mark.parametrize(("rows", "change", "message"), BAD_INPUTS.values(), ids=list(BAD_INPUTS))
def test_bad_inputs_are_errors_before_anything_is_trained(
    rows: list[dict[str, Any]], change: dict[str, Any], message: str
):
    if rows:
        save_jsonl("bad.jsonl", rows)
    if change.get("tokenizer") == "slow":
        ByT5Tokenizer().save_pretrained("slow")
    with pytest.raises(ValueError, match=message):
        words_data(**change)


def test_a_length_that_leaves_no_word():
    with pytest.raises(ValueError, match=r"^max_length=2: no word is left in any row$"):
        ready(max_length=2)
