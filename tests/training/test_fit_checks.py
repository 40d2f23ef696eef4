"""Data that does not fit its model: refused in the plan, before there is a run directory.

Truth: for positions, the models themselves, which read a row of that many tokens and fail at one
more; for errors, a table of settings with the key, the rule and the way out that they must name.

Run: make test ARGS=tests/training/test_fit_checks.py
"""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_lab.config.compose import hydra_arguments
from lora_lab.config.schema import Component, ConfigError
from lora_lab.data import Phase
from lora_lab.data.text import Text
from lora_lab.training.fit_checks import position_count
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.conftest import command
from tests.text_files import save_jsonl, save_rows, save_tokenizer
from tests.tiny_models import TINY, tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 40}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 0}
DECODER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
DECODER |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4}
DECODER |= {"decoder_attention_heads": 4, "pad_token_id": 1, "max_position_embeddings": 24}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPTConfig",
        {
            **{"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "vocab_size": 40},
            **{"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 24},
        },
    ),
    "bart": ("BartConfig", DECODER),
    "marian": ("MarianConfig", {**DECODER, "decoder_start_token_id": 1}),
    "nystromformer": ("NystromformerConfig", {**SIZES, "max_position_embeddings": 24}),
    "xlm_roberta": (
        "XLMRobertaConfig",
        {**SIZES, "max_position_embeddings": 26, "pad_token_id": 1},
    ),
}
POSITIONS = {
    **{"bert": 64, "roberta": 65, "gpt2": 64, "llama": None, "qwen3": None, "t5": None},
    **{"opt": 24, "bart": 24, "marian": 24, "nystromformer": 24, "xlm_roberta": 24},
}


@pytest.mark.parametrize(("family", "expected"), POSITIONS.items())
def test_as_many_tokens_as_a_model_has_positions(family: str, expected: int | None):
    name, settings = {**TINY, **OTHERS}[family]
    config = getattr(transformers, name)(**settings)
    with torch.device("meta"):
        on_meta = transformers.AutoModel.from_config(config)
    assert position_count(on_meta) == expected
    model: Any = transformers.AutoModel.from_config(config).eval()

    def read(tokens: int) -> None:
        ids = torch.full((1, tokens), 7)
        decoder = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)

    read(expected or 200)
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError)):
            read(expected + 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models, and of rows of each kind."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        save_files()
    return folder


@pytest.fixture(autouse=True)
def in_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("LORA_LAB_CACHE", str(files / "cache"))


def save_files() -> None:
    save_rows("train.jsonl", 40)
    save_jsonl("words.jsonl", [{"words": ["a", "dog"], "labels": ["O", "B"]}] * 40)
    save_jsonl("pairs.jsonl", [{"a": "the cat", "b": "a dog", "label": i % 2} for i in range(40)])
    tiny_model("bert", "bert", "masked", tie_word_embeddings=False)
    tiny_model("roberta", "rob", "masked")
    tiny_model("gpt2", "gpt", "language")
    tiny_model("bert", "ordered", "classification", id2label={0: "Good", 1: "Bad"})
    tiny_model("bert", "named", "classification", id2label={0: "Good", 1: "Awful"})
    xlnet = transformers.XLNetConfig(d_model=12, n_layer=1, n_head=2, vocab_size=40)
    xlnet.save_pretrained("xlnet")
    shutil.copytree("bert", "weights", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree("gpt", "gpt_weights", ignore=shutil.ignore_patterns("tokenizer*"))
    large = transformers.AutoTokenizer.from_pretrained("bert")
    large.add_tokens([f"word{i}" for i in range(14)])  # 27 tokens of its own, then ids 27 to 40
    large.save_pretrained("large")


BERT = "model=pretrained base=pretrained target=attention tracking=off model.path=bert "
TEXT = BERT + "model.head=classification data=text data.train=train.jsonl "
WORDS = BERT + "model.head=tokens data=words data.train=words.jsonl "
MASKED = BERT + "model.head=masked data=language data.train=train.jsonl data.objective=masked "
GPT = MASKED + "model.path=gpt model.head=language data.objective=causal "
FITTING = {
    "text": (TEXT, 64),
    "words": (WORDS, 64),
    "masked": (MASKED, 64),
    "masked, RoBERTa": (MASKED + "model.path=rob", 65),
    "causal": (GPT, 64),
    "blocks": (GPT + "data.block=64", 1024),
    "full, tied": (GPT + "target=linear adapter=full", 64),
    "as given": (TEXT + "data.max_length=12", 12),
    "largest": (TEXT + "model.path=rob data.max_length=65", 65),
}


@pytest.mark.parametrize(("settings", "length"), FITTING.values(), ids=FITTING)
def test_what_fits(settings: str, length: int):
    made = plan(composed(*settings.split()))
    assert made.cfg.data.arguments["max_length"] == length
    same = composed(*settings.split(), f"data.max_length={length}")
    assert plan(same).path == made.path


def test_another_heads_classes_are_told(caplog: pytest.LogCaptureFixture):
    plan(composed(*f"{TEXT} model.path=named".split()))
    says = "the head at model.path has the classes Good, Awful, the data has bad, good"
    assert says in caplog.text


class OwnText(Text):
    """A data set of a user's own, whose arguments are those of Text."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)


class FixedText(Text):
    """A data set of a user's own without an argument max_length."""

    def __init__(self, phase: Phase, tokenizer: str, seed: int):
        settings = {"text": "text", "label": "label", "batch_size": 2, "max_length": 10}
        super().__init__(phase, train="train.jsonl", tokenizer=tokenizer, seed=seed, **settings)


def test_data_of_a_users_own():
    own = f"data._target_={__name__}.OwnText"
    assert plan(composed(*TEXT.split(), own)).cfg.data.arguments["max_length"] == 64
    cfg = composed(*TEXT.split())
    node = {"_target_": f"{__name__}.FixedText", "tokenizer": "bert", "seed": 0}
    fixed = plan(cfg.model_copy(update={"data": Component.model_validate(node)}))
    assert "max_length" not in fixed.cfg.data.arguments


def test_a_null_length_is_that_of_earlier_runs_where_the_model_has_no_end():
    tiny_model("llama", "llama", "language")
    settings = (TEXT + "model.path=llama").split()
    assert plan(composed(*settings)).path == plan(composed(*settings, "data.max_length=512")).path
    stored = plan(composed(*settings), is_stored=True)  # in its time null stood for no end
    assert stored.cfg.data.arguments["max_length"] is None


BAD = {
    "no tokenizer": (
        TEXT + "model.path=weights",
        "data.tokenizer=weights: holds no tokenizer: there is no tokenizer.json, vocab.txt",
    ),
    "no tokenizer, GPT-2": (GPT + "model.path=gpt_weights", "gpt_weights: holds no tokenizer"),
    "large tokenizer": (
        TEXT + "data.tokenizer=large",
        "data.tokenizer=large: token 'word13' has the id 40, and model.path=bert has vectors for "
        "40 tokens, ids 0 to 39",
    ),
    "positions": (
        TEXT + "data.max_length=65",
        "data.max_length=65: the model has 64 positions (model.path=bert); at most "
        "data.max_length=64",
    ),
    "positions, RoBERTa": (
        TEXT + "model.path=rob data.max_length=66",
        "data.max_length=66: the model has 65 positions (model.path=rob)",
    ),
    "block": (GPT + "data.block=65", "data.block=65: the model has 64 positions (model.path=gpt)"),
    "short": (TEXT + "data.max_length=2", "data.max_length=2: leaves a row no token to learn from"),
    "short pairs": (
        TEXT + "data.train=pairs.jsonl data.text=[a,b] data.max_length=3",
        "data.max_length=3: leaves a row no token to learn from beside the special tokens of "
        "data.tokenizer; at least data.max_length=4",
    ),
    "short words": (WORDS + "data.max_length=1", "at least data.max_length=3"),
    "one token": (GPT + "data.max_length=1", "at least data.max_length=2"),
    "text, tokens": (
        TEXT + "model.head=tokens",
        "model.head=tokens: data=text needs model=pretrained model.head=classification; "
        "model.head=tokens learns data=words",
    ),
    "words, classes": (
        WORDS + "model.head=classification",
        "model.head=classification: data=words needs model=pretrained model.head=tokens; "
        "model.head=classification learns data=text",
    ),
    "text, language": (TEXT + "model.head=language", "learns data=language"),
    "causal, masked": (
        GPT + "model.path=bert model.head=masked",
        "model.head=masked: data=language data.objective=causal needs model=pretrained "
        "model.head=language; model.head=masked learns data=language data.objective=masked",
    ),
    "masked, causal": (MASKED + "model.head=language", "needs model=pretrained model.head=masked"),
    "path": (TEXT + "model.path=robb", "model.path=robb: "),
    "path below": (TEXT + "model.path=./robb", "model.path=./robb: "),
    "tokenizer": (TEXT + "model.path=rob data.tokenizer=brt", "nearest: bert"),
    "filled beyond": (
        TEXT + "data.pad_to_multiple=48",
        "data.pad_to_multiple=48: rows of data.max_length=64 tokens are filled to 96, and the",
    ),
    "both directions": (
        GPT + "model.path=bert",
        "model.head=language: bert (model.path=bert) reads in both directions and would see",
    ),
    "both directions, XLNet": (
        GPT + "model.path=xlnet data.tokenizer=gpt",
        "xlnet (model.path=xlnet) reads in both",
    ),
    "order of classes": (
        TEXT + "model.path=ordered",
        "order Good, Bad, and the data as bad, good; data.classes=[good,bad] is the head's order",
    ),
    "tied, PiSSA": (
        GPT + "target=linear target.linear.tied=true adapter=pissa",
        "is tied: only plain A and B can be shared",
    ),
    "dropout": (
        TEXT + "model.dropout=2",
        "model.dropout=2: must be at least 0 and less than 1",
    ),
    "tied": (
        GPT + "target=linear target.linear.match=lm_head",
        "'lm_head' is tied (transformer.wte.weight = lm_head.weight): an adapter would change one "
        "use of it and not the other; target.linear.tied=true adapts it",
    ),
    "tied, among others": (
        GPT + "target=linear target.linear.match=[lm_head,*c_attn]",
        "target.linear.exclude=lm_head leaves it out",
    ),
    "glob": (
        TEXT + "target.attention.match=*.qeury",
        "target 'attention' picks no attention weight: '*.qeury' fits none; nearest names: ",
    ),
    "glob, last names": (
        TEXT + "target=linear target.linear.match=*.qeury",
        "; last names of its linear weights: query, key, value, dense, classifier",
    ),
    "half a pair": (
        GPT + "data.prompt=a data.train=pairs.jsonl",
        "data.completion: must be given with prompt=a",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit(settings: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: 1 / 0
    )  # no hub answers
    with pytest.raises(ConfigError) as error:
        plan(composed(*hydra_arguments(settings.split())))
    assert message in str(error.value)
    if "robb" in settings:
        assert "nearest: " in str(error.value)
        assert str(error.value).endswith("rob")


def test_the_command_refuses_before_there_is_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "train", *(TEXT + "model.head=tokens").split()) == 2
    assert "config error: model.head=tokens: data=text needs" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_log_says_how_many_rows_are_cut(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "lora_lab")
    for length in (8, 6, 5):
        plan(composed(*TEXT.split(), f"data.max_length={length}")).data("adapt").setup("fit")
    # There are as many rows of 2 words as of 3, 4, 5 and 6, and each has two special tokens.
    shares = [r.getMessage() for r in caplog.records if "is cut" in r.getMessage()]
    assert [share[:5] for share in shares] == ["20.0%", "60.0%", "80.0%"]


def test_a_tokenizer_of_another_folder_fits():
    """Control tokens that stand in no text need no vector, as in Gemma 3 of 1B parameters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<unused{i}>" for i in range(20)]})
    tokenizer.save_pretrained("controls")
    plan(composed(*TEXT.split(), "data.tokenizer=controls"))
    save_tokenizer("other")
    plan(composed(*TEXT.split(), "data.tokenizer=other"))
