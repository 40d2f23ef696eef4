"""Runs over the weights of a folder of transformers: base=pretrained.

Independent truth: transformers' from_pretrained, PEFT's PeftModel, sha256 of the files.

Run: make test ARGS=tests/training/test_pretrained_base.py
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_lab import adapters
from lora_lab.config.checks import parse_config
from lora_lab.config.schema import ConfigError
from lora_lab.runs import Run, find_runs
from lora_lab.training.base_weights import BaseWeights
from lora_lab.training.plan import plan
from lora_lab.training.restore import restore
from tests.conftest import SMALL, Lab, command, only_run
from tests.tiny_models import tiny_model

SETTINGS = (
    *("data._target_=tests.words.Words", "data.batch_size=16", "model=pretrained"),
    *("model.path=model", "model.head=classification", "base=pretrained", "target=linear"),
    *("target.linear.match=*.query", "trainer.accelerator=cpu", "trainer.max_epochs=1"),
)
HEAD = "also_train=[classifier,bert.pooler]"


@pytest.fixture
def train(lab: Lab) -> Lab:
    """train("adapter.r=2") runs over a tiny BERT that has no head, and gives the exit code."""
    tiny_model("bert", "model", "masked")

    def run(*settings: str) -> int:
        return lab("digits", *SETTINGS, *settings)

    return run


@pytest.fixture(autouse=True)
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "digits", [])


def reference() -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained("model", num_labels=3)
    return model.state_dict()


def test_a_run_is_over_the_files_weights_and_names_them_by_their_content(train: Lab):
    assert train(HEAD) == 0
    run = only_run()
    sha256 = hashlib.sha256(Path("model/model.safetensors").read_bytes()).hexdigest()
    assert run.config["base"]["sha256"] == sha256
    config_hash = hashlib.sha256(Path("model/config.json").read_bytes()).hexdigest()
    assert run.config["model"]["content"] == {"path": config_hash}
    restored = restore(run)
    state, truth = dict(restored.base), reference()
    new = set(restored.plan.new_parameters)
    assert {key.partition(".")[0] for key in new} == {"bert", "classifier"}
    assert len(state) == len(truth)
    for key in state.keys() - new:
        assert torch.equal(state[key], truth[key])
    assert adapters.base_hash(run.path / "adapter") == adapters.weights_hash(state)


def test_the_same_content_elsewhere_is_the_same_run(train: Lab, capsys: pytest.CaptureFixture[str]):
    assert train(HEAD) == 0
    shutil.copytree("model", "other")
    assert train(HEAD, "model.path=other") == 0
    assert "Finished before, not repeated" in capsys.readouterr().out
    assert only_run()


def test_a_run_of_other_weights_is_not_restored(train: Lab):
    assert train(HEAD) == 0
    run = only_run()
    shutil.copytree("model", "first")
    tiny_model("bert", "model", "masked", seed=1)
    with pytest.raises(ConfigError, match=r"model.path=model: its weights are not those of the"):
        restore(run)
    shutil.copy("first/model.safetensors", "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ConfigError, match=r"model.path=model: it is another now than in the"):
        restore(run)


@pytest.mark.slow
def test_heads_are_drawn_by_the_seed_over_one_base(train: Lab):
    small = ("adapter.r=1", "spectra.truncation=none")
    for settings in (("seed=0",), ("seed=1",), ("seed=0", "adapter.r=2")):
        assert train(HEAD, "optimizer.lr=1e-30", *small, *settings) == 0
    cfg = parse_config(dict(find_runs(Path("runs"))[0].config))
    frozen = [plan(cfg.model_copy(update={"also_train": [], "seed": seed})) for seed in (0, 1)]
    one, other = (p.pretrained_model().get_parameter("classifier.weight") for p in frozen)
    assert not torch.equal(one, other)  # a head that stays frozen makes a base for each seed
    bases = {adapters.base_hash(run.path / "adapter") for run in find_runs(Path("runs"))}
    assert len(bases) == 1
    heads = {}
    for run in find_runs(Path("runs")):
        value = load_file(run.path / "adapter/adapter.safetensors")["classifier.weight"]
        heads[run.config["seed"], run.config["adapter"]["r"]] = value
    assert torch.equal(heads[0, 1], heads[0, 2])
    assert torch.equal(heads[0, 1], one)
    assert not torch.equal(heads[0, 1], heads[1, 1])


@pytest.mark.parametrize("settings", [(HEAD,), ("adapter=dora", HEAD)])
def test_peft_gives_the_same_outputs(
    train: Lab, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
):
    peft = pytest.importorskip("peft")
    assert train("optimizer.lr=0.05", *settings) == 0
    run = only_run()
    assert command(monkeypatch, "export", str(run.path), "exported") == 0
    auto = peft.AutoPeftModelForSequenceClassification
    model = auto.from_pretrained("exported", num_labels=3).eval()
    tokens = torch.randint(7, 40, (4, 8))
    with torch.no_grad():
        expected = restore(run).model.eval()(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            "model", num_labels=3
        )
        assert (base.eval()(tokens).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [("adapter=full",), ("adapter=none", HEAD), (HEAD,), (HEAD, "model.dtype=bfloat16")],
)
def test_other_ways_to_train_are_restored(
    train: Lab, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
):
    assert train(*settings, "spectra.truncation=none") == 0
    run: Run = only_run()
    model, tokens = restore(run).model.eval(), torch.randint(7, 40, (4, 8))
    assert command(monkeypatch, "export", "--format", "merged", str(run.path), "merged") == 0
    auto = transformers.AutoModelForSequenceClassification
    loaded: Any = auto.from_pretrained("merged").eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_a_base_that_is_written_to_is_noticed(train: Lab):
    assert train(HEAD, "adapter.r=1") == 0
    model = restore(only_run()).model
    base = BaseWeights(model)
    assert len(base) == len(reference())
    adapters.merge(model)
    assert base.changed() == []
    adapters.unmerge(model)
    assert base.changed() == []
    with torch.no_grad():
        model.get_parameter("bert.embeddings.LayerNorm.bias")[3] += 1e-7
    assert base.changed() == ["bert.embeddings.LayerNorm.bias"]


BAD = {
    "model.path=modle": "model.path=modle: .*nearest: model",
    "model.path=model/config.json": "model.path=model/config.json: it is a file; must be a folder",
    "model.head=clasification": "model.head=clasification: .*classification",
    "model.head=seq2seq": "model.head=seq2seq: bert .* has no such head",
    "model.dtype=float": "model.dtype=float: must be",
    "model.pth=model": "pth",
    "also_train=[classifer]": "also_train: 'classifer' fits no parameter; nearest: classifier",
    "target.linear.match=*.q_proj": "target=linear",
    "base.sha256=abc": "base.sha256",
}


def test_a_base_of_files_needs_a_model_that_has_some(lab: Lab, capsys: pytest.CaptureFixture[str]):
    assert lab("digits", "base=pretrained") == 2
    assert "base=pretrained: needs a model whose weights lie at" in capsys.readouterr().err


@pytest.mark.parametrize("setting", BAD)
def test_bad_settings(train: Lab, capsys: pytest.CaptureFixture[str], setting: str):
    assert train(setting) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(BAD[setting], shown), shown
    assert not Path("runs").exists()
