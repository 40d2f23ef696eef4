"""Hydra's grammar and composition: what is said on the command line → typed configs."""

import copy
import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lora_lab.config.checks import parse_config
from lora_lab.config.options import options
from lora_lab.config.schema import Config, ConfigError, nearest
from lora_lab.runs import NOT_IN_IDENTITY

HINT = """; settings are KEY=VALUE, in quotes where a value holds other signs: 'KEY="a value"'"""


def config_from_hydra(content: DictConfig, overrides: Sequence[str]) -> Config:
    """What Hydra composed by `overrides`, checked. Raises ConfigError."""
    said = [override.split("=")[0].lstrip("+~") for override in overrides]
    try:
        plain = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: must be given") from None
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    assert isinstance(plain, dict)
    return parse_config({str(key): value for key, value in plain.items()}, said)


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of one run, where Hydra is initialized. Raises ConfigError, and Hydra's errors."""
    return config_from_hydra(hydra.compose("train", list(overrides)), overrides)


def sweep_points(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a multirun: the product of what each argument sweeps.

    None where another sweeper than Hydra's own decides on them.
    """
    if any(a.startswith(("hydra.sweeper", "hydra/sweeper")) for a in arguments):
        return []
    settings = [a for a in arguments if "=" in a or a.startswith("~")]
    settings = [a for a in settings if not a.startswith(("hydra.", "hydra/"))]
    every: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(settings):
        key = override.get_key_element()
        if override.is_delete():
            every.append([str(override.input_line)])
        elif override.is_sweep_override():
            every.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            every.append([f"{key}={override.get_value_element_as_str()}"])
    return [list(point) for point in product(*every)]


def compose_points(points: Iterable[list[str]]) -> Iterator[tuple[list[str], Config | ConfigError]]:
    """Each point of a multirun: its overrides, and its config or why it has none."""
    ready = GlobalHydra.instance().is_initialized()  # a sweeper asks from within Hydra
    start = partial(hydra.initialize_config_module, "lora_lab.conf", version_base="1.3")
    with nullcontext() if ready else start():
        for overrides in points:
            try:
                yield overrides, _point(overrides)
            except ConfigError as error:
                yield overrides, error
            except (HydraException, OmegaConfBaseException) as error:
                yield overrides, ConfigError(hydra_error_message(error))


def _point(overrides: list[str]) -> Config:
    """What `compose_config` gives; of points that differ in values the choices are composed once.

    Values are set on a copy as Hydra sets them, in 1 ms where it takes 100 for the whole.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [o for o in parsed if o.package is not None or o.key_or_group in options()]
    values = [o for o in parsed if o not in choices]
    if any(o.type not in (OverrideType.CHANGE, OverrideType.FORCE_ADD) for o in values):
        return compose_config(overrides)
    config = copy.deepcopy(_chosen(tuple(str(o.input_line) for o in choices)))
    try:
        for o in values:
            added = o.is_force_add()
            OmegaConf.update(config, o.key_or_group, o.value(), merge=True, force_add=added)
    except OmegaConfBaseException:
        return compose_config(overrides)  # raises the same in Hydra's words
    return config_from_hydra(config, overrides)


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return hydra.compose("train", list(choices))


def published_config(experiment: str, cfg: Config) -> Config:
    """The experiment as its YAML has it, but for this run's seeds: what the paper's rows are of."""
    paper = _experiment(experiment)
    changed: dict[str, Any] = {"seed": cfg.seed, "spectra": cfg.spectra}
    for key in ("data", "base"):
        node, own = getattr(paper, key), getattr(cfg, key)
        if hasattr(node, "seed") and hasattr(own, "seed"):
            changed[key] = node.model_copy(update={"seed": own.seed})
    return paper.model_copy(update=changed)


@cache
def _experiment(name: str) -> Config:
    return compose_config([f"experiment={name}"])


def hydra_arguments(arguments: list[str]) -> list[str]:
    """The arguments as Hydra can read them.

    Flags come before overrides; the brackets of alpha/sqrt(r) are no function call; and a glob on
    module names, target='*.fc1', becomes an option of conf/target that no YAML has. What holds a *,
    a ? or a dot is a glob, any other word the name of an option. What a target or a pattern may say
    it need not say beforehand, so that Hydra must take it as new.
    """
    for argument in arguments:
        if argument.startswith("target="):
            for word in re.findall(r"[^\s,\[\]'\"]+", argument.removeprefix("target=")):
                if re.search(r"[*?.]", word):
                    ConfigStore.instance().store(word, {word: {"match": word}}, group="target")
    arguments = [
        re.sub(r"^(target\.|adapter\.(rank|alpha)_pattern)", r"++\1", a) for a in arguments
    ]
    arguments = [re.sub(r"(?<=/sqrt)\((r)\)(?!['\"])", r"\(\1\)", a) for a in arguments]
    return sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))


def hydra_error_message(error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one paragraph that names the nearest valid word."""
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read{HINT}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        known = options().get(group, {})
        hint = "; a layer by its name is target=all target.all.match=NAME, a glob has a * or a ?"
        hint = hint if group == "target" else ""
        return (
            f"{group}={option}: there is no such {group}{nearest(option, known)} "
            f"(conf/{group} has {', '.join(known)}){hint}"
        )
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        known = [str(key) for key in cause.parent_node if key != "hydra"]
        groups = () if "." in str(cause.full_key) else options()
        return (
            f"{cause.full_key}: there is no such key{nearest(cause.key, [*known, *groups])} "
            f"(there {'are' if len(known) > 1 else 'is'} {', '.join(known)})"
        )
    return " ".join(str(error).split())


def train_command(config: dict[str, Any], always: Collection[str] = ()) -> str | None:
    """The `lora-lab train` command that makes a run's config again, as short as it can be.

    It says the dotted keys of `always` even where they are at their defaults. None where conf/ has
    changed so that none does.
    """
    experiment = config["name"] in options().get("experiment", {})
    said = [f"experiment={config['name']}"] if experiment else [f"name={config['name']}"]
    with hydra.initialize_config_module("lora_lab.conf", version_base="1.3"):
        try:
            wanted, start = parse_config(dict(config)), compose_config(said).to_dict()
            differ = _differ(wanted.to_dict(), start, always)
            if compose_config([*said, *differ]).identity() != wanted.identity():
                return None
        except (ConfigError, HydraException, OmegaConfBaseException):
            return None
    return shlex.join(["lora-lab", "train", *said, *differ])


def _differ(
    wanted: dict[str, Any], start: dict[str, Any], always: Collection[str], prefix: str = ""
) -> list[str]:
    """The overrides that make one config of another, and those of the keys in `always`."""
    found = []
    for key, value in wanted.items():
        if prefix or key not in NOT_IN_IDENTITY or key in ("runs_dir", "bases_dir"):
            name = f"{prefix}{key}"
            if isinstance(value, dict) and isinstance(start.get(key), dict):
                found += _differ(value, start[key], always, f"{name}.")
            elif key not in start or value != start[key] or name in always:
                known = key in start and not name.startswith("target.")
                found.append(f"{'' if known else '++'}{name}={_grammar(value)}")
    free = prefix in ("adapter.", "base.")  # parse_config() takes away what another method has
    return found + [f"~{prefix}{key}" for key in start if key not in wanted and not free]


def _grammar(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_grammar, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][\w.-]*", value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return value if isinstance(value, str) else json.dumps(value)
