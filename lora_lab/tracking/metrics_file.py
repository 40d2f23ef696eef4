"""The rows of a run, on disk one by one as they are logged: metrics.jsonl, which is the truth."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class JsonlLogger(Logger):
    """Appends a line a row to metrics.jsonl and flushes it: a crash costs at most that line."""

    def __init__(self, path: Path):
        super().__init__()
        self.file = path.open("a")
        self.rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """What Lightning calls the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning wants one; there is only one file."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One row: the step, then the metrics."""
        row = {"step": step, **metrics}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
