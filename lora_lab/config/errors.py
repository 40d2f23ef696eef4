"""The error of a wrong setting, and what its message ends with: the nearest valid word."""

import difflib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from pydantic import AfterValidator


class ConfigError(ValueError):
    """A setting is wrong. The message names its key, its value, the rule, the nearest valid one."""


SYNONYMS = {"rank": "r", "lora_r": "r", "learning_rate": "lr", "epochs": "max_epochs"}
SYNONYMS |= {"target_modules": "target", "weights": "path", "modules_to_save": "also_train"}
"""Words that other libraries have, and ours for them."""


def nearest(word: object, choices: Iterable[object]) -> str:
    """The end of an error message: "; nearest: WORD" with the choice most like `word`.

    Of dotted keys, as optimizer.lr, the last part counts too. Empty where no choice is alike.
    """
    known = list(map(str, choices))
    meant = SYNONYMS.get(str(word), str(word))
    same = [choice for choice in known if choice.rpartition(".")[2] == meant]
    matches = same or difflib.get_close_matches(meant, known, n=1, cutoff=0.5)
    return f"; nearest: {matches[0]}" if matches else ""


def nearest_path(path: str) -> str:
    """The end of an error message: the file or folder beside `path` whose name is most like its."""
    return _nearest_beside(path, Path.exists)


def nearest_folder(path: str, file: str = "") -> str:
    """The end of a message: the folder most like `path`, or the first below it that has `file`."""
    if not file:
        return _nearest_beside(path, Path.is_dir)
    below = sorted(Path(path).glob(f"*/{file}"))[:1]
    return "".join(f"; nearest: {one.parent}" for one in below)


def _nearest_beside(path: str, is_candidate: Callable[[Path], bool]) -> str:
    parent = Path(path).expanduser().absolute().parent
    names = [p.name for p in parent.iterdir() if is_candidate(p)] if parent.is_dir() else []
    # As it was written, with the other name: ./modle → ./model
    return nearest(Path(path).name, names).replace(
        ": ", f": {os.path.join(os.path.dirname(path), '')}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error of a library."""
    return str(error).strip().partition("\n")[0]


def one_of(choices: Collection[str]) -> AfterValidator:
    """A pydantic validator for a name in a table such as INITS. Its error lists the names."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(value, choices)}")
        return value

    return AfterValidator(check)
