"""Checks of a config that need no model and no data: its keys and values, and each `_target_`."""

import inspect
import json
from collections.abc import Callable, Collection
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from lora_lab.config.schema import Component, Config, ConfigError, TargetRule, nearest


def parse_config(content: dict[str, Any], explicit_keys: Collection[str] = ()) -> Config:
    """The typed config of nested plain data. Raises ConfigError with all wrong keys and values.

    An experiment's YAML may set keys that only one choice of a group has, such as adapter.r, which
    LoRA alone has. Under another choice (adapter=full) these keys are dropped, but not those that
    the command line sets (`explicit_keys`), which are errors. `adapter.r=full` means adapter=full,
    so that `adapter.r=1,2,full` sweeps full fine-tuning beside ranks.
    """
    if isinstance(node := content.get("adapter"), dict) and node.get("r") == "full":
        # Settings of the adapter on the same command line are meant for the ranks, and no errors.
        content["adapter"] = {**node, "method": "full"}
        explicit_keys = [key for key in explicit_keys if not key.startswith("adapter.")]
    _drop_foreign_keys(content, "adapter", explicit_keys)
    _drop_foreign_keys(content, "base", explicit_keys)
    if isinstance(adapter := content.get("adapter"), dict):
        for pattern in ("rank_pattern", "alpha_pattern"):
            if isinstance(globs := adapter.get(pattern), dict):
                # Hydra reads the names of nn.Sequential's layers ("0", "1") as numbers.
                adapter[pattern] = {str(name): value for name, value in globs.items()}
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(e) for e in error.errors())) from None


def _drop_foreign_keys(content: dict[str, Any], group: str, explicit: Collection[str]) -> None:
    """Removes from content[group] the keys that only choices other than its `method` have.

    Those that are `explicit`, as "adapter.dropout", stay.
    """
    if not isinstance(node := content.get(group), dict):
        return
    chosen, others = set(), set()
    for choice in get_args(Config.model_fields[group].annotation):  # for adapter: Lora, Full, …
        methods = get_args(choice.model_fields["method"].annotation)
        (chosen if node.get("method") in methods else others).update(choice.model_fields)
    content[group] = {
        key: value
        for key, value in node.items()
        if key not in others - chosen or f"{group}.{key}" in explicit
    }


def _message(error: Any) -> str:
    """One of pydantic's errors as `key=value: rule`."""
    # pydantic puts a union's tag into the path: what it calls adapter.lora.r is adapter.r here.
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
    """The callable that a component's `_target_` names, after a check of the arguments.

    `key` is the component's key in the config, for messages. Raises ConfigError where the target
    cannot be imported, and as `check_arguments` does.
    """
    callee = import_target(key, component)
    check_arguments(key, callee, component.arguments, given)
    return callee


def import_target(key: str, component: Component) -> Callable[..., Any]:
    """The callable that a component's `_target_` names. Raises ConfigError where it has none."""
    try:
        return component.callee
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{key}._target_={component.target}: cannot be imported: {why}") from None


def check_arguments(
    key: str, callee: Callable[..., Any], arguments: dict[str, Any], given: Collection[str] = ()
) -> None:
    """Checks `arguments` against the signature and the annotations of `callee`.

    `given` are the names of arguments that the program itself passes. Raises ConfigError for an
    unknown or missing argument, and for a value of the wrong type or out of its range.
    """
    parameters, hints = parameters_of(callee)
    for name, value in arguments.items():
        if name not in parameters or name in given:
            known = [n for n in parameters if n not in given]
            raise ConfigError(
                f"{key}.{name}={value}: {_name_of(callee)} has no such argument"
                f"{nearest(name, known)} (it takes {', '.join(known)})"
            )
        try:
            # Strict: "3" is no int. But a list may stand for a tuple, which YAML does not have.
            strict = not isinstance(value, list)
            TypeAdapter(hints.get(name, Any)).validate_python(value, strict=strict)
        except ValidationError as error:
            # A union fails once for each of its members: the rules are joined by "or".
            messages = (_message({**e, "loc": ()}) for e in error.errors())
            rules = dict.fromkeys(message.partition(": ")[2] for message in messages)
            raise ConfigError(f"{key}.{name}={value}: {' or '.join(rules)}") from None
        except PydanticUserError:
            pass  # pydantic cannot check this annotation: the callee has to
    for name, parameter in parameters.items():
        is_required = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if is_required and name not in arguments and name not in given:
            raise ConfigError(f"{key}.{name}: must be given, {_name_of(callee)} needs it")


def parameters_of(
    callee: Callable[..., Any],
) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a callable, and their annotations.

    A class that takes **settings is understood to pass them on, so that those of its base class
    are its own too: `Text(text, label, **table)` also takes what `TableData` takes.
    """
    parameters = dict(inspect.signature(callee).parameters)
    if not inspect.isclass(callee):
        return parameters, get_type_hints(callee, include_extras=True)
    hints = get_type_hints(callee.__init__, include_extras=True)
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds and callee.__base__ not in (None, object):
        more, more_hints = parameters_of(callee.__base__)
        parameters = {n: p for n, p in parameters.items() if p.kind != p.VAR_KEYWORD}
        parameters, hints = {**more, **parameters}, {**more_hints, **hints}
    return parameters, hints


def _name_of(callee: Callable[..., Any]) -> str:
    """The name of a callable in messages."""
    return getattr(callee, "__name__", repr(callee))
