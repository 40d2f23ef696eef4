"""The hash of settings, by which runs and bases are known."""

import hashlib
import json
from typing import Any


def content_hash(content: Any) -> str:
    """The SHA-256 of nested dicts, lists and numbers, whatever the order of a dict's keys.

    A float with an integral value counts as the int, so that lr=1 and lr=1.0 are one run.
    """
    return hashlib.sha256(json.dumps(_as_ints(content), sort_keys=True).encode()).hexdigest()


def _as_ints(content: Any) -> Any:
    """The content with each float of integral value as an int: 1.0 as 1."""
    if isinstance(content, dict):
        return {key: _as_ints(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_as_ints(value) for value in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content
