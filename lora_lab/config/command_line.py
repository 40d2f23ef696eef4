"""The arguments of a command line before Hydra reads them: flags, overrides, and how many runs."""

import math
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import OverrideParseException

from lora_lab.config.errors import ConfigError, nearest
from lora_lab.config.options import options
from lora_lab.config.project import CONFIG_DIR_FLAGS, PROJECT_FLAG

MULTIRUN = ("-m", "--multirun")
FLAGS_WITH_VALUE = ("-c", "--cfg", "-p", "--package")
"""Flags of Hydra's with a value: to print the config or a part of it."""

MOST_RUNS = 100_000
"""The most runs of one command. All are checked before the first begins, in about 1 ms each."""

HINT = """; settings are KEY=VALUE, in quotes where a value holds other signs: 'KEY="a value"'"""


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags before overrides, as Hydra wants them. Raises ConfigError."""
    flags, overrides, rest = [], [], iter(arguments)
    known = (*MULTIRUN, "--resolve", *FLAGS_WITH_VALUE)
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if not flag.startswith("-"):
            overrides.append(argument)
            continue
        if flag not in known:
            # Those of config/project.py have been read before: none of them is among `arguments`.
            like = nearest(flag, (*known, PROJECT_FLAG, *CONFIG_DIR_FLAGS))
            hint = "; `lora-lab sweep FILE` has it" if flag == "--dry-run" else like
            raise ConfigError(
                f"{flag}: lora-lab train has no such option{hint}; it has -m, for several runs, "
                "and --help"
            )
        if flag in FLAGS_WITH_VALUE and not equals:
            if (value := next(rest, None)) is None:
                raise ConfigError(f"{flag}: must be followed by a value")
            argument = f"{flag}={value}"
        flags.append(argument)
    return [*flags, *overrides]


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """What Hydra's grammar reads in overrides. Raises ConfigError for one that cannot be read."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except OverrideParseException as error:
        raise ConfigError(unreadable(error)) from None
    for override in overrides:
        if not override.key_or_group:
            raise ConfigError(f"{override.input_line}: has no key{HINT}")
    return overrides


def unreadable(error: OverrideParseException) -> str:
    """The message for an override that is not of Hydra's grammar."""
    text = str(error.override)
    key, _, value = text.partition("=")
    if value.startswith("{") and not value.endswith("}"):  # the shell has cut it at a space
        return f"{text}: its brace is not closed: braces need quotes, '{key}={{NAME: VALUE}}'"
    return f"{text}: cannot be read{HINT}"


def check_single(arguments: Sequence[str]) -> None:
    """Raises ConfigError for overrides that one run cannot have: several values, no option."""
    for override in parse_overrides([a for a in arguments if not a.startswith("-")]):
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line}: has several values, each a run: -m runs them all "
                f"(a list is one value, {override.get_key_element()}=[…])"
            )
        check_choice(override)


def check_choice(override: Override) -> None:
    """Raises ConfigError where a group of conf/ is set to what names no option: null, a number."""
    group = override.key_or_group
    if override.is_delete() or group not in options():
        return
    if isinstance(value := override.value(), dict):
        return  # optimizer={lr: 0.3} sets keys
    # Hydra would merge several options of a group; only targets can be several.
    names = value if isinstance(value, list) and group == "target" else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        hint = "; ~experiment leaves it out" if group == "experiment" else ""
        raise ConfigError(
            f"{override.input_line}: must be the name of an option: conf/{group} has "
            f"{', '.join(options()[group])}{hint}"
        )


def values_of(override: Override) -> Sequence[str]:
    """The overrides, as text, of each value that an override sweeps. Raises ConfigError for none.

    `range(10)` is counted, and refused where it is too long, before any of it is made.
    """
    key, value = override.get_key_element(), override.value()
    if override.is_delete():
        return [str(override.input_line)]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if isinstance(value, RangeSweep):
        _check_range(override, value)
    if isinstance(value, Glob):
        values = value.filter(list(options().get(override.key_or_group, {})))
    elif isinstance(value, IntervalSweep):
        raise ConfigError(f"{override.input_line}: has no end of values; range(0,3) has")
    else:
        values = override.sweep_string_iterator()
    if not (texts := [f"{key}={value}" for value in values]):
        raise ConfigError(f"{override.input_line}: has no value, and so no run")
    return texts


def _check_range(override: Override, value: RangeSweep) -> None:
    """Raises ConfigError for a range that has no value, or more than MOST_RUNS."""
    start, stop, step = (float(x) for x in (value.start or 0, value.stop or 0, value.step))
    count = (stop - start) / step if step else math.nan
    if not math.isfinite(count):
        raise ConfigError(f"{override.input_line}: has no end")
    if count <= 0:
        raise ConfigError(
            f"{override.input_line}: has no value, and so no run: it goes from {start:g} by "
            f"{step:g} to below {stop:g}"
        )
    check_count(math.ceil(count), str(override.input_line))


def check_count(count: int, where: str) -> None:
    """Raises ConfigError for more runs than MOST_RUNS."""
    if count > MOST_RUNS:
        raise ConfigError(f"{where}: asks for {count} runs; one command has {MOST_RUNS} at most")


def swept_values(arguments: Sequence[str]) -> list[Sequence[str]]:
    """For each override, those of the values that it sweeps: [["r=1", "r=2"], ["seed=0"]].

    Raises ConfigError where one sweeps over nothing, or all together make too many runs.
    """
    choices = [values_of(override) for override in parse_overrides(arguments)]
    swept = [a for a, values in zip(arguments, choices, strict=True) if len(values) > 1]
    check_count(math.prod(map(len, choices)), " ".join(swept))
    return choices
