"""Every check of a config that needs no model and no data: its values, and what they are for."""

import inspect
import json
from collections.abc import Callable, Collection
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from lora_lab.config.schema import (
    CheckpointBase,
    Component,
    Config,
    ConfigError,
    Full,
    Lora,
    NoAdapter,
    TargetRule,
    TrainedBase,
    nearest,
)


def parse_config(content: dict[str, Any], said: Collection[str] = ()) -> Config:
    """The config, typed, or a ConfigError that names every wrong key and value.

    An experiment may set what only one choice of a group has, as adapter.r for LoRA: with another
    choice (adapter=full) that falls away, but for the keys `said` on the command line.
    """
    if isinstance(node := content.get("adapter"), dict) and node.get("r") == "full":
        # A sweep over r has full fine-tuning beside the ranks, with what is said of these.
        content["adapter"] = {**node, "method": "full"}
        said = [key for key in said if not key.startswith("adapter.")]
    for group, choices in (
        ("adapter", (Lora, Full, NoAdapter)),
        ("base", (TrainedBase, CheckpointBase)),
    ):
        if not isinstance(node := content.get(group), dict):
            continue
        chosen, others = set(), set()
        for choice in choices:
            methods = get_args(choice.model_fields["method"].annotation)
            (chosen if node.get("method") in methods else others).update(choice.model_fields)
        content[group] = {
            key: value
            for key, value in node.items()
            if key not in others - chosen or f"{group}.{key}" in said
        }
    if isinstance(adapter := content.get("adapter"), dict):
        for pattern in ("rank_pattern", "alpha_pattern"):
            if isinstance(globs := adapter.get(pattern), dict):
                # Hydra reads the names of nn.Sequential's layers as numbers.
                adapter[pattern] = {str(name): value for name, value in globs.items()}
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_say(e) for e in error.errors())) from None


def _say(error: Any) -> str:
    """One of pydantic's errors as `key=value: rule`."""
    # pydantic puts a union's tag into the path: adapter.lora.r is our adapter.r.
    path = [str(part) for part in error["loc"]]
    if len(path) > 1 and path[0] in ("adapter", "base"):
        del path[1]
    key, value = ".".join(path), error["input"]
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "extra_forbidden":
        known = TargetRule.model_fields if path[0] == "target" else ()
        where = f" with {path[0]}={error['loc'][1]}" if path[0] in ("adapter", "base") else ""
        return f"{key}={value}: there is no such key{where}{nearest(path[-1], known)}"
    if error["type"] == "string_pattern_mismatch" and key == "name":
        return f"{key}={value}: must be of letters, digits and _ - . and not begin with - or ."
    if error["type"] == "missing":
        return f"{key}: must be given"
    if isinstance(value, dict):
        return f"{key}: {message}"
    if key == "adapter.r":
        message += ", or full"
    shown = value if isinstance(value, str | float) else json.dumps(value, default=str)
    return f"{key}={shown}: {message}"


def resolve_component(
    key: str, component: Component, given: Collection[str] = ()
) -> Callable[..., Any]:
    """What a component's `_target_` names, once the arguments are found to fit its signature.

    `given` are the arguments the program adds of its own. Each value is held against the
    parameter's annotation. Raises ConfigError for a target that cannot be imported, an unknown or
    missing argument, and a value of the wrong type or out of its range.
    """
    callee = import_target(key, component)
    check_arguments(key, callee, component.arguments, given)
    return callee


def import_target(key: str, component: Component) -> Callable[..., Any]:
    """What a component's `_target_` names. Raises ConfigError where it cannot be imported."""
    try:
        return component.callee
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{key}._target_={component.target}: cannot be imported: {why}") from None


def check_arguments(
    key: str, callee: Callable[..., Any], arguments: dict[str, Any], given: Collection[str] = ()
) -> None:
    """Raises ConfigError unless `arguments`, with those `given`, fit the callee's signature."""
    parameters = inspect.signature(callee).parameters
    hints = get_type_hints(callee.__init__ if inspect.isclass(callee) else callee, None, None, True)
    for name, value in arguments.items():
        if name not in parameters or name in given:
            known = [n for n in parameters if n not in given]
            raise ConfigError(
                f"{key}.{name}={value}: {_name_of(callee)} has no such argument"
                f"{nearest(name, known)} (it takes {', '.join(known)})"
            )
        try:
            # Strict, but for lists, which YAML has and tuples are written as.
            strict = not isinstance(value, list)
            TypeAdapter(hints.get(name, Any)).validate_python(value, strict=strict)
        except ValidationError as error:
            # A union fails once for each of its members.
            said = dict.fromkeys(_say({**e, "loc": ()}).partition(": ")[2] for e in error.errors())
            raise ConfigError(f"{key}.{name}={value}: {' or '.join(said)}") from None
        except PydanticUserError:
            pass  # an annotation that is no type of plain values: the callee's own to check
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if needed and name not in arguments and name not in given:
            raise ConfigError(f"{key}.{name}: must be given, {_name_of(callee)} needs it")


def _name_of(callee: Callable[..., Any]) -> str:
    """The short name of a component in messages."""
    return getattr(callee, "__name__", repr(callee))
