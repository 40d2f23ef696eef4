"""The experiments that repeat what others published.

Truth: pandas and a plain loop as in the published scripts, the published counts, and for each
hyperparameter the table of docs/protocols.md. Run: make test ARGS=tests/test_protocols.py
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import transformers
import yaml
from hydra import initialize_config_module

from lora_lab import adapters
from lora_lab.config.compose import compose_config, compose_points, hydra_arguments
from lora_lab.config.schema import ConfigError
from lora_lab.report.cells import cells_of, read_run
from lora_lab.report.run_tables import run_tables
from lora_lab.report.summary import cells_table
from lora_lab.training.plan import plan
from lora_lab.training.published import with_published
from tests.config.test_conf import composed
from tests.conftest import Lab, only_run
from tests.protocol_files import FILES, paths, save_gpt2, save_sms
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


def test_the_counts_are_the_published_ones():
    counts = {"spam_gpt2": 2_666_528, "e2e_gpt2": 393_216, "glue_sst2": 294_912}
    medium: dict[str, Any] = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
    models: Any = {
        "spam_gpt2": (transformers.GPT2ForSequenceClassification, transformers.GPT2Config()),
        "e2e_gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**medium)),
        "glue_sst2": (
            transformers.RobertaForSequenceClassification,
            transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514),
        ),
    }
    for experiment, (kind, config) in models.items():
        cfg: Any = configs((experiment,))[0]
        config.num_labels = 2
        with torch.device("meta"):
            model = kind(config)
        targets = {name: adapters.Target(**rule.model_dump()) for name, rule in cfg.target.items()}
        recipe = adapters.Recipe(cfg.adapter.r, cfg.adapter.alpha)
        sites = adapters.find_sites(model, targets, recipe, over_rank=cfg.adapter.over_rank)
        assert sum(site.trainable_parameters for site in sites) == counts[experiment]
        in_full = adapters.select(model, cfg.also_train)
        head = sum(model.get_parameter(key).numel() for key in in_full)
        assert head == (592_130 if experiment == "glue_sst2" else 0)


PAGE = (Path(__file__).parents[1] / "docs/protocols.md").read_text()
NOT_IN_TABLES = ("name", "spectra", "published", "defaults", "task", "metrics", "train", "val")
NOT_IN_TABLES += ("test", "path")
"""Last names of the keys of an experiment that are no hyperparameters of its table."""


@cache
def configs(points: tuple[str, ...]) -> list[Any]:
    """The configs of experiments with settings behind them, or the errors where they have none."""
    typed = [
        hydra_arguments([f"experiment={experiment}", *settings, *paths(experiment)])
        for experiment, *settings in map(str.split, points)
    ]
    return [cfg for _, cfg in compose_points(typed)]


Tables = list[tuple[list[str], list[list[str]]]]
"""The header and the rows of each table, as texts without their backticks."""


def tables() -> dict[str, Tables]:
    """Experiment → the tables in its part of the page."""
    found: dict[str, Tables] = {}
    for part in PAGE.split("\n## ")[1:]:
        blocks = re.findall(r"(?:^\|.*\n)+", part, flags=re.MULTILINE)
        rows = [[_cells(line) for line in block.splitlines()] for block in blocks]
        for experiment in re.findall(r"`(\w+)`", part.partition("\n")[0]):
            found[experiment] = [(table[0], table[2:]) for table in rows]
    return found


def _cells(line: str) -> list[str]:
    cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
    return [cell.strip().strip("`").replace("\\|", "|") for cell in cells]


def dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted keys."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    inner = {f"{prefix}.{key}" if prefix else str(key): value for key, value in node.items()}
    return {k: v for key, value in inner.items() for k, v in dotted(value, key).items()}


TABLES = tables()


def test_each_protocol_is_on_the_page():
    assert sorted(TABLES) == sorted(FILES)


def test_each_hyperparameter_is_as_the_table_of_sources_says():
    for experiment, cfg in zip(TABLES, configs(tuple(TABLES)), strict=True):
        values, listed = dotted(cfg.to_dict()), {}
        for header, rows in TABLES[experiment]:
            if header[0] == "key":
                listed |= {key: ours for key, ours, *_ in rows}
            elif header[0] == "experiment" and "." in header[1]:
                (row,) = (row for row in rows if row[0] == experiment)
                listed |= dict(zip(header[1:], row[1:], strict=True))
        for key, ours in listed.items():
            value = values[key]
            value = [value] if key == "data.text" and isinstance(value, str) else value
            assert value == yaml.safe_load(ours), (experiment, key)
        # Nothing that the files set is left out of the table.
        text = (CONF / f"experiment/{experiment}.yaml").read_text()
        shared = (CONF / "_shared/glue.yaml").read_text() if "_shared/glue" in text else ""
        keys = {key for one in (text, shared) if one for key in dotted(yaml.safe_load(one))}
        keys = {key for key in keys if key.partition(".")[0] not in NOT_IN_TABLES}
        keys = {key for key in keys if key.rpartition(".")[2] not in (*NOT_IN_TABLES, "kind")}
        assert keys <= listed.keys(), experiment


def test_the_published_numbers_are_those_of_the_page_and_each_cell_can_be_typed():
    cells = []
    for experiment, cfg in zip(TABLES, configs(tuple(TABLES)), strict=True):
        numbers = {
            (settings, metric, value)
            for settings, metrics in cfg.published.cells.items()
            for metric, value in metrics.items()
        }
        listed = set()
        for header, rows in TABLES[experiment]:
            if header[:3] == ["settings", "metric", "published"]:
                listed |= {(s, m, float(v)) for s, m, v in rows}
            elif header[:2] == ["experiment", "settings"]:
                listed |= {(s, m, float(v)) for e, s, m, v, _ in rows if e == experiment}
        assert numbers == listed, experiment
        assert cfg.published.source
        cells += [f"{experiment} {settings}" for settings in cfg.published.cells]
    assert [str(cfg) for cfg in configs(tuple(cells)) if isinstance(cfg, ConfigError)] == []


def test_what_an_experiment_needs_is_told():
    points = [
        (experiment, key, [path for path in paths(experiment) if not path.startswith(key)])
        for experiment in TABLES
        for key in [path.removesuffix("=x") for path in paths(experiment)]
    ]
    typed = [[f"experiment={experiment}", *others] for experiment, _, others in points]
    errors = [error for _, error in compose_points(typed)]
    for (experiment, key, _), error in zip(points, errors, strict=True):
        assert re.match(rf"{key}: must be given, .{{20}}", str(error)), (experiment, key)
        text = (CONF / f"experiment/{experiment}.yaml").read_text()
        assert re.search(rf"#   lora-lab train .*experiment={experiment} ", text)
        assert f"{key}=" in text.partition("\ndefaults")[0]


SMALLER = ["spectra.against_base=false", "spectra.truncation=none"]
SMALLER += ["trainer.max_epochs=1", "trainer.max_steps=2", "trainer.accumulate_grad_batches=1"]
TEXTS = ["generate.rows=2", "generate.max_new_tokens=3"]
BRIEF = {
    "e2e_gpt2": TEXTS,
    "metamath": [
        *(*TEXTS, "generate.every_n_steps=2", "generate.step_rows=2", "adapter.r=4"),
        *("trainer.val_check_interval=2", "data.val_share=0.2"),
    ],
    "no_robots": ["data.val_limit=4"],
    "tulu": ["data.val_share=0.2"],
}
"""What makes the runs of experiments brief, beside SMALLER."""
QUICK = ("spam_gpt2", "glue_mnli", "metamath")


@pytest.mark.parametrize(
    "experiment",
    [e if e in QUICK else pytest.param(e, marks=pytest.mark.slow) for e in FILES],
)
def test_each_protocol_runs_from_end_to_end(lab: Lab, experiment: str):
    assert lab(experiment, *FILES[experiment](), *SMALLER, *BRIEF.get(experiment, ())) == 0
    run = only_run()
    assert run.finished
    assert run.curve("val/loss")
    assert (run.last("generate/bleu") is not None) == (experiment == "e2e_gpt2")
    assert (run.last("generate/exact_match") is not None) == (experiment == "metamath")
    assert (run.last("test/loss") is not None) == any(
        name in experiment for name in ("spam", "mnli", "e2e", "metamath")
    )


def test_a_run_of_a_published_cell_has_its_numbers_beside_it(lab: Lab):
    settings = ["adapter=none", "seed=5", *FILES["spam_gpt2"]()]
    assert lab("spam_gpt2", *settings, "spectra.against_base=false") == 0
    facts = dict(run_tables(only_run())["facts"])
    assert facts["test/accuracy as published (LLMs-from-scratch, appendix E)"] == "0.4875"
    header, row = cells_table(cells_of([read_run(only_run())]))
    assert row[header.index("val/accuracy published")] == "0.45"
    with initialize_config_module("lora_lab.conf", version_base="1.3"):
        other = plan(compose_config(["experiment=spam_gpt2", *settings, "data.max_length=100"]))
        published: Any = with_published(other, "spam_gpt2").cfg.published
    assert published.cells == {}
