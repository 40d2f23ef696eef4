"""From the command line to typed configs and back, by Hydra's grammar and composition."""

import copy
import importlib.util
import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.config import project
from lora_lab.config.checks import parse_config
from lora_lab.config.command_line import (
    check_choice,
    flags_first,
    parse_overrides,
    swept_values,
)
from lora_lab.config.messages import hydra_error_message
from lora_lab.config.options import option_text, options
from lora_lab.config.schema import Config, ConfigError
from lora_lab.config.search_path import ConfigFolders
from lora_lab.runs import NOT_IN_IDENTITY


def package_folder(package: str, folder: str) -> str:
    """A folder inside an installed Python package, which `${package_folder:NAME,FOLDER}` gives.

    Weights that are installed as a package have another path on each machine. Raises ValueError
    where the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the Python package {package} is not installed: pip install {package}")
    return str(Path(spec.submodule_search_locations[0], folder))


def project_path(path: str) -> str:
    """A file or folder in the user's project, which `${project:PATH}` gives from any folder.

    Raises ValueError where the command belongs to no project.
    """
    if project.project is None:
        raise ValueError("this is no project: --project DIR names one (`lora-lab new` makes one)")
    return str(project.project.folder / path)


OmegaConf.register_new_resolver("package_folder", package_folder, replace=True)
OmegaConf.register_new_resolver("project", project_path, replace=True)
Plugins.instance().register(ConfigFolders)


def config_from_hydra(content: DictConfig, overrides: Sequence[str]) -> Config:
    """Turns what Hydra composed into a checked Config. Raises ConfigError.

    `overrides` are those of the command line: a key that they set and that does not apply, as
    adapter.r under adapter=none, is an error, where one of an experiment's YAML is dropped.
    """
    explicit_keys = [override.split("=")[0].lstrip("+~") for override in overrides]
    try:
        plain = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: must be given") from None
    except OmegaConfBaseException as error:
        cause = " ".join(str(error).partition("full_key:")[0].split())
        if is_needed := re.search("ConfigError raised .*?: (.*)", cause):
            raise ConfigError(is_needed[1]) from None
        raise ConfigError(f"{error.full_key}: {cause}") from None
    assert isinstance(plain, dict)
    return parse_config({str(key): value for key, value in plain.items()}, explicit_keys)


def composition() -> AbstractContextManager[None]:
    """Within it Hydra composes conf/, with the other folders of configs (config/folders.py)."""
    return hydra.initialize_config_module("lora_lab.conf", version_base="1.3")


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of one run; Hydra must be initialized. Raises ConfigError and Hydra's errors."""
    return config_from_hydra(hydra.compose("train", list(overrides)), overrides)


def sweep_points(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a multirun: the product of the values that arguments sweep.

    adapter.r=1,2 seed=0,1 gives four points, of which the last argument varies fastest. Empty
    where the arguments choose another sweeper, which makes its points itself. Raises ConfigError
    where there are no points, or too many.
    """
    if any(a.startswith(("hydra.sweeper", "hydra/sweeper")) for a in arguments):
        return []
    settings = [a for a in arguments if not a.startswith(("-", "hydra.", "hydra/"))]
    return [list(point) for point in product(*swept_values(settings))]


def compose_points(points: Iterable[list[str]]) -> Iterator[tuple[list[str], Config | ConfigError]]:
    """The overrides of each point of a multirun with its config, or the error where it has none."""
    is_ready = GlobalHydra.instance().is_initialized()  # as when Hydra's sweeper is the caller
    with nullcontext() if is_ready else composition():
        for overrides in points:
            try:
                yield overrides, _compose_point(overrides)
            except ConfigError as error:
                yield overrides, error
            except (HydraException, OmegaConfBaseException) as error:
                yield overrides, ConfigError(hydra_error_message(error))


def _compose_point(overrides: list[str]) -> Config:
    """The same config as `compose_config` gives, in 1 ms instead of 100.

    Most points of a multirun choose the same YAML files and differ in single values. So Hydra
    composes each set of choices (adapter=dora, target=[linear,conv]) once, and the values
    (adapter.r=4, seed=1) are set on a copy, as Hydra sets them.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        check_choice(override)
    choices = [o for o in parsed if o.package is not None or o.key_or_group in options()]
    values = [o for o in parsed if o not in choices]
    if any(o.type not in (OverrideType.CHANGE, OverrideType.FORCE_ADD) for o in values):
        return compose_config(overrides)  # +key, ~key: Hydra checks whether the key exists
    config = copy.deepcopy(_compose_choices(tuple(str(o.input_line) for o in choices)))
    try:
        for o in values:
            added = o.is_force_add()
            OmegaConf.update(config, o.key_or_group, o.value(), merge=True, force_add=added)
    except OmegaConfBaseException:
        return compose_config(overrides)  # raises Hydra's error, whose message is the better one
    return config_from_hydra(config, overrides)


@cache
def _compose_choices(choices: tuple[str, ...]) -> DictConfig:
    """What Hydra composes of these overrides, which takes 100 ms. Not to be changed by callers."""
    return hydra.compose("train", list(choices))


def needed(key: str, what: str) -> str:
    """What `${needed:KEY,WHAT}` in an experiment's YAML gives for a path that its user must set.

    Raises ConfigError, which says what it must be.
    """
    raise ConfigError(f"{key}: must be given, {what}")


OmegaConf.register_new_resolver("needed", needed, replace=True)


def published_config(experiment: str, cfg: Config, settings: str = "") -> Config:
    """The config that published numbers belong to, with the seeds and the files of `cfg`.

    It is the experiment as its YAML has it, with the `settings` of a published cell, as they are
    typed, but with what `cfg` measures (`spectra`, `forget`), its seeds, and what lies at its
    paths: a run that differs in these alone may be shown beside the published numbers.
    """
    choice = f"experiment={experiment}"
    typed = [choice, *shlex.split(settings), *_needed_paths(choice, cfg)]
    published = _compose_point(hydra_arguments(typed))
    changes: dict[str, Any] = {"seed": cfg.seed, "spectra": cfg.spectra, "forget": cfg.forget}
    for key in ("data", "model", "base", "adapter"):
        node, run_node = getattr(published, key), getattr(cfg, key)
        same = ("seed", "sha256")
        same = [name for name in same if hasattr(node, name) and hasattr(run_node, name)]
        if getattr(node, "start_from", None) and getattr(run_node, "start_from", None):
            same += ["start_from", "start_sha256"]
        update = {name: getattr(run_node, name) for name in same}
        if content := getattr(run_node, "content", None):
            paths = {n: c for n, c in content.items() if node.arguments.get(n) is not None}
            update["content"] = paths
        changes[key] = node.model_copy(update=update)
    return published.model_copy(update=changes)


def _needed_paths(choice: str, cfg: Config) -> list[str]:
    """The overrides that give an experiment the paths that it needs, as `cfg` has them."""
    experiment: Any = OmegaConf.to_container(_compose_choices((choice,)), resolve=False)
    return [
        f"{key}.{name}={_grammar(getattr(cfg, key).arguments.get(name))}"
        for key in ("data", "model")
        for name, value in experiment[key].items()
        if str(value).startswith("${needed:")
    ]


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments rewritten so that Hydra can read them.

    - A glob on module names, target='*.fc1', is registered as an option of conf/target, as if a
      YAML file had it. A word with a *, a ? or a dot is a glob, any other the name of an option.
    - Keys of a target and of generate, and the globs of a pattern, need not be in the YAML before:
      they get Hydra's ++, which adds a key or changes it.
    - Any argument of Lightning's Trainer gets ++ too, also where it is given with one +.
    - The brackets of alpha/sqrt(r) are escaped: Hydra would read a function call.
    - Where a name, a model or a data set is chosen and no experiment, there is none: the run starts
      from the defaults of the groups.
    - Flags go before overrides.

    Raises ConfigError for a flag that there is not.
    """
    arguments = flags_first(arguments)
    keys = {argument.partition("=")[0] for argument in arguments}
    if keys & {"name", "model", "data"} and not keys & {"experiment", "~experiment"}:
        arguments = [*arguments, "~experiment"]
    for argument in arguments:
        if argument.startswith("target="):
            for word in re.findall(r"[^\s,\[\]'\"]+", argument.removeprefix("target=")):
                if re.search(r"[*?.]", word):
                    ConfigStore.instance().store(word, {word: {"match": word}}, group="target")
    new_key = r"^\+?(target\.|trainer\.|generate\.|adapter\.(rank|alpha)_pattern)"
    brackets = r"(?<=/sqrt)\((r)\)(?!['\"])"
    arguments = [re.sub(new_key, r"++\1", argument) for argument in arguments]
    return [re.sub(brackets, r"\(\1\)", argument) for argument in arguments]


def train_command(config: dict[str, Any], shown_keys: Collection[str] = ()) -> str | None:
    """The shortest `lora-lab train` command that composes a run's config.

    It sets the dotted keys of `shown_keys` even where they have their defaults. None where no
    command does, because conf/ has changed since.
    """
    if config["name"] in options().get("experiment", {}):
        start = [f"experiment={config['name']}"]
    else:
        start = ["~experiment", f"name={config['name']}", *_choices(config)]
    with composition():
        try:
            wanted = parse_config(dict(config))
            if start[0].startswith("experiment="):
                start += _needed_paths(start[0], wanted)
            defaults = compose_config(start).to_dict()
            changes = _overrides_between(defaults, wanted.to_dict(), shown_keys)
            if compose_config([*start, *changes]).identity() != wanted.identity():
                return None
        except (ConfigError, HydraException, OmegaConfBaseException):
            return None
    shown = [override for override in start if override != "~experiment"]  # follows from the name
    return shlex.join(["lora-lab", "train", *shown, *changes])


def _choices(config: dict[str, Any]) -> list[str]:
    """The options of conf/ that a config without an experiment was begun from, as model=mlp."""
    choices = []
    for group, key in {"data": "_target_", "model": "_target_", "base": "method"}.items():
        for option in options()[group]:
            content = yaml.safe_load(option_text(group, option)) or {}
            if content.get(key) == config[group].get(key):
                choices.append(f"{group}={option}")
                break
    return choices


def _overrides_between(
    start: dict[str, Any], wanted: dict[str, Any], shown_keys: Collection[str], prefix: str = ""
) -> list[str]:
    """The overrides that make `start` into `wanted`, and those of `shown_keys`.

    Keys that cannot change a result are left out, but for the directories. `prefix` is the dotted
    key of the two nodes, with its last dot.
    """
    overrides = []
    for key, value in wanted.items():
        if prefix or key not in NOT_IN_IDENTITY or key in ("runs_dir", "bases_dir"):
            name = f"{prefix}{key}"
            if isinstance(value, dict) and isinstance(start.get(key), dict):
                overrides += _overrides_between(start[key], value, shown_keys, f"{name}.")
            elif key not in start or value != start[key] or name in shown_keys:
                is_known = key in start and not name.startswith("target.")
                overrides.append(f"{'' if is_known else '++'}{name}={_grammar(value)}")
    # parse_config() drops the keys that another method of `adapter` or `base` has.
    drops_itself = prefix in ("adapter.", "base.")
    return overrides + [f"~{prefix}{k}" for k in start if k not in wanted and not drops_itself]


def _grammar(value: Any) -> str:
    """A value as Hydra's grammar writes it: a text that is no plain word is quoted."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_grammar, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][\w.-]*", value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return value if isinstance(value, str) else json.dumps(value)
