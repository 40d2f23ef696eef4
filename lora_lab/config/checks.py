"""Checks of a config that need no model and no data: its keys and values, and each `_target_`."""

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from lora_lab.config import schema
from lora_lab.config.components import check_float32
from lora_lab.config.import_failure import import_failure
from lora_lab.config.schema import (
    Component,
    Config,
    ConfigError,
    Generate,
    TargetRule,
    nearest,
)


def parse_config(content: dict[str, Any], explicit_keys: Collection[str] = ()) -> Config:
    """The typed config of nested plain data. Raises ConfigError with all wrong keys and values.

    An experiment's YAML may set keys that only one choice of a group has, such as adapter.r, which
    LoRA alone has. Under another choice (adapter=full) these keys are dropped, but not those that
    the command line sets (`explicit_keys`), which are errors. `adapter.r=full` means adapter=full,
    and `adapter.r=none` adapter=none, so that `adapter.r=none,1,2,full` sweeps all beside ranks.
    """
    if isinstance(node := content.get("adapter"), dict) and node.get("r") in ("full", "none"):
        # Settings of the adapter on the same command line are meant for the ranks, and no errors.
        content["adapter"] = {**node, "method": node["r"]}
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
        raise ConfigError("\n".join(error_messages(error, content))) from None


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


def error_messages(
    error: ValidationError, content: dict[str, Any], parents: Sequence[str] = ()
) -> list[str]:
    """One message for each wrong key of `content`, as `key=value: rule`.

    A union has an error for each of its members: their rules are joined by "or". `parents` are the
    keys above those that were checked.
    """
    rules: dict[str, dict[str, None]] = {}
    for e in error.errors():
        setting, rule = _setting_and_rule([*parents, *_path(e, content)], e)
        rules.setdefault(setting, {})[rule] = None
    return [f"{setting}: {' or '.join(rule)}" for setting, rule in rules.items()]


def _path(error: Any, content: Any) -> list[str]:
    """The keys that lead to the wrong value, without the members of unions.

    pydantic names these too: what it calls adapter.lora.r is adapter.r here.
    """
    path: list[str] = []
    node: Any = content
    for i, part in enumerate(error["loc"]):
        is_absent = error["type"] == "missing" and i == len(error["loc"]) - 1
        is_key = isinstance(node, dict) and part in node
        if is_absent or is_key or (isinstance(node, list) and isinstance(part, int)):
            path.append(str(part))
            node = None if is_absent else node[part]
    return path


def _setting_and_rule(path: list[str], error: Any) -> tuple[str, str]:
    """One of pydantic's errors as the setting that is wrong, `key=value`, and the rule for it."""
    key, value, kind = ".".join(path), error["input"], error["type"]
    rule = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    rule = re.sub(r"^(Input|Tuple|List|Dictionary|String) should ", "must ", rule)
    if kind == "extra_forbidden":
        below = {"target": TargetRule, "generate": Generate}
        known = below[path[0]].model_fields if path[0] in below else ()
        known = Config.model_fields if len(path) == 1 else known
        where = f" with {path[0]}={error['loc'][1]}" if path[0] in ("adapter", "base") else ""
        return f"{key}={value}", f"there is no such key{where}{nearest(path[-1], known)}"
    if kind == "missing":
        return key, "has too few values" if isinstance(error["loc"][-1], int) else "must be given"
    if kind == "union_tag_not_found":
        return key, "must be given"
    if kind == "union_tag_invalid":
        tags = error["ctx"]["expected_tags"].replace("'", "")
        return f"{key}.method={value['method']}", f"must be one of {tags}"
    if kind in ("model_type", "dict_type"):
        rule = f"must be keys with values, in quotes: {_example(key, error)}"
    if kind == "string_pattern_mismatch" and key == "name":
        rule = "must be of letters, digits and _ - . and not begin with - or ."
    if key == "adapter.r":
        rule += ", or full"
    if isinstance(value, dict):
        return key, rule
    shown = value if isinstance(value, str | float) else json.dumps(value, default=str)
    return f"{key}={shown}", rule


def _example(key: str, error: Any) -> str:
    """How a mapping is written on the command line: 'early_stopping={metric: …, patience: …}'.

    In quotes, as the shell would make several arguments of the braces.
    """
    model = getattr(schema, error.get("ctx", {}).get("class_name", ""), None)
    fields = model.model_fields if model else {"NAME": None}
    required = [name for name, field in fields.items() if not field or field.is_required()]
    return f"'{key}={{{', '.join(f'{name}: …' for name in required or fields)}}}'"


def resolve_component(
    key: str,
    component: Component,
    kind: type,
    given: Collection[str] = (),
    sizes: Collection[str] = (),
) -> Callable[..., Any]:
    """The callable that a component's `_target_` names, after a check of the arguments.

    `key` is the component's key in the config, for messages. Raises ConfigError as `import_target`
    and `check_arguments` do.
    """
    callee = import_target(key, component, kind)
    check_arguments(key, callee, component.arguments, given, sizes)
    return callee


def import_target(key: str, component: Component, kind: type) -> Callable[..., Any]:
    """The callable that a component's `_target_` names: a class of `kind`, or a function of one.

    A function is known by its return annotation: one without might do anything. Raises ConfigError
    where it cannot be imported, or is neither.
    """
    setting = f"{key}._target_={component.target}"
    try:
        callee = component.callee
    except Exception as error:
        why = import_failure(component.target, error)
        raise ConfigError(f"{setting}: cannot be imported: {why}") from None
    result = callee if inspect.isclass(callee) else _return_type(callee)
    if not (inspect.isclass(result) and issubclass(result, kind)):
        raise ConfigError(
            f"{setting}: must be {_a(kind)}, or a function that gives one by its annotation, "
            f"`def NAME(…) -> {kind.__name__}`"
        )
    return callee


def _return_type(function: Any) -> Any:
    """What a function is annotated to return; None where it is not."""
    try:
        return get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):  # no function; or a name that is not there
        return None


def check_kind(key: str, component: Component, built: object, kind: type) -> None:
    """Raises ConfigError where the function that `_target_` names has built no `kind`."""
    if not isinstance(built, kind):
        raise ConfigError(
            f"{key}._target_={component.target}: must give {_a(kind)}, and gave {built!r:.50}"
        )


def _a(kind: type) -> str:
    """A class in messages, as `a Module of torch`."""
    return f"a {kind.__name__} of {kind.__module__.partition('.')[0]}"


def check_arguments(
    key: str,
    callee: Callable[..., Any],
    arguments: dict[str, Any],
    given: Collection[str] = (),
    sizes: Collection[str] = (),
) -> None:
    """Checks `arguments` against the signature and the annotations of `callee`.

    `given` are the names of arguments that the program itself passes, `sizes` those that the data
    offers a model, for the message of one that is missing. Raises ConfigError for an
    unknown or missing argument, and for a value of the wrong type or out of its range.
    """
    parameters, hints = parameters_of(callee)
    # These annotations hold, and none of these arguments is infinite. A user's class may take more
    # than its annotations say: what pydantic does not know of them, it has to check itself.
    module = str(getattr(callee, "__module__", ""))
    is_strict = module.startswith(("lora_lab.", "torch.", "lightning."))
    rigour = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False) if is_strict else None
    takes_any = inspect.Parameter.VAR_KEYWORD in [p.kind for p in parameters.values()]
    for name, value in arguments.items():
        if name in given or not (takes_any or name in parameters):
            known = [n for n in parameters if n not in given]
            raise ConfigError(
                f"{key}.{name}={value}: {_name_of(callee)} has no such argument"
                f"{nearest(name, known)} (it takes {', '.join(known)})"
            )
        try:
            # Strict: "3" is no int. But a list may stand for a tuple, which YAML does not have.
            strict = not isinstance(value, list)
            hint: Any = hints.get(name, Any)
            hint = Annotated[hint, AfterValidator(check_float32)] if is_strict else hint
            TypeAdapter(hint, config=rigour).validate_python(value, strict=strict)
        except ValidationError as error:
            # A union fails once for each of its members: the rules are joined by "or".
            rules = dict.fromkeys(
                _setting_and_rule([f"{key}.{name}"], e)[1] for e in error.errors()
            )
            raise ConfigError(f"{key}.{name}={value}: {' or '.join(rules)}") from None
        except PydanticUserError:
            pass  # pydantic cannot check this annotation: the callee has to
    for name, parameter in parameters.items():
        is_required = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if is_required and name not in arguments and name not in given:
            offered = f" (the data's sizes are {', '.join(sizes)})" if sizes else ""
            hint = f"{nearest(name, sizes)}{offered}"
            raise ConfigError(f"{key}.{name}: must be given, {_name_of(callee)} needs it{hint}")


def parameters_of(
    callee: Callable[..., Any],
) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a callable, and their annotations.

    A class that takes **settings is understood to pass them on, so that those of its base class
    are its own too: `Text(text, label, **table)` also takes what `TableData` takes.
    """
    try:
        parameters = dict(inspect.signature(callee).parameters)
    except ValueError as error:  # some that are written in C
        raise ConfigError(f"{_name_of(callee)}: its arguments cannot be read: {error}") from None
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
