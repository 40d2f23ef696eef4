"""Whether what a config's `_target_` names can be called with what stands beside it."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from lora_lab.config import Component, ConfigError, nearest, say


def bind(key: str, component: Component, given: Collection[str] = ()) -> Callable[..., Any]:
    """What a component's `_target_` names, once the arguments are found to fit its signature.

    `given` are the arguments the program adds of its own. Each value is held against the
    parameter's annotation. Raises ConfigError for a target that cannot be imported, an unknown or
    missing argument, and a value of the wrong type or out of its range.
    """
    callee = imported(key, component)
    fits(key, callee, component.arguments, given)
    return callee


def imported(key: str, component: Component) -> Callable[..., Any]:
    """What a component's `_target_` names. Raises ConfigError where it cannot be imported."""
    try:
        return component.callee
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{key}._target_={component.target}: cannot be imported: {why}") from None


def fits(
    key: str, callee: Callable[..., Any], arguments: dict[str, Any], given: Collection[str] = ()
) -> None:
    """Raises ConfigError unless `arguments`, with those `given`, fit the callee's signature."""
    parameters = inspect.signature(callee).parameters
    hints = get_type_hints(callee.__init__ if inspect.isclass(callee) else callee, None, None, True)
    for name, value in arguments.items():
        if name not in parameters or name in given:
            known = [n for n in parameters if n not in given]
            raise ConfigError(
                f"{key}.{name}={value}: {component_name(callee)} has no such argument"
                f"{nearest(name, known)} (it takes {', '.join(known)})"
            )
        try:
            # Strict, but for lists, which YAML has and tuples are written as.
            strict = not isinstance(value, list)
            TypeAdapter(hints.get(name, Any)).validate_python(value, strict=strict)
        except ValidationError as error:
            # A union fails once for each of its members.
            said = dict.fromkeys(say({**e, "loc": ()}).partition(": ")[2] for e in error.errors())
            raise ConfigError(f"{key}.{name}={value}: {' or '.join(said)}") from None
        except PydanticUserError:
            pass  # an annotation that is no type of plain values: the callee's own to check
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if needed and name not in arguments and name not in given:
            raise ConfigError(f"{key}.{name}: must be given, {component_name(callee)} needs it")


def component_name(callee: Callable[..., Any]) -> str:
    """The short name of a component in messages."""
    return getattr(callee, "__name__", repr(callee))
