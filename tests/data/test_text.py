"""data=text: what its batches hold, what is cached, and which inputs are refused.

Truth: the words looked up one by one and padded in plain loops; for bad inputs, the file, the line
and the nearest name that their messages have to say. Run: make test ARGS=tests/data/test_text.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.config.schema import ConfigError
from lora_lab.data import tokens
from lora_lab.data.text import Text
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.text_files import IDS, save_jsonl, save_rows, save_tokenizer, text_of

ROWS = [
    {"text": "good film", "label": "good", "score": 1.5, "other": "the plot"},
    {"text": "the plot is bad", "label": "bad", "score": -2, "other": "not"},
    {"text": "very good", "label": "good", "score": 0.25, "other": "a film"},
    {"text": "bad bad bad", "label": "bad", "score": 3, "other": "good"},
]


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", str(Path("cache").absolute()))
    save_jsonl("train.jsonl", ROWS)
    save_jsonl("val.jsonl", ROWS[1:])
    save_tokenizer("tokenizer")


def text_data(**change: Any) -> Text:
    settings = {"train": "train.jsonl", "val": "val.jsonl", "text": "text", "label": "label"}
    settings |= {"tokenizer": "tokenizer", "batch_size": 2, "seed": 0, "phase": "adapt"}
    return Text(**{**settings, **change})


def ready(**change: Any) -> Text:
    data = text_data(**change)
    data.setup("fit")
    return data


def padded(texts: list[list[str]], multiple: int = 1) -> dict[str, list[list[int]]]:
    """Rows of one or two texts as BERT has them, by hand."""
    ids, types = [], []
    for row in texts:
        words = ["[CLS]", *row[0].split(), "[SEP]"]
        segment = [0] * len(words)
        if len(row) == 2:
            words += [*row[1].split(), "[SEP]"]
            segment += [1] * (len(words) - len(segment))
        ids.append([IDS[word] for word in words])
        types.append(segment)
    width = max(map(len, ids))
    while width % multiple:
        width += 1
    fill = [width - len(row) for row in ids]
    return {
        "input_ids": [row + [IDS["[PAD]"]] * n for row, n in zip(ids, fill, strict=True)],
        "token_type_ids": [row + [0] * n for row, n in zip(types, fill, strict=True)],
        "attention_mask": [[1] * (width - n) + [0] * n for n in fill],
    }


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_batches_are_padded_to_their_longest_row(columns: list[str], multiple: int):
    data = ready(text=columns, pad_to_multiple=multiple)
    for numbers in (torch.tensor([3, 0]), torch.tensor([1]), torch.tensor([2, 1, 3])):
        inputs, targets = data.train[numbers]
        expected = padded([[ROWS[i][c] for c in columns] for i in numbers.tolist()], multiple)
        assert {name: tensor.tolist() for name, tensor in inputs.items()} == expected
        labels = ["bad", "good"]
        assert targets.tolist() == [labels.index(ROWS[i]["label"]) for i in numbers.tolist()]
    (inputs, targets), *_ = data.val_dataloader()
    assert (
        inputs["input_ids"].tolist()
        == padded([[r[c] for c in columns] for r in ROWS[1:]], multiple)["input_ids"]
    )


def test_long_texts_are_cut():
    data = ready(max_length=4)
    assert data.train[torch.tensor([1])][0]["input_ids"].tolist() == [
        [IDS[word] for word in ("[CLS]", "the", "plot", "[SEP]")]
    ]


def test_regression_has_a_number_a_row():
    data = ready(task="regression", label="score")
    assert data.sizes["out_features"] == 1
    assert torch.equal(data.train[slice(0, 4)][1], torch.tensor([[1.5], [-2], [0.25], [3]]))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "saved", "folder", "json"])
def test_all_kinds_of_sources_have_the_same_rows(suffix: str):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in ROWS])
    path = f"rows.{suffix}"
    if suffix in ("csv", "tsv"):
        rows.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    elif suffix == "parquet":
        rows.to_parquet(path)
    elif suffix == "saved":
        DatasetDict({"train": rows, "validation": rows.select([0, 1])}).save_to_disk(path)
    elif suffix == "folder":
        Path(path, "val").mkdir(parents=True)
        for name, part in (("train-1", ROWS[:2]), ("train-2", ROWS[2:]), ("val/a", ROWS[:2])):
            save_jsonl(f"{path}/{name}.jsonl", part)
    elif suffix == "json":
        Path(path).write_text(json.dumps(ROWS))
    else:
        path = "train.jsonl"
    data = ready(train=path, val=path)
    expected = ready().train[slice(0, 4)]
    inputs, targets = data.train[slice(0, 4)]
    assert torch.equal(inputs["input_ids"], expected[0]["input_ids"])
    assert torch.equal(targets, expected[1])
    assert len(data.val) == (2 if suffix in ("saved", "folder") else 4)
    if suffix in ("saved", "folder"):
        assert len(ready(train=f"{path}:{'validation' if suffix == 'saved' else 'val'}").train) == 2


def test_classes_are_as_configured_or_sorted_or_a_hub_sets():
    from datasets import ClassLabel, Dataset, Features, Value

    assert text_data().class_names == ("bad", "good")
    data = ready(classes=["good", "bad", "unknown"])
    assert data.train[slice(0, 4)][1].tolist() == [0, 1, 0, 1]
    assert data.sizes == {"out_features": 3, "pad_token_id": IDS["[PAD]"]}
    save_jsonl("int.jsonl", [{"text": text_of(i), "label": i % 11} for i in range(22)])
    data = ready(train="int.jsonl", val="int.jsonl")
    assert data.train[slice(0, 22)][1].tolist() == [i % 11 for i in range(22)]
    data = ready(train="int.jsonl", val="int.jsonl", classes=[f"c{i}" for i in range(11)])
    assert data.train[slice(0, 22)][1].tolist() == [i % 11 for i in range(22)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    rows = {"text": ["good", "bad"], "label": [1, 0]}
    Dataset.from_dict(rows, features=features).save_to_disk("saved")
    data = ready(train="saved", val="saved")
    assert data.class_names == ("zebra", "ant")
    assert data.train[slice(0, 2)][1].tolist() == [1, 0]


def test_a_share_of_train_validates_and_limits_are_nested():
    save_rows("many.jsonl", 50)

    def numbers(**change: Any) -> tuple[set[int], set[int]]:
        data = ready(train="many.jsonl", val=None, val_share=0.2, **change)
        return set(data.train.rows.tolist()), set(data.val.rows.tolist())

    train, val = numbers()
    assert (len(train), len(val)) == (40, 10)
    assert train | val == set(range(50))
    assert numbers(seed=1)[1] != val
    less, least = (numbers(limit=n, val_limit=3) for n in (20, 10))
    assert (len(less[0]), len(least[0]), len(least[1])) == (20, 10, 3)
    assert least[0] < less[0] < train
    assert least[1] < val


def test_batches_are_a_function_of_seed_phase_and_epoch():
    save_rows("many.jsonl", 40)

    def order(epoch: int = 0, **change: Any) -> list[list[list[int]]]:
        data = ready(train="many.jsonl", base="many.jsonl", batch_size=8, **change)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        torch.manual_seed(torch.seed() % 1000)
        return [inputs["input_ids"].tolist() for inputs, _ in loader]

    assert order() == order()
    assert order() not in (order(1), order(seed=1), order(phase="base"))


def test_the_base_phase_needs_rows_only_when_it_is_used():
    data = text_data(phase="base")
    assert data.sizes["out_features"] == 2
    with pytest.raises(ValueError, match=r"^base=null: base=train learns the rows of data.base"):
        data.setup("fit")
    assert len(ready(phase="base", base="train.jsonl", val_share=0.5).train) == 2


def test_a_base_that_is_trained_needs_rows_to_learn():
    settings = ["data=text", "data.train=train.jsonl", "data.val=val.jsonl", "data.batch_size=2"]
    settings += ["data.tokenizer=tokenizer", "+model.in_features=4", "target=all"]
    plan(composed(*settings, "data.base=train.jsonl", "data.val_share=0.5"))
    with pytest.raises(ConfigError, match=r"^data\.base=null: base=train learns the rows"):
        plan(composed(*settings))


def test_files_that_no_split_names_are_told(caplog: pytest.LogCaptureFixture):
    Path("rows").mkdir()
    for name in ("train", "a", "b"):
        save_jsonl(f"rows/{name}.jsonl", ROWS)
    assert len(ready(train="rows").train) == len(ROWS)
    assert "files named by no split are not read (a.jsonl, b.jsonl)" in caplog.text


def test_the_test_split():
    ((inputs, _),) = ready(test="train.jsonl", limit=3, val_limit=1).test_dataloader()
    assert inputs["input_ids"].tolist() == padded([[row["text"]] for row in ROWS])["input_ids"]
    base = ready(phase="base", base="train.jsonl", val_share=0.5, test="train.jsonl")
    assert base.test is ready().test is None


def test_texts_are_tokenized_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    encode = tokens._encoded
    monkeypatch.setattr(tokens, "_encoded", lambda *args: calls.append(args[0]) or encode(*args))
    first = ready(val="train.jsonl")
    assert calls == ["train.jsonl"]
    ready(val="train.jsonl", seed=1, batch_size=1, limit=3)
    Path("copy.jsonl").write_bytes(Path("train.jsonl").read_bytes())
    ready(train="copy.jsonl", val="copy.jsonl")
    assert calls == ["train.jsonl"]
    save_jsonl("copy.jsonl", [*ROWS, ROWS[0]])
    assert len(ready(train="copy.jsonl", val="copy.jsonl").train) == 5
    ready(val="train.jsonl", max_length=3)
    assert calls == ["train.jsonl", "copy.jsonl", "train.jsonl"]
    del first


def test_pairs_and_texts_have_tokens_of_their_own():
    ready(text=["text", "other"], val="train.jsonl")
    # The same texts in the same order as the pairs' two columns.
    texts = [row[column] for column in ("text", "other") for row in ROWS]
    save_jsonl("texts.jsonl", [{"text": text, "label": len(text) % 2} for text in texts])
    data = ready(train="texts.jsonl", val="texts.jsonl")
    inputs, _ = data.train[slice(0, len(texts))]
    assert inputs["input_ids"].tolist() == padded([[text] for text in texts])["input_ids"]


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_cache_is_made_again(damage: str):
    expected, _ = ready().train[slice(0, 4)]
    for file in Path("cache/tokens").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content if damage == "bit" else content[:-5])
    inputs, _ = ready().train[slice(0, 4)]
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def jsonl(*rows: Any) -> dict[str, str]:
    """bad.jsonl of these rows; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return {"bad.jsonl": "\n".join(lines) + "\n"}


GOOD, BAD = {"text": "good film", "label": "good"}, {"text": "bad film", "label": "bad"}
AS_TRAIN, AS_VAL = {"train": "bad.jsonl", "val": None}, {"val": "bad.jsonl"}
AS_TEST = {"test": "bad.jsonl"}
CSV = {"train": "bad.csv", "val": None}
BAD_INPUTS: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "missing file": (
        {},
        {"train": "tran.jsonl"},
        r"train=tran.jsonl: no such .*nearest: train.jsonl",
    ),
    "split of a file": (
        {},
        {"val": "train.jsonl:test"},
        r"val=train.jsonl:test: a file has no splits; val=train.jsonl reads its rows",
    ),
    "revision of a file": (
        {},
        {"revision": "main"},
        r"revision=main: of a hub id only, and train=",
    ),
    "missing folder": ({}, {"val": "no/val.csv"}, r"val=no/val.csv: .* folder no$"),
    "folder without rows": (
        {"x/a.md": "a"},
        {"train": "x"},
        r"train=x: no files of rows .*\.jsonl",
    ),
    "unknown suffix": ({"a.jsnl": "{}"}, {"train": "a.jsnl"}, r"a.jsnl: files .*nearest: \.jsonl"),
    "no split": (
        {"x/test.csv": "a"},
        {"train": "x"},
        r"train=x: has no split train \(it has test\)",
    ),
    "wrong split": ({"x/train.csv": "a"}, {"train": "x:trian"}, r"no split trian.*nearest: train"),
    "two kinds": (
        {"x/a.csv": "a", "x/b.txt": "b"},
        {"train": "x"},
        r"one kind .* csv, text|text, csv",
    ),
    "empty file": ({"bad.jsonl": ""}, AS_TRAIN, r"train=bad.jsonl: bad.jsonl is empty"),
    "only a header": ({"bad.csv": "text,label\n"}, CSV, r"train=bad.csv: holds no rows"),
    "broken JSON": (
        jsonl(GOOD, "", '{"text": "a", label'),
        AS_TRAIN,
        r"bad.jsonl line 3: broken JSON",
    ),
    "no object": (
        jsonl(GOOD, "[1, 2]"),
        AS_TRAIN,
        r"bad.jsonl line 2: a row is a JSON object.* list",
    ),
    "no UTF-8": ({"bad.csv": "text,label\ngood,\udcff\n"}, CSV, r"bad.csv line 2: no UTF-8 .*0xff"),
    "no text column": (
        {},
        {"text": "txt"},
        r"^text=txt: train=train.jsonl .*it has text, label.*: text$",
    ),
    "no label column": (
        {},
        {"label": "lable"},
        r"^label=lable: train=train.jsonl .*nearest: label",
    ),
    "three columns": ({}, {"text": ["a", "b", "c"]}, r"text=\['a', 'b', 'c'\]: must be one column"),
    "empty text": (
        jsonl(GOOD, "", {**BAD, "text": " "}),
        AS_TRAIN,
        r"bad.jsonl, line 3: 'text' is an emp",
    ),
    "no text": (
        jsonl(GOOD, {"label": "bad"}),
        AS_TRAIN,
        r"train=bad.jsonl, line 2: 'text' is missing",
    ),
    "number for a text": (
        jsonl({**GOOD, "text": 3}, {**BAD, "text": 4}),
        AS_TRAIN,
        r"line 1: 'text' is a int",
    ),
    "empty text in a CSV": (
        {"bad.csv": 'text,label\n"a\nb",1\n"",2\n'},
        CSV,
        r"bad.csv, line 4: 'text'",
    ),
    "no label": (
        jsonl(GOOD, BAD, {"text": "film"}),
        AS_TRAIN,
        r"bad.jsonl, line 3: 'label' is missing",
    ),
    "no label in a CSV": (
        {"bad.csv": "text,label\na,1\nb,\n"},
        CSV,
        r"bad.csv, line 3: 'label' is missing",
    ),
    "list for a label": (jsonl({**GOOD, "label": [1]}, BAD), AS_TRAIN, r"line 1: 'label' is \[1\]"),
    "number for a class": (
        jsonl({**GOOD, "label": 0.5}, {**BAD, "label": 1}),
        AS_TRAIN,
        r"line 1: .* 0.5",
    ),
    "numbers and texts": (
        jsonl(GOOD, {**BAD, "label": 1}),
        AS_TRAIN,
        r"label=label: .*both numbers and tex",
    ),
    "one class": (
        jsonl(GOOD, GOOD),
        AS_TRAIN,
        r"label=label: all rows of train=bad.jsonl are 'good'",
    ),
    "not in classes": (
        {},
        {"classes": ["good", "bat"]},
        r"train.jsonl, line 2: 'label' is 'bad'.*: bat$",
    ),
    "classes twice": (
        {},
        {"classes": ["good", "good"]},
        r"classes=\['good', 'good'\]: must be .* different",
    ),
    "new in validation": (
        jsonl(BAD, {**GOOD, "label": "god"}),
        AS_VAL,
        r"val=bad.jsonl, line 2: .* of training .*: good",
    ),
    "new in the test": (
        jsonl(BAD, {**GOOD, "label": "god"}),
        AS_TEST,
        r"^test=bad.jsonl, line 2: .* of training .*: good",
    ),
    "no label in the test": (
        jsonl({"text": "film"}),
        AS_TEST,
        r"^label=label: test=bad.jsonl has no such column \(it has text\)",
    ),
    "no text in the test": (
        jsonl({"label": "good"}),
        AS_TEST,
        r"^text=text: test=bad.jsonl has no",
    ),
    "empty test": ({"bad.jsonl": ""}, AS_TEST, r"^test=bad.jsonl: bad.jsonl is empty"),
    "no test split": ({"x/train.csv": "a"}, {"test": "x"}, r"^test=x: has no split test"),
    "integers beside sorted labels": (
        jsonl({**GOOD, "label": 0}, {**BAD, "label": 1}),
        AS_VAL,
        r"'label' is '0', which is not in .*training \(bad, good\); data.classes=\[NAME,…\] says",
    ),
    "integers beside other integers": (
        {
            "train.jsonl": '{"text": "a", "label": 5}\n{"text": "b", "label": 6}\n',
            **jsonl({**GOOD, "label": 0}),
        },
        AS_VAL,
        r"'label' is '0', which is not in .*training \(5, 6\)",
    ),
    "index too large": (
        jsonl({**GOOD, "label": 0}, {**BAD, "label": 2}),
        {**AS_TRAIN, "classes": ["a", "b"]},
        r"line 2: 'label' is '2', which is not in the classes \(a, b\)",
    ),
    "no number": (
        jsonl({**GOOD, "label": "2.5"}, BAD),
        {**AS_TRAIN, "task": "regression"},
        r"line 2: .*'bad', regr",
    ),
    "no share": (
        {},
        {"val": None, "val_share": 0.01},
        r"val_share=0.01: leaves none of 4 rows for val",
    ),
    "all is held out": (
        {},
        {"val": None, "val_share": 0.99},
        r"leaves none of 4 rows for training",
    ),
    "share is null": ({}, {"val": None, "val_share": None}, r"val_share=None: leaves none"),
    "shares": ({}, {"val": None, "shares": [0.5, 0.2, 0.2]}, r"shares=.*three that sum to 1"),
    "two shares": ({}, {"val": None, "shares": [0.5, 0.5]}, r"shares=.*three that sum to 1"),
    "an empty share": (
        {},
        {"val": None, "shares": [0.8, 0.1, 0.1]},
        r"shares=.* leaves none of 4 rows for one of them",
    ),
    "shares and a file": ({}, {"shares": [0.5, 0.25, 0.25]}, r"from train, and val=val.jsonl"),
    "balance alone": ({}, {"balance": True}, r"balance=true: needs data.shares"),
    "names of JSON": ({}, {"column_names": ["a"]}, r"column_names=\['a'\]: of .csv and .tsv"),
    "no line of names": (
        {"bad.tsv": "good\ta\nbad\t\n"},
        {"train": "bad.tsv", "val": None, "column_names": ["label", "text"]},
        r"train=bad.tsv, line 2: 'text' is an empty text",
    ),
    "large batch": ({}, {"batch_size": 5}, r"batch_size=5 is more than the 4 training rows"),
    "no tokenizer": ({}, {"tokenizer": None}, r"tokenizer: must be given"),
    "tokenizer missing": (
        {},
        {"tokenizer": "./tokenizr"},
        r"tokenizer=./tokenizr: no such .*: ./tokenizer",
    ),
    "no tokenizer in it": ({"x/a": "b"}, {"tokenizer": "x"}, r"^tokenizer=x: "),
}


@pytest.mark.parametrize(
    ("written", "change", "message"), BAD_INPUTS.values(), ids=list(BAD_INPUTS)
)
def test_bad_inputs_are_errors_before_anything_is_trained(
    written: dict[str, str], change: dict[str, Any], message: str
):
    for name, content in written.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        text_data(**change)


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(ValueError, match=r"^train=imdb: .*no hub is reachable.*local file"):
        text_data(train="imdb")
    with pytest.raises(ValueError, match=r"^tokenizer=org/name: .*no hub is reachable"):
        text_data(tokenizer="org/name")
