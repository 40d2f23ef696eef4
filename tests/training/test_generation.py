"""Texts that a run's model generates: generate=…

Independent truth: a plain greedy loop over transformers' model of the merged weights, without a
cache, row by row; transformers' own beam search of single rows; sacrebleu, rouge_score and a
regular expression on the texts in the file.

Run: make test ARGS=tests/training/test_generation.py
"""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers

from lora_lab import adapters
from lora_lab.config.generate import Generate
from lora_lab.data.language import Language
from lora_lab.data.prompts import prompts, tokens_of
from lora_lab.models.pretrained import load_weights
from lora_lab.runs import Run
from lora_lab.sweeps.packs import reason_to_run_alone
from lora_lab.tracking.wandb_run import read_records
from lora_lab.training.generation import generate
from lora_lab.training.restore import restore
from lora_lab.training.text_metrics import answer_of, comparable, text_metrics
from tests.conftest import SMALL, Lab, command, only_run
from tests.packing.test_packing import plans_of, train_in_pack, train_one_by_one
from tests.text_files import save_jsonl
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training.test_resume import assert_equal, steps

EOS = 6
ANIMALS = ("cat", "dog", "bird", "fish")
ROWS = [
    {
        "prompt": f"the {size} {animal}" + " and the cat" * (i // 12),
        "completion": f"{animal} {verb} good {animal}",
    }
    for i, (animal, verb) in enumerate(
        zip(ANIMALS * 6, ("runs", "sleeps", "eats") * 8, strict=True)
    )
    for size in ("big", "small")
]
"""48 rows of 16 prompts of two lengths, each with three different completions."""

ANSWER = "generate.answer='(cat|dog|bird|fish)'"
SETTINGS = (
    *("data=language", "data.train=rows.jsonl", "data.val=rows.jsonl", "data.prompt=prompt"),
    *("data.completion=completion", "model=pretrained", "model.path=model", "base=pretrained"),
    *("target=linear", "trainer.accelerator=cpu", "trainer.max_epochs=8", "optimizer.lr=0.02"),
    *("adapter.r=8", "adapter.alpha=8", "spectra.truncation=none", "spectra.against_base=false"),
)
FAMILIES = {"gpt2": ("language", "causal"), "llama": ("language", "causal")}
FAMILIES["t5"] = ("seq2seq", "seq2seq")


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", str(Path("cache").absolute()))
    monkeypatch.setitem(SMALL, "digits", [])
    save_jsonl("rows.jsonl", ROWS)


def settings(family: str, *more: str) -> tuple[str, ...]:
    """The settings of a run over a tiny model of a family, which is written to model/."""
    head, objective = FAMILIES[family]
    tiny_model(family, "model", head)
    return (*SETTINGS, f"model.head={head}", f"data.objective={objective}", *more)


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "generated.jsonl").read_text().splitlines()]


def greedy(model: Any, prompt: str, new: int) -> str:
    """The likeliest token, `new` times or until the end of text, with no cache and no padding."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    encoded, text = torch.tensor([ids]), []
    for _ in range(new):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(encoded, decoder_input_ids=torch.tensor([[0, *text]])).logits
            else:
                logits = model(torch.tensor([[*ids[:-1], *text]])).logits  # without [SEP]
        text.append(int(logits[0, -1].argmax()))
        if text[-1] == EOS:
            break
    return tokenizer.decode(text, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_texts_and_metrics_are_those_of_plain_loops_and_libraries(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, family: str
):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    more = ["generate.metrics=[exact_match,bleu,rouge1,rougeL]", ANSWER, "adapter.dropout=0.1"]
    more += ["generate.max_new_tokens=6", "generate.batch_rows=3", "generate.rows=7"]
    precision = "trainer.precision=64-true"
    offline = {"tracking": "offline" if family == "gpt2" else "off"}
    assert lab("digits", *settings(family, *more, precision), **offline) == 0
    run = only_run()
    lines = lines_of(run)
    assert command(monkeypatch, "export", str(run.path), "merged", "--format", "merged") == 0
    auto = (
        transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    )
    merged = auto.from_pretrained("merged", dtype=torch.float64).eval()
    base = auto.from_pretrained("model", dtype=torch.float64).eval()
    texts = [line["text"] for line in lines]
    assert texts == [greedy(merged, line["prompt"], 6) for line in lines]
    assert texts != [greedy(base, line["prompt"], 6) for line in lines]
    assert len({*texts}) > 1

    by_prompt = {row["prompt"]: [] for row in ROWS}
    for row in ROWS:
        by_prompt[row["prompt"]].append(row["completion"])
    assert len(by_prompt) == 16
    assert [line["references"] for line in lines] == [by_prompt[line["prompt"]] for line in lines]
    assert len(lines) == 7

    pattern = "(cat|dog|bird|fish)"
    for line in lines:
        answers = re.findall(pattern, line["text"])
        assert line["answer"] == (answers[-1] if answers else None)
        wanted = {re.findall(pattern, one)[-1] for one in line["references"]}
        assert line["correct"] == (line["answer"] in wanted)
    references = [line["references"] for line in lines]
    scorer = RougeScorer(["rouge1", "rougeL"])
    of_texts = [
        max((scorer.score(one, text) for one in of), key=lambda score: score[name].fmeasure)[name]
        for name in ("rouge1", "rougeL")
        for of, text in zip(references, texts, strict=True)
    ]
    expected = {
        "exact_match": sum(line["correct"] for line in lines) / 7,
        "bleu": corpus_bleu(texts, [list(one) for one in zip(*references, strict=True)]).score,
        "rouge1": sum(score.fmeasure for score in of_texts[:7]) / 7,
        "rougeL": sum(score.fmeasure for score in of_texts[7:]) / 7,
    }
    logged = {name: run.last(f"generate/{name}") for name in expected}
    assert logged == pytest.approx(expected, rel=1e-12)
    assert expected["rouge1"] > 0.1
    facts = (run.path / "report/facts.csv").read_text()
    assert "exact_match of texts generated from val" in facts
    if family == "gpt2":
        check_wandb(run, lines)
        (run.path / "generated.jsonl").write_text("{}\n")
        assert Run(run.path).status["error"].startswith("generated.jsonl is cut")


def check_wandb(run: Run, lines: list[dict[str, Any]]) -> None:
    """The table that W&B's client has written offline, and the row."""
    folder = run.path / run.status["wandb"]
    (table,) = folder.glob("files/media/table/generate/texts_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "references", "text", "answer", "correct"]
    rows = [{**line, "references": "\n".join(line["references"])} for line in lines]
    assert content["data"] == [list(row.values()) for row in rows]
    (file,) = folder.glob("*.wandb")
    keys = {i.key or "/".join(i.nested_key) for r in read_records(file) for i in r.history.item}
    assert "generate/bleu" in keys


BEAMS: list[dict[str, Any]] = [
    {"max_new_tokens": 6},
    {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 3.0},
    {"max_new_tokens": 6, "num_beams": 3, "length_penalty": -3.0},
    {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 3.0, "no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("family", ["gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_text_is_the_same_in_any_batch_and_by_transformers_alone(family: str):
    head, objective = FAMILIES[family]
    tiny_model(family, "model", head)
    model: Any = load_weights("model", head, dropout=0.5)  # pyright: ignore[reportArgumentType]
    adapters.attach(model, "linear", r=4, alpha=16)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for adapter in adapters.attached(model).values():
            adapter.B.normal_()
    model.double()
    ends = [EOS, *range(14, 24)]  # so that texts have all lengths
    model.generation_config.eos_token_id = ends
    data = language(objective=objective)
    chosen = prompts(data, "val", None)[5:9]
    rows = tokens_of(data, chosen)
    assert len({*map(len, rows)}) == 2
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    by_settings = []
    for beams in BEAMS:
        lines, _ = generate(trainer, model, data, chosen, Generate.model_validate(beams))
        assert model.training  # as before
        texts = []
        for row in rows:
            arguments = {**beams, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
            (ids,) = model.eval().generate(torch.tensor([row]), **arguments)
            new = ids[len(row) :] if objective == "causal" else ids
            texts.append(tiny_tokenizer().decode(new, skip_special_tokens=True))
            model.train()
        assert [line.text for line in lines] == texts
        by_settings.append(texts)
    assert all(by_settings[i] != by_settings[j] for i in range(4) for j in range(i)), by_settings
    given = Generate.model_validate({**BEAMS[0], "batch_rows": 1})
    lines, _ = generate(trainer, model, data, chosen, given)
    assert [line.text for line in lines] == by_settings[0]


def language(**change: Any) -> Language:
    given = {"train": "rows.jsonl", "val": "rows.jsonl", "phase": "adapt", "batch_size": 8}
    given |= {"seed": 0, "tokenizer": "model", "max_length": 64}
    if "messages" not in change:
        given |= {"prompt": "prompt", "completion": "completion"}
    return Language(**{**given, **change})


def test_a_chat_is_continued_where_its_last_answer_begins():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "[BOS] {% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}good{% endif %}"
    )
    tokenizer.save_pretrained("model")
    turns = ["the cat", "runs", "the dog", "sleeps", "not bad"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    chat = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    save_jsonl("chats.jsonl", [{"messages": chat[:4]}, {"messages": chat}] * 8)
    data = language(messages="messages", train="chats.jsonl", val="chats.jsonl")
    (prompt,) = prompts(data, "val", None)
    assert prompt.text == "[BOS] u the cat a runs u the dog good"
    assert prompt.references == ("sleeps",) * 16
    words = "[BOS] [UNK] the cat a runs [UNK] the dog good"
    assert tokenizer.convert_ids_to_tokens(tokens_of(data, [prompt])[0]) == words.split()


def test_a_long_prompt_loses_its_beginning(caplog: pytest.LogCaptureFixture):
    tiny_model("gpt2", "model", "language")
    save_jsonl("long.jsonl", [{"prompt": "the cat " * n, "completion": "a"} for n in (40, 1)])
    data = language(val="long.jsonl", max_length=64)
    model = load_weights("model", "language")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    generate(trainer, model, data, prompts(data, "val", None), Generate(max_new_tokens=4))
    assert "1 of 2 prompts begin later: the model has 64 positions" in caplog.text


@pytest.mark.slow
def test_in_a_pack_each_run_writes_what_it_writes_by_itself():
    points = [["adapter.r=2"], ["adapter.r=4", "seed=1"]]
    more = ["trainer.precision=64-true", "trainer.max_epochs=2", "generate={max_new_tokens: 5}"]
    more += ["model.dropout=0"]  # whose masks are others in a pack
    given = settings("gpt2", *more)
    pack = train_in_pack("digits", points, *given)
    assert [run.status["packed"] for run in pack] == [2, 2]
    (alone,) = train_one_by_one("digits", points[1:], *given)
    assert lines_of(pack[1]) == lines_of(alone)
    assert lines_of(pack[0]) != lines_of(alone)


@pytest.mark.slow
def test_texts_during_training_and_after_a_stop(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    every_two = (
        "every_n_steps: 2, step_rows: 4, metrics: [rouge1], max_new_tokens: 5, batch_rows: 1"
    )
    more = [f"generate={{{every_two}}}", "checkpoint_every=0"]
    more += ["data.batch_size=8", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2"]
    more += ["trainer.precision=bf16-true", "adapter.dropout=0.5"]
    given = settings("llama", *more)
    plan = plans_of("digits", [[]], *given)[0]
    assert "generate.every_n_steps" in str(reason_to_run_alone(plan))
    steps(monkeypatch, stop=9)  # in the second epoch, of 3 steps of 2 micro-batches
    assert lab("digits", *given) == 130
    assert lab("digits", *given) == 0
    run = only_run()
    rows = [row for row in run.rows() if "generate/rouge1" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 6]
    assert [row["epoch"] for row in rows] == [0, 2 / 3, 4 / 3, 2, 2]
    assert rows[0]["generate/rouge1"] != rows[-1]["generate/rouge1"]
    check_texts_at_half_precision(run)
    assert lab("digits", *given, "runs_dir=alone") == 0
    assert_equal(run, only_run("alone"))
    without = [setting for setting in given if not setting.startswith("generate")]
    assert lab("digits", *without, "runs_dir=without") == 0
    assert only_run("without").last("val/loss") == run.last("val/loss")  # it changes no training


def check_texts_at_half_precision(run: Run) -> None:
    """They are those of the restored model without dropout, row by row.

    The base is in bfloat16, the adapters in float32. In larger batches rounding is another.
    """
    model: Any = restore(run).model.eval()
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    tokenizer = tiny_tokenizer()
    for line in lines_of(run):
        row = torch.tensor([tokenizer(line["prompt"])["input_ids"][:-1]])
        ids = model.generate(row, max_new_tokens=5, do_sample=False, eos_token_id=EOS)
        text = tokenizer.decode(ids[0, row.shape[1] :], skip_special_tokens=True)
        assert line["text"] == text


BAD = {
    "generate.row=3": "generate.row=3: there is no such key; nearest: rows",
    "generate.answer=zebra": "generate.answer=zebra: matches none of the 48 references, as 'cat",
    "generate.length_penalty=0.8": "length_penalty=0.8 does nothing without num_beams of 2 or more",
    "generate.max_new_tokens=64": "at most generate.max_new_tokens=63",
    "generate.split=test": "data.test=null: must be given, as generate.split=test takes",
    "generate.rows=2 data.objective=masked model.head=masked": "generate: needs model.head=",
}


def test_what_cannot_be_generated_is_refused_before_a_run_is_made(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given = settings("gpt2")
    for setting, error in BAD.items():
        masked = ["data.text=prompt", "data.prompt=null", "data.completion=null"]
        more = ["model.path=bert", "data.tokenizer=model", *masked] if "masked" in setting else []
        if more:
            tiny_model("bert", "bert", "masked")
        assert lab("digits", *given, "generate.max_new_tokens=4", *setting.split(), *more) == 2
        assert error in " ".join(capsys.readouterr().err.split()), setting
    text = [
        "data.text=prompt",
        "data.prompt=null",
        "data.completion=null",
        "generate.max_new_tokens=4",
    ]
    assert lab("digits", *given, *text) == 2
    assert "data.text=prompt: generate needs prompts" in capsys.readouterr().err
    monkeypatch.setattr("lora_lab.training.text_metrics.find_spec", lambda name: None)
    assert lab("digits", *given, "generate.metrics=[bleu]", "generate.rows=1") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "bleu needs sacrebleu, pip install 'lora_lab[generate]'" in shown
    assert not Path("runs").exists()


ANSWERS = {
    "1,000": Fraction(1000),
    "1000.00": Fraction(1000),
    " 1000. ": Fraction(1000),
    "-0": Fraction(0),
    "12,345,678.50": Fraction(24691357, 2),
    "1,00": "1,00",
    "a  b\n": "a b",
    "Yes": "Yes",
    "": "",
}
"""A text → what is compared of it."""


def test_answers_are_extracted_and_compared_as_numbers_or_words():
    assert {text: comparable(text) for text in ANSWERS} == ANSWERS
    pattern = r"(?:####|answer is:) *(-?[\d.,]+)"
    text = "first answer is: 7, no: The answer is: 1,000."
    for match, wanted in (("last", "1,000."), ("first", "7,")):
        given = Generate.model_validate({"answer": pattern, "match": match})
        assert answer_of(text, given) == wanted
    for wrong, rule in (
        ({"answer": "(cat"}, "regular expr"),
        ({"metrics": ["blue"]}, "nearest: bleu"),
    ):
        with pytest.raises(ValueError, match=rule):
            Generate.model_validate(wrong)
    last = Generate(answer=pattern)
    assert answer_of("1000", last) is None
    score = text_metrics([text, "1000", "#### 3"], [["#### 1000"], ["#### 1000"], ["?"]], last)
    assert score == {"exact_match": 1 / 3}


def test_texts_may_have_different_numbers_of_references():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    texts = ["the cat runs on a red fish", "a dog Sleeps in the big bird"]
    references = [["the cat runs on a blue fish", "a cat runs"], ["a dog sleeps in the big cat"]]
    for lowercase in (False, True):
        given = Generate(metrics=["bleu", "rouge2"], lowercase=lowercase)
        scores = text_metrics(texts, references, given)
        streams: Any = [[references[0][0], references[1][0]], [references[0][1], None]]
        assert scores["bleu"] == corpus_bleu(texts, streams, lowercase=lowercase).score
        scorer = RougeScorer(["rouge2"])
        best = [
            max(scorer.score(one, text)["rouge2"].fmeasure for one in of)
            for text, of in zip(texts, references, strict=True)
        ]
        assert scores["rouge2"] == sum(best) / 2
