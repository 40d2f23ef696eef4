"""Globs on names, by which parts of a model are picked."""

from collections.abc import Collection, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any

from lora_lab.adapters.recipe import AdapterError


def as_list(globs: str | Sequence[str]) -> Sequence[str]:
    """One glob as a list of one."""
    return [globs] if isinstance(globs, str) else globs


# Of modules `blocks0` and `blocks[0]`, the glob "blocks[0]" is the name of the second, although it
# fits the first alone. So names are looked up before globs are tried, which also takes no time
# where each of a thousand names is given.
def matching(globs: str | Sequence[str], names: Collection[str]) -> set[str]:
    """Those of `names`, a dict or set, that are one of `globs` or else fit it."""
    matches: set[str] = set()
    for glob in as_list(globs):
        matches |= {glob} if glob in names else {n for n in names if fnmatchcase(n, glob)}
    return matches


def check_globs(key: str, globs: Any) -> None:
    """Raises AdapterError unless `globs`, which is set as `key`, is a glob or a list of globs."""
    is_list = isinstance(globs, Sequence | Set) and not isinstance(globs, bytes | bytearray)
    if not isinstance(globs, str) and not (is_list and all(isinstance(g, str) for g in globs)):
        raise AdapterError(f"{key}={globs!r}: must be a glob on names, or a list of globs")


def check_pattern(key: str, pattern: object) -> None:
    """Raises AdapterError unless `pattern`, which is set as `key`, has globs as its keys."""
    is_mapping = isinstance(pattern, Mapping)
    if not is_mapping or not all(isinstance(glob, str) for glob in pattern):
        raise AdapterError(f"{key}={pattern!r}: must be {{glob on names: value}}")
