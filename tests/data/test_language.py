"""data=language: targets, blocks, masks, completions, chats and pairs.

Truth: the words looked up one by one, shifted, cut and padded in plain loops.
Run: make test ARGS=tests/data/test_language.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.data.language import Language
from tests.text_files import IDS, SPECIAL, save_jsonl, save_tokenizer, text_of

EOS = IDS["<eos>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CHATS = [
    [("user", "good film"), ("assistant", "very good")],
    [("user", "bad"), ("assistant", "not bad"), ("user", "the plot"), ("assistant", "a good plot")],
]
ROWS = [
    {"text": text_of(i), "prompt": text_of(i), "completion": text_of(i + 1)[::1], "messages": chat}
    for i, chat in enumerate(
        [[{"role": role, "content": text} for role, text in chat] for chat in CHATS * 4]
    )
]


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", str(Path("cache").absolute()))
    save_jsonl("train.jsonl", ROWS)


def ready(kind: str = "gpt", **change: Any) -> Language:
    settings = {"train": "train.jsonl", "val": "train.jsonl", "phase": "adapt"}
    settings |= {"batch_size": 2, "seed": 0, "tokenizer": save_tokenizer(kind, kind)}
    data = Language(**{**settings, **change})
    data.setup("fit")
    return data


def ids(text: str) -> list[int]:
    return [IDS.get(word, IDS["[UNK]"]) for word in text.split()]


def shifted(rows: list[list[int]], learned: list[list[bool]], pad: int) -> tuple[list, list, list]:
    """Inputs, masks and targets, padded, one token at a time."""
    width = max(map(len, rows))
    inputs, masks, targets = [], [], []
    for row, is_learned in zip(rows, learned, strict=True):
        inputs.append([row[t] if t < len(row) else pad for t in range(width)])
        masks.append([int(t < len(row)) for t in range(width)])
        targets.append(
            [row[t + 1] if t + 1 < len(row) and is_learned[t + 1] else -100 for t in range(width)]
        )
    return inputs, masks, targets


def check(data: Language, rows: list[list[int]], learned: list[list[bool]]) -> None:
    inputs, targets = data.train[slice(0, len(rows))]
    expected = shifted(rows, learned, EOS)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == expected[0]
    assert inputs["attention_mask"].tolist() == expected[1]
    assert targets.tolist() == expected[2]


@pytest.mark.parametrize("max_length", [None, 4])
def test_texts_predict_their_next_token_and_their_end(max_length: int | None):
    rows = [[*ids(row["text"]), EOS][:max_length] for row in ROWS]
    check(ready(max_length=max_length), rows, [[True] * len(row) for row in rows])


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_prompts_are_learned_only_if_asked(train_on: str):
    data = ready(prompt="prompt", completion="completion", train_on=train_on)
    parts = [(ids(row["prompt"]), [*ids(row["completion"]), EOS]) for row in ROWS]
    learned = [[train_on == "all"] * len(a) + [True] * len(b) for a, b in parts]
    check(data, [a + b for a, b in parts], learned)


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_of_chats_the_assistants_turns_are_learned(train_on: str):
    tokenizer = save_tokenizer("chat", "gpt", chat_template=TEMPLATE)
    data = ready(messages="messages", train_on=train_on, tokenizer=tokenizer)
    rows, learned = [], []
    for row in ROWS:
        tokens: list[int] = []
        is_learned: list[bool] = []
        for turn in row["messages"]:
            content = [*ids(turn["content"]), EOS]
            tokens += [*ids(turn["role"]), *content]
            is_assistant = turn["role"] == "assistant" or train_on == "all"
            is_learned += [train_on == "all"] + [is_assistant] * len(content)
        rows.append(tokens)
        learned.append(is_learned)
    check(data, rows, learned)


def test_rows_whose_prompt_fills_them_are_told(caplog: pytest.LogCaptureFixture):
    longest = max(len(ids(row["prompt"])) for row in ROWS)
    empty = sum(len(ids(row["prompt"])) == longest for row in ROWS)
    assert 0 < empty < len(ROWS)
    ready(prompt="prompt", completion="completion", max_length=longest)
    says = f"{empty} of the {len(ROWS)} rows of train.jsonl have no token to learn"
    assert says in caplog.text


def test_another_chat_template_gives_other_tokens():
    rows = []
    for template in (TEMPLATE, TEMPLATE.replace("<eos>", "film <eos>")):
        tokenizer = save_tokenizer("chat", "gpt", chat_template=template)
        data = ready(messages="messages", tokenizer=tokenizer)
        rows.append(data.train[torch.tensor([0])][0]["input_ids"].shape[1])
    assert rows[1] == rows[0] + len(CHATS[0])


def test_blocks_are_the_documents_one_behind_the_other():
    stream = [token for row in ROWS for token in [*ids(row["text"]), EOS]]
    rows = [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]
    data = ready(block=5)
    assert len(data.train) == len(rows)
    check(data, rows, [[True] * 5] * len(rows))
    kept = ready(block=5, val=None, val_share=0.25)
    lengths = [len(ids(row["text"])) + 1 for row in ROWS]
    train = set(kept.chosen()[0][1].tolist())
    assert len(kept.train) == sum(n for i, n in enumerate(lengths) if i in train) // 5


def test_a_text_file_is_one_document_whose_end_validates():
    words = [text_of(i) for i in range(30)]
    Path("book.txt").write_text("\n\n".join(words))
    data = ready(train="book.txt", val=None, block=8, val_share=0.25)
    stream = [*ids(" ".join(words)), EOS]
    cut = round(len(stream) * 0.75)
    for rows, part in ((data.train, stream[:cut]), (data.val, stream[cut:])):
        inputs, _ = rows[slice(0, len(rows))]
        assert inputs["input_ids"].flatten().tolist() == part[: len(part) // 8 * 8]


def test_masks_are_drawn_by_seed_epoch_and_row_as_bert_draws_them():
    save_jsonl("many.jsonl", [{"text": " ".join([text_of(i)] * 20)} for i in range(200)])
    settings = {"train": "many.jsonl", "val": "many.jsonl", "objective": "masked"}
    data = ready("bert", **settings, mask_share=0.3)
    inputs, targets = data.train[slice(0, 200)]
    chosen = targets != -100
    whole = data.train.rows[slice(0, 200)][0]["input_ids"]
    special = torch.isin(whole, torch.tensor([IDS[word] for word in SPECIAL if word != "<eos>"]))
    assert not (chosen & special).any()
    assert torch.equal(targets[chosen], whole[chosen])
    assert torch.equal(inputs["input_ids"][~chosen], whole[~chosen])
    n = int((~special).sum())
    masked = (inputs["input_ids"] == IDS["[MASK]"])[chosen].float().mean()
    kept = (inputs["input_ids"] == whole)[chosen].float().mean()
    # Standard deviations: √(0.3·0.7/n), √(0.8·0.2/0.3n); a drawn token may be the one it replaces.
    assert abs(chosen.sum() / n - 0.3) < 4 * (0.21 / n) ** 0.5
    assert abs(masked - 0.8 - 0.1 / len(IDS)) < 4 * (0.16 / (0.3 * n)) ** 0.5
    assert abs(kept - 0.1 - 0.1 / len(IDS)) < 4 * (0.1 / (0.3 * n)) ** 0.5

    one = data.train[torch.tensor([7])][0]["input_ids"][0]  # whatever it is padded to
    assert torch.equal(one, inputs["input_ids"][7, : len(one)])
    val = data.val[torch.tensor([7])][0]["input_ids"][0]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)  # pyright: ignore
    assert not torch.equal(one, data.train[torch.tensor([7])][0]["input_ids"][0])
    assert torch.equal(val, data.val[torch.tensor([7])][0]["input_ids"][0])
    loader.sampler.set_epoch(0)  # pyright: ignore
    again = ready("bert", **settings, mask_share=0.3)
    assert torch.equal(one, again.train[torch.tensor([7])][0]["input_ids"][0])


def test_an_encoder_decoder_is_given_its_targets_shifted_right():
    save_tokenizer("t5", "t5")
    config = {"model_type": "t5", "decoder_start_token_id": 0, "pad_token_id": 0, "vocab_size": 50}
    Path("t5/config.json").write_text(json.dumps(config))
    data = ready(
        "t5", prompt="prompt", completion="completion", objective="seq2seq", tokenizer="t5"
    )
    assert data.sizes == {"out_features": 50}
    inputs, targets = data.train[slice(0, 8)]
    sources = [[*ids(row["prompt"]), EOS] for row in ROWS]
    rows = [[*ids(row["completion"]), EOS] for row in ROWS]
    for i, (source, row) in enumerate(zip(sources, rows, strict=True)):
        short = targets.shape[1] - len(row)
        assert targets[i].tolist() == row + [-100] * short
        assert inputs["decoder_input_ids"][i].tolist() == [0, *row[:-1], *[0] * short]
        short = inputs["input_ids"].shape[1] - len(source)
        assert inputs["input_ids"][i].tolist() == source + [0] * short
        assert inputs["attention_mask"][i].tolist() == [1] * len(source) + [0] * short


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "half a pair": (
        {"prompt": "prompt"},
        r"^completion: must be given with prompt=prompt, which is its pair$",
    ),
    "two kinds": ({"text": "text", "messages": "messages"}, r"text=text, messages=messages: give"),
    "missing column": ({"text": "txt"}, r"text=txt: train=train.jsonl has no such .*nearest: text"),
    "masked prompts": (
        {"prompt": "prompt", "completion": "completion", "objective": "masked"},
        r"objective=masked: needs data.text, not data.prompt",
    ),
    "seq2seq of texts": (
        {"objective": "seq2seq"},
        r"needs data.prompt and data.completion, not data.text",
    ),
    "masks without a mask": (
        {"objective": "masked"},
        r"objective=masked: tokenizer=gpt has no mask token",
    ),
    "no template": (
        {"messages": "messages"},
        r"messages=messages: tokenizer=gpt has no chat template",
    ),
    "no decoder": (
        {"prompt": "prompt", "completion": "completion", "objective": "seq2seq"},
        r"objective=seq2seq: tokenizer=gpt has no config.json",
    ),
    "text without blocks": (
        {"train": "book.txt"},
        r"block=null: train=book.txt is text, .* block=TOKENS",
    ),
    "large block": (
        {"block": 500},
        r"block=500: more than all tokens of train=train.jsonl for train",
    ),
    "no chat": (
        {"messages": "text", "tokenizer": "chat"},
        r"train.jsonl, line 1: 'text' is no chat",
    ),
    "no assistant": (
        {"messages": "messages", "tokenizer": "chat", "train": "bad.jsonl"},
        r"train=bad.jsonl, line 2: no turn of 'messages' is the assistant's \(roles: user\)",
    ),
    "nothing to learn": (
        {"prompt": "prompt", "completion": "completion", "max_length": 2},
        r"max_length=2: no token to learn is left in any row",
    ),
    "template refuses": (
        {"messages": "messages", "tokenizer": "strict"},
        r"messages: the chat template refuses",
    ),
    "template rewrites": (
        {"messages": "messages", "tokenizer": "rewrites"},
        r"train_on=completion: .*train_on=all",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_errors(change: dict[str, Any], message: str):
    Path("book.txt").write_text("the plot")
    user = [{"role": "user", "content": "good"}]
    save_jsonl("bad.jsonl", [ROWS[0], {**ROWS[1], "messages": user}])
    save_tokenizer("chat", "gpt", chat_template=TEMPLATE)
    save_tokenizer("strict", "gpt", chat_template="{{ raise_exception('no system') }}")
    save_tokenizer("rewrites", "gpt", chat_template="{{ messages | length }}" + TEMPLATE)
    with pytest.raises(ValueError, match=message):
        ready(**change)


def test_texts_are_put_in_their_templates():
    plain = ready(prompt="prompt", completion="completion")
    put = {"prompt": "user {} answer", "completion": "the {}"}
    data = ready(prompt="prompt", completion="completion", templates=put)
    for i in range(len(plain.train)):
        (before, _), (after, _) = (d.train[slice(i, i + 1)] for d in (plain, data))
        prompt, completion = (ROWS[plain.train.rows[i]][k].split() for k in put)
        words = ["user", *prompt, "answer", "the", *completion, "<eos>"]
        assert after["input_ids"].tolist() == [[IDS[word] for word in words]]
        assert before["input_ids"].shape[1] == len(words) - 3
    for templates, message in (
        ({"text": "{}"}, r"templates={text: …}: the texts that are read are prompt, completion"),
        ({"prompt": "no place"}, r"must have one {} for the text"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(prompt="prompt", completion="completion", templates=templates)
