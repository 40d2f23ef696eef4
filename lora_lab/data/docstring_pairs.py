"""Docstrings of Python's standard library as pairs: the first sentence, and the rest."""

import json
import platform
import re
import sysconfig
from functools import cache
from pathlib import Path

from pydantic import PositiveInt

from lora_lab.config.schema import Seed
from lora_lab.data.docstrings import docstrings_of
from lora_lab.data.module import Phase
from lora_lab.data.pairs import Pairs
from lora_lab.data.sources import cache_folder
from lora_lab.data.tables import Share
from lora_lab.runs import write_atomic

LEAST = 20
"""The least characters of a first sentence, and of a rest."""


class DocstringPairs(Pairs):
    """The first sentence of a docstring and the rest of it, of `count` docstrings at most.

    They are those of modules that lie in no package, as `Docstrings` has none of them: a run
    that trains on its own has seen none. Which is which is to be told within batches of
    `eval_batch_size`. The share `val_share`, drawn by `seed`, is what is measured.
    """

    path_arguments = ("tokenizer",)

    def __init__(
        self,
        phase: Phase,
        tokenizer: str | None,
        count: PositiveInt,
        max_length: PositiveInt,
        val_share: Share,
        eval_batch_size: PositiveInt,
        seed: Seed,
    ):
        super().__init__(
            phase,
            train=str(stored_pairs(count)),
            first="first",
            second="second",
            tokenizer=tokenizer,
            max_length=max_length,
            val_share=val_share,
            batch_size=1,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )


@cache
def stored_pairs(count: int) -> Path:
    """The JSONL file of `first` and `second`, written to the cache if it is not there yet."""
    file = cache_folder() / f"docstring-pairs-{platform.python_version()}-{count}.jsonl"
    if not file.exists():
        library = Path(sysconfig.get_path("stdlib"))
        texts = dict.fromkeys(
            text for path in sorted(library.glob("*.py")) for text in docstrings_of(path)
        )
        halves = [re.split(r"(?<=[.!?]) +", text, maxsplit=1) for text in texts]
        pairs = [pair for pair in halves if len(pair) == 2 and min(map(len, pair)) >= LEAST]
        rows = [{"first": first, "second": second} for first, second in pairs[:count]]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file
