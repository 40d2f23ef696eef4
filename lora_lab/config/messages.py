"""What is said in place of Hydra's errors: key=value, the rule, and the nearest valid word."""

import re
from collections.abc import Collection, Iterator
from pkgutil import resolve_name
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from lora_lab.config.checks import parameters_of
from lora_lab.config.command_line import unreadable
from lora_lab.config.errors import nearest
from lora_lab.config.options import options

HYDRAS_WORDS = {
    r"Could not append to config. An item is already at '(.*?)'": "+{0}: is set already; {0}=… "
    "changes it",
    r"Could not delete '(.*?)'": "~{0}: cannot be left out; {0}=… chooses another",
    r"Could not delete from config. '(.*?)'": "~{0}: there is no such key",
    r"Could not override '(.*?)'": "{0}: there is no such group of conf/ to choose from",
}
"""Messages of Hydra's, as patterns, and what is said in their place."""


def hydra_error_message(error: Exception) -> str:
    """The message for an error of Hydra or OmegaConf: key=value, rule and nearest valid word."""
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return unreadable(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        known = options().get(group, {})
        hint = "; a layer by its name is target=all target.all.match=NAME, a glob has a * or a ?"
        hint = hint if group == "target" else ""
        listed = f" (conf/{group} has {', '.join(known)})" if known else ""
        return f"{group}={option}: there is no such {group}{nearest(option, known)}{listed}{hint}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return _unknown_key(str(cause.full_key), str(cause.key), cause.parent_node)
    message = " ".join(str(error).split())
    for pattern, rule in HYDRAS_WORDS.items():
        if match := re.search(pattern, message):
            return rule.format(*match.groups())
    return message


def _unknown_key(full_key: str, key: str, parent: Any) -> str:
    """The message for a key that a composed config has not, with how to set what is meant."""
    if full_key in options():
        return f"{full_key}: must be given: {full_key}={'|'.join(options()[full_key])}"
    node = OmegaConf.to_container(parent) if OmegaConf.is_dict(parent) else {}
    known = [str(key) for key in node if key != "hydra"] if isinstance(node, dict) else []
    if not known:
        return f"{full_key}: there is no such key: {full_key.rpartition('.')[0]} has none below it"
    if "_target_" in known and key in _arguments(parent._target_):
        return f"{full_key}: is not in the YAML: +{full_key}=… gives it to {parent._target_}"
    # A word without its group, as lr, can be meant for one inside a group, optimizer.lr.
    inner = [] if "." in full_key else [*options(), *_dotted_keys(node)]
    are = "are" if len(known) > 1 else "is"
    hint = nearest(key, [*known, *inner])
    return f"{full_key}: there is no such key{hint} (there {are} {', '.join(known)})"


def _dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The keys of nested dicts with dots, as optimizer.lr; those nearest to the root come first."""
    inner = {f"{prefix}{key}": value for key, value in node.items() if isinstance(value, dict)}
    for name, value in inner.items():
        yield from (f"{name}.{key}" for key in value)
    for name, value in inner.items():
        yield from _dotted_keys(value, f"{name}.")


def _arguments(target: str) -> Collection[str]:
    """The names of the arguments that a `_target_` takes; none where it cannot be imported."""
    try:
        return parameters_of(resolve_name(target))[0]
    except Exception:
        return ()
