"""`lora-lab evaluate`: texts of a finished run's model, later, and tasks of lm-eval-harness.

Independent truth: the texts that the run itself wrote; those of its adapter that `lora-lab cut`
cut and transformers' model of the merged weights; the harness on the exported model.

Run: make test ARGS=tests/cli/test_evaluate.py
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_lab import adapters
from lora_lab.models.transformers_config import auto_class
from lora_lab.runs import Run
from tests.conftest import SMALL, Lab, command, only_run
from tests.text_files import save_jsonl
from tests.training.test_generation import ROWS, greedy, lines_of, settings

GENERATE = ("generate={max_new_tokens: 5, rows: 6}", "model.dropout=0", "trainer.max_epochs=4")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_CACHE", str(Path("cache").absolute()))
    monkeypatch.setitem(SMALL, "digits", [])
    save_jsonl("rows.jsonl", ROWS)
    save_jsonl("other.jsonl", [{"prompt": "the cat", "completion": "a dog"}])


@pytest.fixture
def run(lab: Lab, files: None) -> Run:
    assert lab("digits", *settings("gpt2", *GENERATE, "trainer.precision=64-true")) == 0
    return only_run()


def found(file: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The JSON of an evaluation, and its texts."""
    content = json.loads(Path(file).read_text())
    texts = Path(file).with_name(content["texts"]["file"]).read_text()
    return content, [json.loads(line) for line in texts.splitlines()]


def test_evaluations_of_a_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()

    def evaluate(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        assert command(monkeypatch, "evaluate", str(run.path), *arguments) == 0
        shown = capsys.readouterr().out
        (file,) = re.findall(r"^\S+\.json$", shown, re.M)
        content, texts = found(file)
        assert f"{len(texts)} texts" in shown
        for name, value in content["metrics"].items():
            assert re.search(rf"{name} .*{value:.6g}", shown)
        return content, texts

    before = (run.path / "status.json").read_bytes()
    again, texts = evaluate()
    assert texts == lines_of(run)
    assert again["metrics"]["generate/exact_match"] == run.last("generate/exact_match")

    content, texts = evaluate("metrics=[rouge1]", "--rows", "2", "generate.max_new_tokens=2")
    assert [*content["metrics"]] == ["generate/rouge1"]
    assert len(texts) == content["generate"]["rows"] == 2
    content, texts = evaluate("--data", "other.jsonl")
    assert [line["prompt"] for line in texts] == ["the cat"]

    cut, texts = evaluate("--cut", "2")
    assert command(monkeypatch, "cut", str(run.path), "--rank", "2", "--to", "cut") == 0
    capsys.readouterr()
    model = auto_class("language").from_pretrained("model", dtype=torch.float64).eval()
    adapters.load(model, "cut")
    assert [line["text"] for line in texts] == [greedy(model, one["prompt"], 5) for one in texts]
    assert cut["cut"] == 2
    assert texts != lines_of(run)

    assert (run.path / "status.json").read_bytes() == before
    assert run.finished
    assert len([*(run.path / "evaluations").iterdir()]) == 8
    assert command(monkeypatch, "evaluate", str(run.path), "--to", "elsewhere") == 0
    assert len([*Path("elsewhere").iterdir()]) == 2
    capsys.readouterr()
    check_what_is_refused(run, monkeypatch, capsys)


BAD = {
    "rowz=3": "generate.rowz=3: there is no such key; nearest: rows",
    "metrics=[blue]": "generate.metrics.0=blue: must be one of",
    "every_n_steps=3": "generate.every_n_steps: is for training, which has ended",
    "--cut 8": "--cut 8: must be below 8, the highest rank of ΔW",
    "--data nowhere.jsonl": "--data nowhere.jsonl",
}


def check_what_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, error in BAD.items():
        code = command(monkeypatch, "evaluate", str(run.path), *arguments.split())
        shown = capsys.readouterr().err
        assert (code, error in shown) == (2, True), shown
    monkeypatch.setattr("lora_lab.cli.harness.find_spec", lambda name: None)
    assert command(monkeypatch, "evaluate", str(run.path), "--harness", "arc_easy") == 2
    assert "needs lm-eval, pip install 'lora_lab[harness]'" in capsys.readouterr().err


def test_a_run_that_writes_no_texts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", "spectra.truncation=none") == 0
    assert command(monkeypatch, "evaluate", str(only_run().path)) == 2
    assert "generate: needs model.head=language or seq2seq" in capsys.readouterr().err


@pytest.mark.slow
def test_of_a_model_trained_in_full_the_difference_of_the_weights_is_cut(
    lab: Lab, files: None, monkeypatch: pytest.MonkeyPatch
):
    given = settings("gpt2", *GENERATE, "trainer.precision=64-true")
    full = [one for one in given if not one.startswith("adapter")]
    assert lab("digits", *full, "adapter=full", "optimizer.lr=0.002") == 0
    run = only_run()
    assert command(monkeypatch, "evaluate", str(run.path), "--cut", "2") == 0
    (file,) = (run.path / "evaluations").glob("*.json")
    _, texts = found(str(file))
    trained = load_file(run.path / "model" / "model.safetensors")
    model = auto_class("language").from_pretrained("model", dtype=torch.float64).eval()
    before = model.state_dict()
    for key, W in trained.items():
        if W.dim() == 2 and "wpe" not in key:  # lm_head is linear, and tied to the embedding
            U, S, Vh = torch.linalg.svd(W - before[key])
            trained[key] = before[key] + U[:, :2] * S[:2] @ Vh[:2]
    model.load_state_dict(trained)
    assert [line["text"] for line in texts] == [greedy(model, one["prompt"], 5) for one in texts]
    assert texts != lines_of(run)


TASK = """
task: animals
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/task.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["cat", "dog", "bird", "fish"]
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_a_task_of_the_harness_is_that_of_the_exported_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Truth: the log-likelihoods of the choices by transformers' model of the exported folder."""
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    choices = ["cat", "dog", "bird", "fish"]
    rows = [{"prompt": row["prompt"], "label": i % 4} for i, row in enumerate(ROWS[:16])]
    save_jsonl("task.jsonl", rows)
    Path("animals.yaml").write_text(TASK.replace("FOLDER", str(Path.cwd())))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("cache").absolute()))
    capsys.readouterr()
    assert command(monkeypatch, "evaluate", str(run.path), "--harness", "animals.yaml") == 0
    (file,) = (run.path / "evaluations").glob("harness-*.json")
    metrics = json.loads(file.read_text())["metrics"]
    assert command(monkeypatch, "export", str(run.path), "merged", "--format", "merged") == 0
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float64).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained("merged")
    right = 0
    for row in rows:
        scores = []
        for choice in choices:
            texts = [row["prompt"], f"{row['prompt']} {choice}"]
            start, ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            new = range(len(start), len(ids))
            scores.append(sum(logs[t - 1, ids[t]].item() for t in new))
        right += scores.index(max(scores)) == row["label"]
    assert metrics["harness/animals/acc"] == right / len(rows)
    assert command(monkeypatch, "evaluate", str(run.path), "--harness", "arc_eazy") == 2
    assert (
        "--harness arc_eazy: lm-eval-harness has no such task; nearest" in capsys.readouterr().err
    )
