"""What messages about the path of a model's weights have in common."""

import os
from collections.abc import Callable
from pathlib import Path

from lora_lab.config.errors import nearest


def nearest_path(path: str) -> str:
    """The end of a message: the file or folder beside `path` whose name is most like its."""
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
