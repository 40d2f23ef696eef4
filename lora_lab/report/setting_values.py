"""The value of a setting as text in a table, and in the order of a table."""

import json
from typing import Any

MAX_TEXT_LENGTH = 40
"""Characters of a setting's value in a table; a longer one is cut and ends with …."""


def sort_key(value: Any) -> tuple[Any, ...]:
    """A key for `sorted` over a setting's values: numbers by size, then text, then None."""
    if value is None:
        return (2,)
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def short_text(value: Any) -> str:
    """A setting's value in a table that is read: at most MAX_TEXT_LENGTH characters.

    A dotted name of lora_lab or torch (a `_target_`) is cut to its last part; None is –.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rpartition(".")[2] if text.startswith(("lora_lab.", "torch.")) else text
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[: MAX_TEXT_LENGTH - 1]}…"


def full_text(value: Any) -> str:
    """A setting's value in a file that a program reads: a string as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
