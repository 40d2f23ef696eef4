"""metrics.jsonl: all rows that a run logs, each on disk as soon as it is logged."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class JsonlLogger(Logger):
    """A Lightning logger that appends each row as a line of JSON to a file, and flushes it.

    A crash loses at most the line that is being written. `rows` are those logged by this object.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.file = path, path.open("a")
        self.rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """The logger's name, for Lightning."""
        return "jsonl"

    @property
    def version(self) -> str:
        """The version, which Lightning requires; a run has only one file, so it is empty."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one row: the step, then the metrics."""
        row = {"step": step, **metrics}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def lost_rows(self) -> str:
        """Says that the file lacks rows, and how many; "" where it has all."""
        try:
            written = self.path.read_bytes().count(b"\n")
        except FileNotFoundError:
            return f"{self.path} was removed while the run trained"
        return f"{self.path} has {written} of {len(self.rows)} rows" * (written < len(self.rows))
