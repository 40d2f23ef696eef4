"""Each key of a config has a meaning, a default and a type.

Truth: the YAML files of conf/ as PyYAML reads them, the fields of pydantic's classes, the tables of
lora_lab.adapters, and for types what pydantic accepts.
Run: make test ARGS=tests/config/test_key_meanings.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from lora_lab.adapters import FORMS, GROUPS, INITS, OVER_RANK, SCALINGS, TRAINS
from lora_lab.config.generate import TEXT_METRICS
from lora_lab.config.key_meanings import all_keys, general_name, meanings
from lora_lab.config.schema import Config

CONF = Path(__file__).parents[2] / "conf"


def leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a YAML file's content, but for what is Hydra's own."""
    for key, value in node.items():
        if key in ("defaults", "_target_") or (key == "hydra" and not prefix):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


FILES = sorted(
    path for path in CONF.rglob("*.yaml") if path.parts[-2] not in ("experiment", "_shared")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_key_of_a_yaml_file_has_its_default_and_a_meaning(path: Path):
    group = "" if path.parent == CONF else str(path.parent.relative_to(CONF))
    text = path.read_text()
    prefix = "" if not group or "@package _global_" in text else group.replace("/", ".") + "."
    option = f"{group}={path.stem}" if group else ""
    known = {key.name: key for key in all_keys() if key.option == option}
    for name, value in leaves(yaml.safe_load(text), prefix):
        assert yaml.safe_load(known[name].default) == value, name
        assert known[name].meaning, name


def fields_below(kind: Any, prefix: str) -> Iterator[str]:
    """The dotted names of all fields of pydantic classes in an annotation."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield prefix + (field.alias or name)
            yield from fields_below(field.annotation, f"{prefix}{field.alias or name}.")
    else:
        is_mapping = getattr(kind, "__origin__", None) is dict
        for argument in get_args(kind):
            yield from fields_below(argument, f"{prefix}NAME." if is_mapping else prefix)


def test_every_field_of_the_schema_has_a_meaning():
    known = {general_name(key.name): key.meaning for key in all_keys()}
    names = set(fields_below(Config, ""))
    assert {"adapter.r", "target.NAME.tied", "adapter.allocation.beta1", "published.cells"} < names
    groups = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    assert not [name for name in sorted(names - groups) if not known.get(name)]
    assert set(meanings("target.mine.r")) == set(meanings("target.NAME.r"))
    assert meanings("adapter.rank") == []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("adapter.init", INITS),
        ("adapter.form", FORMS),
        ("adapter.scaling", SCALINGS),
        ("adapter.trains", TRAINS),
        ("adapter.over_rank", OVER_RANK),
        ("target.NAME.kind", GROUPS),
        ("generate.metrics", TEXT_METRICS),
    ],
)
def test_a_meaning_names_all_that_can_be_chosen(key: str, words: tuple[str, ...]):
    for one in meanings(key):
        assert not [w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", one.meaning)]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("adapter.r", "integer > 0"),
        ("seed", "integer ≥ 0, < 4294967296"),
        ("spectra.keep", "number > 0, ≤ 1"),
        ("spectra.every_n_steps", "integer > 0 | null"),
        ("base.method", "train | checkpoint | pretrained"),
        ("optimizer.schedule", "constant | linear | cosine"),
        ("also_train", "list of text"),
        ("adapter.rank_pattern", "mapping | null"),
        ("early_stopping", "mapping | null"),
        ("data.val", "text | null"),
        ("trainer.max_steps", ""),
    ],
)
def test_types_are_in_words(key: str, words: str):
    assert meanings(key)[-1].type == words
