"""The reference pages name all that they are of, and mkdocs.yml all pages.

Truth: the YAML files of conf/ as PyYAML reads them, the schema's fields, argparse's own list of
commands, the classes of torchmetrics' table and of Spectrum. What runs log is compared with the
table of metrics by `small` of tests/conftest.py, after each run that a test trains.
Run: make test ARGS=tests/docs/test_reference.py
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

from docs.pages import commands_page, keys_page, metrics_page, options_page
from lora_lab.analysis.spectra import Spectrum
from lora_lab.config.options import options
from lora_lab.config.schema import Config
from lora_lab.report.metric_meanings import MEASURES, METRICS, TASK_METRICS, metric_of
from lora_lab.training.tasks import TASKS
from tests.config.test_key_meanings import CONF, fields_below, leaves
from tests.conftest import command

ROOT = Path(__file__).parents[2]
GENERATED = {"reference/keys.md", "reference/options.md", "reference/commands.md"}
GENERATED |= {"reference/metrics.md"}


@pytest.fixture(scope="module")
def page_of_options() -> str:
    """Made once, as it reads all YAML files."""
    return options_page.text()


def test_every_field_of_the_schema_is_on_the_page_of_keys():
    text, names = keys_page.text(), [*fields_below(Config, "")]
    groups = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    assert not [name for name in names if f"| `{name}` |" not in text and name not in groups]


@pytest.mark.parametrize("group", options())
def test_every_option_and_its_keys_are_on_the_page_of_options(group: str, page_of_options: str):
    text = page_of_options
    for option in options()[group]:
        anchor = f"{group.replace('/', '.')}-{option}"
        _, _, section = text.partition(f"### {group}={option} {{ #{anchor} }}")
        section = section.partition("\n### ")[0].partition("\n## ")[0]
        assert f"(#{anchor})" in text
        assert section, option
        content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text()) or {}
        for key, _ in leaves(content, "") if group != "experiment" else ():
            assert re.search(rf"[`.]{re.escape(key)}` \|", section), key


def test_every_command_is_on_the_page_of_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command(monkeypatch, "no_such_command")
    known = re.findall(r"'(\w+)'", capsys.readouterr().err.partition("choose from")[2])
    text = commands_page.text()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == known
    assert len(known) > 13
    for flag in ("--dry-run", "--scale-intruders F", "--tolerance", "adapter.lr_ratio=1.0"):
        assert flag in text


def test_all_metrics_of_tasks_and_measures_are_in_the_table():
    of_tasks = {"loss"} | {n for task in TASKS.values() for n in (*task.metrics, *task.of_loss)}
    assert {metric.name for metric in TASK_METRICS} == of_tasks
    measures = Spectrum(torch.ones(2, dtype=torch.float64), (2, 2), 1e-7).measures()
    assert [metric.name for metric in MEASURES] == [*measures]
    text = metrics_page.text()
    for metric in (*METRICS, *MEASURES, *TASK_METRICS):
        assert f"| `{metric.name}` |" in text


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("val/accuracy", "val/<metric>"),
        ("val/acuracy", None),
        ("spectra/body.0.fc1/sigma_3", "spectra/<site>/<measure>"),
        ("spectra/body.0.fc1/intruders", "spectra/<site>/intruders"),
        ("spectra_of/depth/3/nuclear", "spectra_of/<group>/<measure>"),
        ("cut/16/val/loss", "cut/<k>/<metric of the run>"),
        ("cut/no/val/loss", None),
        ("generate/rougeL", "generate/<text metric>"),
        ("forget/increase", "forget/increase"),
        ("sigma_1", None),
    ],
)
def test_a_logged_name_has_its_line_of_the_table(name: str, form: str | None):
    metric = metric_of(name)
    assert (metric and metric.name) == form


def test_the_navigation_has_each_page_once():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages | GENERATED)
