"""The experiments that repeat what others published.

Truth: pandas and a plain loop as in the published scripts, the published counts, and for each
hyperparameter the table of docs/protocols.md. Run: make test ARGS=tests/test_protocols.py
"""

import re
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import transformers
import yaml
from hydra import initialize_config_module

from lora_lab import adapters
from lora_lab.config.compose import compose_config
from lora_lab.config.schema import ConfigError
from lora_lab.report.run_tables import run_tables
from lora_lab.training.plan import plan
from lora_lab.training.published import with_published
from tests.config.test_conf import composed
from tests.conftest import Lab, only_run
from tests.protocol_files import FILES, save_gpt2, save_sms
from tests.text_files import IDS

CONF = Path(__file__).parents[1] / "conf"


def test_spam_gpt2_has_the_rows_of_the_published_script():
    cfg = composed("experiment=spam_gpt2", *save_sms(), *save_gpt2())
    run_plan = plan(cfg)
    data = run_plan.data("adapt")
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader) for loader in loaders] == [130, 19, 38]  # pyright: ignore
    # As chapter 6 has it.
    frame = pandas.read_csv("SMSSpamCollection.tsv", sep="\t", header=None, names=["label", "text"])
    spam = frame[frame["label"] == "spam"]
    ham = frame[frame["label"] == "ham"].sample(len(spam), random_state=123)
    frame = pandas.concat([ham, spam]).sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(frame) * 0.7)
    val_end = train_end + int(len(frame) * 0.1)
    parts = frame[:train_end], frame[train_end:val_end], frame[val_end:]
    for part, rows in zip(parts, (data.train, data.val, data.test), strict=True):
        inputs, targets = rows[slice(0, len(rows))]
        assert targets.tolist() == [("ham", "spam").index(label) for label in part["label"]]
        ids = [[IDS[word] for word in text.split()][:120] for text in part["text"]]
        padded = [row + [IDS["<eos>"]] * (120 - len(row)) for row in ids]
        assert inputs.keys() == {"input_ids"}  # no mask
        assert inputs["input_ids"].tolist() == padded
    assert sum(label == "spam" for part in parts for label in part["label"]) == 747
    # The prediction is that of the last position, whether it is a word's or not.
    model: Any = run_plan.pretrained_model().eval()
    inputs, _ = data.val[slice(0, 8)]
    with torch.no_grad():
        last = model.score(model.transformer(**inputs).last_hidden_state[:, -1])
        assert torch.equal(model(**inputs).logits, last)


def test_spam_gpt2_trains_as_many_numbers_as_published():
    cfg: Any = composed("experiment=spam_gpt2", *PATHS)
    config: Any = transformers.GPT2Config()
    config.num_labels = 2
    with torch.device("meta"):
        model = transformers.GPT2ForSequenceClassification(config)
    targets = {name: adapters.Target(**rule.model_dump()) for name, rule in cfg.target.items()}
    recipe = adapters.Recipe(cfg.adapter.r, cfg.adapter.alpha)
    sites = adapters.find_sites(model, targets, recipe, over_rank=cfg.adapter.over_rank)
    assert sum(site.trainable_parameters for site in sites) == 2_666_528


PAGE = (Path(__file__).parents[1] / "docs/protocols.md").read_text()
SECTIONS = {text.partition("`")[0]: text for text in PAGE.split("\n## `")[1:]}
"""Experiment → its part of docs/protocols.md."""
PATHS = ("data.train=x", "model.path=x")
NOT_IN_TABLES = ("name", "spectra", "published", "defaults", "data.train", "model.path")
"""Keys of an experiment's YAML that are no hyperparameters."""


def table(experiment: str, columns: int) -> list[list[str]]:
    """The rows of the tables with so many columns in an experiment's part of the page."""
    lines = [line for line in SECTIONS[experiment].splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if len(row) == columns]


def dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    inner = {f"{prefix}.{key}" if prefix else str(key): value for key, value in node.items()}
    return {k: v for key, value in inner.items() for k, v in dotted(value, key).items()}


@pytest.mark.parametrize("experiment", SECTIONS)
def test_each_hyperparameter_is_as_the_table_of_sources_says(experiment: str):
    cfg = dotted(composed(f"experiment={experiment}", *PATHS).to_dict())
    rows = table(experiment, columns=4)
    for key, ours, *_ in rows:
        assert cfg[key.strip("`")] == yaml.safe_load(ours.strip("`")), key
    content = yaml.safe_load(Path(CONF, f"experiment/{experiment}.yaml").read_text())
    settings = [key for key in dotted(content) if not key.startswith(NOT_IN_TABLES)]
    listed = {key.strip("`") for key, *_ in rows}
    assert not [key for key in settings if key not in listed and not key.endswith(".kind")]


@pytest.mark.parametrize("experiment", SECTIONS)
def test_the_published_numbers_are_those_of_the_page(experiment: str):
    published: Any = composed(f"experiment={experiment}", *PATHS).published
    numbers = {
        (f"`{settings}`", f"`{metric}`", value)
        for settings, metrics in published.cells.items()
        for metric, value in metrics.items()
    }
    assert numbers == {(s, m, float(value)) for s, m, value in table(experiment, columns=3)}
    assert published.source
    for settings in published.cells:  # each is a cell that can be typed
        composed(f"experiment={experiment}", *settings.split(), *PATHS)


@pytest.mark.parametrize("experiment", SECTIONS)
def test_what_an_experiment_needs_is_told(experiment: str):
    text = Path(CONF, f"experiment/{experiment}.yaml").read_text()
    assert re.search(rf"#   lora-lab train .*experiment={experiment} ", text)
    for key in ("data.train", "model.path"):
        others = [path for path in PATHS if not path.startswith(key)]
        with (
            initialize_config_module("lora_lab.conf", version_base="1.3"),
            pytest.raises(ConfigError, match=rf"^{key}: must be given, .{{20}}"),
        ):
            compose_config([f"experiment={experiment}", *others])


SMALLER = ["spectra.against_base=false", "spectra.truncation=none"]
SMALLER += ["trainer.max_epochs=1", "trainer.max_steps=2"]
"""What makes the run of an experiment brief."""


@pytest.mark.parametrize("experiment", FILES)
def test_each_protocol_runs_from_end_to_end(lab: Lab, experiment: str):
    assert lab(experiment, *FILES[experiment](), *SMALLER) == 0
    run = only_run()
    assert run.finished
    assert run.curve("val/loss")


def test_a_run_of_a_published_cell_has_its_numbers_beside_it(lab: Lab):
    settings = ["adapter=none", "seed=5", *FILES["spam_gpt2"]()]
    assert lab("spam_gpt2", *settings, "spectra.against_base=false") == 0
    facts = dict(run_tables(only_run())["facts"])
    assert facts["test/accuracy as published (LLMs-from-scratch, appendix E)"] == "0.4875"
    with initialize_config_module("lora_lab.conf", version_base="1.3"):
        other = plan(compose_config(["experiment=spam_gpt2", *settings, "data.max_length=100"]))
        published: Any = with_published(other, "spam_gpt2").cfg.published
    assert published.cells == {}
