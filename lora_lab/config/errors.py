"""The error of a wrong setting, and what its message ends with: the nearest valid word."""

import difflib
from collections.abc import Collection, Iterable

from pydantic import AfterValidator


class ConfigError(ValueError):
    """A setting is wrong. The message names its key, its value, the rule, the nearest valid one."""


def nearest(word: object, choices: Iterable[object]) -> str:
    """The end of an error message: "; nearest: WORD" with the choice most like `word`.

    Empty where no choice is alike.
    """
    matches = difflib.get_close_matches(str(word), list(map(str, choices)), n=1, cutoff=0.5)
    return f"; nearest: {matches[0]}" if matches else ""


def one_of(choices: Collection[str]) -> AfterValidator:
    """A pydantic validator for a name in a table such as INITS. Its error lists the names."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(value, choices)}")
        return value

    return AfterValidator(check)
