"""What each key of a config means, with its default, its type and the options that have it.

A meaning is written once, where its key is: behind the key in a YAML file of conf/, as

    keep: 0.99 # of the gain, by the ranks that are advised

or, where no YAML file has the key, below its field in the schema. `lora-lab explain` and the pages
of docs/ read both here.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name
from typing import Any

import yaml
from pydantic import PydanticUserError, TypeAdapter

from lora_lab.config.folders import config_folders
from lora_lab.config.options import option_text, options
from lora_lab.config.schema import Config


@dataclass(frozen=True)
class Key:
    """A key as it is typed, and what is known of it.

    `option` is the option whose YAML sets it, as "data=text"; "" for conf/train.yaml and for keys
    that the schema alone has. `default` is written as in YAML; "" where there is none. `target` is
    the callable whose argument it is, as "lora_lab.data.text.Text".
    """

    name: str
    default: str
    meaning: str
    option: str = ""
    target: str = ""

    @property
    def type(self) -> str:
        """What it may be, as "integer ≥ 1 | null"; "" where neither schema nor callable says."""
        field = schema_keys().get(general_name(self.name), {})
        return _type_of(field) or (_argument_type(self.target, self.name) if self.target else "")


def meanings(name: str) -> list[Key]:
    """All that is known of a key: one entry for each option whose YAML has it; [] for no key.

    `data.train` has several, of which a run's is that of its data=OPTION. A name that the user gave
    stands for others: `target.mine.r` is `target.NAME.r`.
    """
    keys = all_keys()
    exact = [key for key in keys if key.name == name]
    return exact or [key for key in keys if general_name(key.name) == general_name(name)]


def all_keys() -> list[Key]:
    """Each key of conf/train.yaml, of each option but experiments, and of the schema alone."""
    return list(_all_keys(config_folders()))


@cache
def _all_keys(_: tuple[Any, ...]) -> tuple[Key, ...]:
    """`all_keys`, read once for these folders of configs."""
    keys = list(_keys_in(_train_yaml(), "", ""))
    for group, choices in options().items():
        if group != "experiment":
            for option in choices:
                keys += keys_of(group, option)
    known = {general_name(key.name) for key in keys}
    for name, field in schema_keys().items():
        is_above_others = any(other.startswith(f"{name}.") for other in (*known, *schema_keys()))
        if name not in known and not (is_above_others and "description" not in field):
            default = _as_yaml(field["default"]) if "default" in field else ""
            keys.append(Key(name, default, field.get("description", "")))
    return tuple(keys)


def keys_of(group: str, option: str) -> list[Key]:
    """The keys that the YAML of an option sets itself, with those of other groups' it includes."""
    text = option_text(group, option)
    prefix = "" if "# @package _global_" in text else group.replace("/", ".") + "."
    keys = []
    for included in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(included, dict):  # {"/optimizer@optimizer": "adam"}, {"/data@_here_": "text"}
            ((path, other),) = included.items()
            other_group, _, place = path.strip("/").partition("@")
            below = prefix if place == "_here_" else f"{prefix}{place}."
            keys += _keys_in(option_text(other_group, other), below, f"{group}={option}")
    return [*keys, *_keys_in(text, prefix, f"{group}={option}")]


def parents_of(group: str, option: str) -> list[str]:
    """The options of the same group that an option begins from: ["lora"] for adapter=dora."""
    included = (yaml.safe_load(option_text(group, option)) or {}).get("defaults", [])
    return [name for name in included if isinstance(name, str) and name != "_self_"]


def general_name(name: str) -> str:
    """The key with NAME in the place of a name that the user gives: target.NAME.r."""
    return re.sub(r"^target\.[^.]+", "target.NAME", name)


@cache
def schema_keys() -> dict[str, dict[str, Any]]:
    """Dotted key → its JSON schema, of all keys that the schema names."""
    schema = Config.model_json_schema()
    return dict(_schema_keys(schema, schema["$defs"], ""))


def _schema_keys(
    node: dict[str, Any], definitions: dict[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys below a node. One that several classes have gets all types, as adapter.method."""
    fields: dict[str, list[dict[str, Any]]] = {}
    for branch in node.get("anyOf", node.get("oneOf", [node])):
        if "$ref" in branch:
            branch = definitions[branch["$ref"].rpartition("/")[2]]
        for name, field in branch.get("properties", {}).items():
            fields.setdefault(name, []).append(field)
        values = branch.get("additionalProperties")
        if isinstance(values, dict) and "$ref" in values:
            yield from _schema_keys(values, definitions, f"{prefix}NAME.")
    for name, (first, *others) in fields.items():
        yield prefix + name, {**first, "anyOf": [first, *others]} if others else first
        yield from _schema_keys(first, definitions, f"{prefix}{name}.")


def _type_of(field: dict[str, Any]) -> str:
    """The words of a JSON schema: {"type": "integer", "minimum": 0} → "integer ≥ 0"."""
    branches = field.get("anyOf", field.get("oneOf"))
    if branches:
        return " | ".join(dict.fromkeys(filter(None, map(_type_of, branches))))
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    words = {"object": "mapping", "array": "list", "string": "text"}
    name = "object" if "$ref" in field else field.get("type", "")
    kind = words.get(name, name)
    if "items" in field and (item := _type_of(field["items"])):
        kind = f"list of {item}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[bound]}" for bound, sign in bounds.items() if bound in field]
    return f"{kind} {', '.join(limits)}".strip()


def _argument_type(target: str, name: str) -> str:
    """The type of a callable's argument in the same words; "" where it has none.

    What a class hands on as `**table` is an argument of a class above it.
    """
    argument = name.rpartition(".")[2]
    try:
        callee = resolve_name(target)
        for one in getattr(callee, "__mro__", (callee,)):
            parameters = inspect.signature(one).parameters
            if argument in parameters:
                return _type_of(TypeAdapter(parameters[argument].annotation).json_schema())
    except (ImportError, AttributeError, ValueError, PydanticUserError):
        pass
    return ""


def _train_yaml() -> str:
    return next(file.read_text() for f in config_folders() if (file := f / "train.yaml").is_file())


def _keys_in(text: str, prefix: str, option: str) -> Iterator[Key]:
    """The keys of a YAML text, but for its defaults and Hydra's own."""
    node = yaml.compose(text)
    if not isinstance(node, yaml.MappingNode):
        return
    target = (yaml.safe_load(text) or {}).get("_target_", "")
    for name, value, comment in _entries(node, text.splitlines(), ""):
        if name.split(".")[0] not in ("defaults", "hydra", "_target_"):
            meaning = comment or _inherited_meaning(prefix + name, option)
            yield Key(prefix + name, value, meaning, option, target)


def _entries(
    node: yaml.MappingNode, lines: list[str], prefix: str
) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and comment of each entry; a mapping's entries stand behind it."""
    for key, value in node.value:
        name = prefix + key.value
        is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        # The comment of `spectra: # of ΔW` stands behind the key, other comments behind the value.
        mark = key.end_mark if is_block else value.end_mark
        comment = re.match(r"[:\s]*#\s*(.*)", lines[mark.line][mark.column :])
        text = "" if is_block else _between(value.start_mark, value.end_mark, lines)
        if not is_block or comment:
            yield name, text, comment[1] if comment else ""
        if is_block and isinstance(value, yaml.MappingNode):
            yield from _entries(value, lines, f"{name}.")


def _between(start: yaml.Mark, end: yaml.Mark, lines: list[str]) -> str:
    """The text of a value as the file has it."""
    if start.line == end.line:
        return lines[start.line][start.column : end.column]
    return " ".join(line.strip() for line in lines[start.line : end.line + 1])


def _inherited_meaning(name: str, option: str) -> str:
    """The meaning of a key without a comment: a parent option's, or the schema's."""
    if option:
        group, _, chosen = option.partition("=")
        for parent in parents_of(group, chosen):
            for key in keys_of(group, parent):
                if key.name == name and key.meaning:
                    return key.meaning
    return schema_keys().get(general_name(name), {}).get("description", "")


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
