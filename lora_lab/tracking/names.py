"""The names that W&B's server takes: of runs, groups, job types and tags."""

from collections.abc import Iterable

from lora_lab.config.hashes import content_hash

MAX_NAME, MAX_TAG = 128, 64
"""Characters of a run's name, group or job type, and of a tag, at most."""

HASH = 8
"""Characters of the hash that ends a shortened name."""


def shortened(name: str, limit: int = MAX_NAME) -> str:
    """The name; where it is longer than `limit`, its start and a hash of all of it.

    Two names that differ past the limit stay two: `aaa…` of 200 characters is 119 of them, a dash
    and 8 characters of the hash.
    """
    return name if len(name) <= limit else f"{name[: limit - HASH - 1]}-{content_hash(name)[:HASH]}"


def tags_of(names: Iterable[str]) -> list[str]:
    """Tags by these names, each once and none empty."""
    trimmed = (" ".join(name.split()) for name in names)
    return list(dict.fromkeys(shortened(name, MAX_TAG) for name in trimmed if name))
