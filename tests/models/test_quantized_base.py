"""Runs over a base of transformers in 4 and 8 bits: model.quantization.

The truth is transformers' own model with a BitsAndBytesConfig, PEFT on it, and the text of errors.

Run: make test ARGS=tests/models/test_quantized_base.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_lab import adapters
from lora_lab.adapters.quantized import is_quantized
from lora_lab.models.pretrained import load_weights
from lora_lab.training.restore import restore
from tests.conftest import SMALL, Lab, command, only_run, quick
from tests.quantized import quantized_libraries
from tests.tiny_models import tiny_model

SETTINGS = (
    *("data._target_=tests.words.Words", "data.batch_size=16", "model=pretrained"),
    *("model.path=model", "model.head=classification", "base=pretrained", "target=linear"),
    *("target.linear.match=*.query", "trainer.accelerator=cpu", "trainer.max_epochs=1"),
    *("optimizer.lr=0.01", "also_train=[classifier,bert.pooler]"),
)


@pytest.fixture
def train(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    tiny_model("bert", "model", "masked")
    monkeypatch.setitem(SMALL, "digits", [])

    def run(*settings: str) -> int:
        return lab("digits", *SETTINGS, *settings)

    return run


@pytest.fixture
def bitsandbytes() -> Iterator[None]:
    with quantized_libraries():
        yield


def quantized_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if is_quantized(layer)]


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("quantization", quick(["nf4", "int8"], ["nf4"]))
def test_a_run_over_a_quantized_base(
    train: Lab, quantization: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    from peft import PeftModel

    small = ("adapter.r=2", "spectra.truncation=model", f"model.quantization={quantization}")
    # ΔW of DoRA is cut one rank after another, that of LoRA in a pack.
    assert train(*small, f"adapter={'dora' if quantization == 'nf4' else 'lora'}") == 0
    run = only_run()
    assert run.config["model"]["quantization"] == quantization
    facts = (run.path / "report/facts.csv").read_text()
    assert f"in {quantization}: ΔW is against the quantized weights" in facts
    log = (run.path / "log.txt").read_text()
    assert "merging is not checked: the base is quantized" in log
    assert "ERROR" not in log
    assert "cut to one rank after another" not in log  # LoRA's cuts are a pack
    assert run.last("merged/val/loss") is None
    assert run.last("spectra/bert.encoder.layer.0.attention.self.query/amplification") is not None
    losses = run.curve("val/loss")
    assert losses[max(losses)] < losses[min(losses)] - 0.01
    model: Any = restore(run).model
    body = [name for name, layer in model.named_modules() if type(layer).__name__ == "Linear"]
    assert body == ["bert.pooler.dense", "classifier"]
    assert len(quantized_layers(model)) == 12
    of_nf4: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    of_nf4 |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    settings: Any = of_nf4 if quantization == "nf4" else {"load_in_8bit": True}
    kept = ["classifier", "bert.pooler.dense"]
    config = transformers.BitsAndBytesConfig(**settings, llm_int8_skip_modules=kept)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        "model", num_labels=3, quantization_config=config, device_map={"": "cpu"}
    )
    for name in quantized_layers(model):
        weights = [m.get_submodule(name).weight.data for m in (model, theirs)]
        assert torch.equal(*weights), name
    assert command(monkeypatch, "export", str(run.path), "exported") == 0
    loaded: Any = PeftModel.from_pretrained(theirs, "exported").eval()
    tokens = torch.randint(7, 40, (4, 8))
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-6)
    assert command(monkeypatch, "export", str(run.path), "merged", "--format", "merged") == 0
    auto = transformers.AutoModelForSequenceClassification
    merged = auto.from_pretrained("merged").eval()
    assert quantized_layers(merged) == []
    with torch.no_grad():
        # In eval mode 8 bits quantize the inputs of layers too, which dense weights do not.
        atol = 1e-5 if quantization == "nf4" else 0.05
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=atol)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (("adapter=full", "also_train=[]"), r"quantized weights cannot train, and adapter=full"),
        (("also_train=[bert.encoder.layer.0,bert.pooler,classifier]",), r"also_train: model.quant"),
        (("base=train",), r"model.quantization=nf4: is for weights that are loaded"),
    ],
)
def test_what_cannot_be_is_refused(
    train: Lab, settings: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
):
    assert train("model.quantization=nf4", *settings) == 2
    assert error in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


def test_without_bitsandbytes_the_error_names_the_extra(
    train: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("lora_lab.models.quantization.find_spec", lambda name: None)
    # Another model than those of the tests above, of which the last is kept for the next plan.
    assert train("model.quantization=nf4", "model.dropout=0.3") == 2
    assert "needs bitsandbytes, pip install 'lora_lab[quantized]'" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(
    ("family", "head", "count"),
    [("gpt2", "language", 8), ("llama", "language", 14), ("t5", "seq2seq", 32 - 4)],
)
def test_all_linear_layers_below_the_head_are_quantized(family: str, head: Any, count: int):
    tiny_model(family, "model", head)
    model: Any = load_weights("model", head, quantization="nf4")
    names = quantized_layers(model)
    assert len(names) == count
    assert not any("lm_head" in name for name in names)
    sites = adapters.attach(model, r=2)
    assert {site.name for site in sites} >= {*names}
    assert model(**model.dummy_inputs).logits.isfinite().all()
