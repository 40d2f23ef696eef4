"""Docstrings of Python's standard library, each with the package that it comes from."""

import ast
import json
import platform
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pydantic import PositiveInt

from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.sources import cache_folder
from lora_lab.data.tables import Share
from lora_lab.data.text import Text
from lora_lab.runs import write_atomic

PACKAGES = ("asyncio", "collections", "email", "encodings", "http", "importlib", "logging")
PACKAGES += ("multiprocessing", "unittest", "urllib", "wsgiref", "xml")
"""Packages that Python 3.11 to 3.13 have, with at least 50 docstrings each."""


class Docstrings(Text):
    """Classification of docstrings by their package, read from the library of the Python that runs.

    At most `per_package` docstrings of each package are taken, in the order of files and lines. One
    that names its package is left out: it would give the answer away. The share `val_share`, drawn
    by `seed`, is for validation. There is nothing that a base knew: it is a pretrained one.
    """

    path_arguments = ("tokenizer",)

    def __init__(
        self,
        phase: Phase,
        tokenizer: str | None,
        per_package: PositiveInt,
        max_length: PositiveInt,
        val_share: Share,
        batch_size: PositiveInt,
        eval_batch_size: PositiveInt,
        seed: Seed,
    ):
        super().__init__(
            phase,
            train=str(stored_docstrings(per_package)),
            text="text",
            label="package",
            tokenizer=tokenizer,
            max_length=max_length,
            val_share=val_share,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )


@cache
def stored_docstrings(per_package: int) -> Path:
    """The JSONL file of `text` and `package`, written to the cache if it is not there yet."""
    file = cache_folder() / f"docstrings-{platform.python_version()}-{per_package}.jsonl"
    if not file.exists():
        rows = [
            {"text": text, "package": package}
            for package in PACKAGES
            for text in _of_package(package, per_package)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def _of_package(package: str, count: int) -> list[str]:
    """The first `count` different docstrings that do not name their package."""
    folder = Path(sysconfig.get_path("stdlib"), package)
    texts = dict.fromkeys(t for file in sorted(folder.rglob("*.py")) for t in docstrings_of(file))
    return [t for t in texts if len(t) >= 30 and package not in t.lower()][:count]


def docstrings_of(file: Path) -> Iterator[str]:
    """The docstrings of a file's module, classes and functions, on one line each."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield " ".join(text.split())
