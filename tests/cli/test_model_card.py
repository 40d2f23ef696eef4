"""The model card of an exported folder: its header, its numbers, its picture, and its code.

Independent truth: huggingface_hub reads the header and writes it again; the card's code gives a
model whose outputs are the run's.

Run: make test ARGS=tests/cli/test_model_card.py
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from lora_lab.cli.model_card import Base
from lora_lab.runs import Run
from lora_lab.training.restore import restore
from tests.conftest import SMALL, command, only_run, small
from tests.tiny_models import tiny_model
from tests.training.test_pretrained_base import HEAD, SETTINGS
from tests.training.test_stored_runs import FULL, LORA, STORED, stored


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT in model/ and a run over it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(SMALL, "digits", [])
        tiny_model("bert", "model", "masked")
        settings = (*SETTINGS, HEAD, "optimizer.lr=0.05", "adapter.r=2", "spectra.truncation=none")
        assert small("digits", *settings) == 0
    return folder


def read_card(folder: str) -> tuple[ModelCardData, str, str]:
    """The header, the text and the code of a card, the header as huggingface_hub reads it."""
    card = ModelCard.load(Path(folder, "README.md"))
    assert isinstance(card.data, ModelCardData)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    again = ModelCard(f"---\n{card.data.to_yaml()}\n---\n{card.text}")
    assert again.data.to_dict() == card.data.to_dict()
    return card.data, card.text, code


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_of_a_pretrained_model(trained: Path, monkeypatch: pytest.MonkeyPatch, format: str):
    shutil.copytree(trained, "copy", symlinks=True)
    monkeypatch.chdir("copy")
    run: Run = only_run()
    assert command(monkeypatch, "export", str(run.path), "out", "--format", format) == 0
    data, text, code = read_card("out")
    assert data.library_name == {"peft": "peft", "merged": "transformers"}[format]
    assert data.pipeline_tag == "text-classification"
    assert data.base_model is None  # a folder: the hub takes names of its models alone
    assert "the model in the folder model" in text
    assert data.license is None
    assert data.tags == ["lora", "lora_lab", "digits"]
    assert data.eval_results
    told = {result.metric_name: result.metric_value for result in data.eval_results}
    assert told == {k: run.last(k) for row in run.rows() for k in row if k.startswith("val/")}
    assert {result.dataset_split for result in data.eval_results} == {"validation"}
    assert "| r | 2 |" in text
    assert "bert.encoder.layer.0.attention.self.query" in text
    assert "seconds a step" in text
    assert "](spectrum.png)" in text
    assert Path("out/spectrum.png").read_bytes()[1:4] == b"PNG"
    names: dict[str, Any] = {}
    exec(code, names)
    tokens = torch.randint(7, 40, (4, 8))
    with torch.no_grad():
        expected = restore(run).model.eval()(tokens).logits
        torch.testing.assert_close(
            names["model"].eval()(tokens).logits, expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("name", "format"), [(LORA, "peft"), (LORA, "merged"), (FULL, "merged")], ids=str
)
def test_of_a_model_of_ones_own(monkeypatch: pytest.MonkeyPatch, name: str, format: str):
    shutil.copytree(STORED, ".", dirs_exist_ok=True)
    run = stored(name)
    assert command(monkeypatch, "export", str(run.path), "out", "--format", format) == 0
    data, _, code = read_card("out")
    assert data.base_model is None
    assert data.library_name == ("peft" if format == "peft" else None)
    restored = restore(run)
    base = restored.plan.model()
    base.load_state_dict(dict(restored.base))
    names: dict[str, Any] = {"base": base}
    exec(code, names)
    x = torch.randn(3, restored.plan.data("adapt").sizes["in_features"])
    torch.testing.assert_close(names["model"](x), restored.model(x))


@pytest.mark.parametrize(
    ("path", "hub_id"),
    [
        ("bert-base-uncased", True),
        ("a/b-1.5_x", True),
        *((path, False) for path in ("/a/b", "../b", "a/b/c", "a b", "here", "", None)),
    ],
)
def test_a_hub_id_is_no_folder(path: str | None, hub_id: bool):
    Path("here").mkdir()
    assert Base(path).hub_id == (path if hub_id else None)
