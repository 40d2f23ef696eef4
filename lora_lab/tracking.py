"""Where a run's numbers go: metrics.jsonl, which is the truth, and W&B beside it."""

import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.errors import Error as WandbError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

from lora_lab.config import Config
from lora_lab.runs import Run
from lora_lab.spectra import Spectrum

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30
"""Seconds that the server has to answer before a run goes on offline."""

SETTLE = 10
"""Seconds without a new row after which W&B is taken to have written all it will."""

SERIES = 16
"""Singular values that the line-series chart in W&B shows, at most."""


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


class Tracking:
    """A run's loggers, from its start to its end.

    Used as a context: left by an exception, the W&B run ends as failed. What W&B holds at the end
    is counted against metrics.jsonl.
    """

    fell_back = False
    """Whether W&B's server could not be used: said once, and not tried again in this process."""

    def __init__(self, cfg: Config, run: Run, directory: Path):
        self.run = run
        self.jsonl = JsonlLogger(directory / "metrics.jsonl")
        self.loggers: list[Logger] = [self.jsonl]
        self.beside = 0  # rows that only W&B has
        self.wandb = None if cfg.tracking.mode == "off" else _start(cfg, directory)
        if self.wandb is not None:
            self.loggers.append(WandbLogger(experiment=self.wandb))
            run.update(wandb=os.path.relpath(self.wandb.settings.sync_dir, run.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.jsonl.file.close()
        if self.wandb is None:
            return
        file = Path(self.wandb.settings.sync_file)
        self.wandb.finish(exit_code=0 if error is None else 1)
        if (held := _count(file, wanted := len(self.rows) + self.beside)) < wanted:
            self.run.update(wandb_rows_lost=wanted - held)
            log.error(
                "W&B HOLDS %d OF %d ROWS of this run (%s): is the disk full? "
                "metrics.jsonl in the run directory has them all",
                *(held, wanted, file),
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return self.jsonl.rows

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One row, to every logger."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def replay(self, rows: list[dict[str, Any]]) -> None:
        """Logs rows that another run logged first."""
        for row in rows:
            self.log({key: value for key, value in row.items() if key != "step"}, row["step"])

    def log_spectra(self, spectra: dict[str, Spectrum], epoch: int, step: int) -> None:
        """One row of every site's measures, with a histogram of its singular values in W&B."""
        row: dict[str, Any] = {"epoch": float(epoch)}
        for site, spectrum in spectra.items():
            row |= {f"spectra/{site}/{name}": v for name, v in spectrum.measures().items()}
        self.jsonl.log_metrics(row, step)
        if self.wandb is not None:
            for site, spectrum in spectra.items():
                counts = np.histogram(spectrum.singular_values.numpy(), bins=32)
                row[f"spectra/{site}/singular_values"] = wandb.Histogram(np_histogram=counts)
            self.loggers[-1].log_metrics(row, step)

    def log_spectrum_chart(self, site: str, epochs: list[int], sigma: np.ndarray) -> None:
        """W&B's line series of σ_i by epoch; `sigma` is time × k."""
        if self.wandb is not None:
            shown = sigma[:, :SERIES]
            keys = [f"σ{i + 1}" for i in range(shown.shape[1])]
            title = f"ΔW of {site}: singular values"
            chart = wandb.plot.line_series(
                xs=epochs, ys=shown.T.tolist(), keys=keys, title=title, xname="epoch"
            )
            self.wandb.log({f"spectra/{site}/chart": chart})
            self.beside += 1

    def artifact(self, directory: Path, kind: str) -> None:
        """Keeps a directory of the run in W&B, as an artifact of that type."""
        if self.wandb is not None:
            artifact = wandb.Artifact(f"{kind}-{self.wandb.id}", type=kind)
            for file in sorted(directory.iterdir()):
                artifact.add_file(str(file))
            self.wandb.log_artifact(artifact)


def _start(cfg: Config, directory: Path) -> wandb.Run:
    """The W&B run, on the server if asked for and there, else on this machine."""
    if cfg.tracking.mode == "online" and not Tracking.fell_back:
        try:
            wandb.setup(wandb.Settings(silent=True))
            if not wandb.login(prompt=False, verify=False):
                raise WandbError("there is no login: `wandb login` makes one")
            return _init(cfg, directory, "online")
        except WandbError as error:
            Tracking.fell_back = True
            log.warning("W&B cannot be used online (%s): tracking offline", error)
    return _init(cfg, directory, "offline")


def _init(cfg: Config, directory: Path, mode: Any) -> wandb.Run:
    # Artifacts wait for `wandb sync` in copies, which W&B would keep in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(cfg.runs_dir).absolute() / ".wandb"))
    return wandb.init(
        mode=mode,
        project=cfg.tracking.project,
        entity=cfg.tracking.entity,
        dir=directory.parent.absolute(),  # one wandb/ an experiment, for `wandb leet`
        name=directory.name,
        group=cfg.cell(),
        job_type=cfg.adapter.method,
        tags=[tag[:64] for tag in (cfg.name, *cfg.target, *cfg.tracking.tags)],  # W&B's limit
        config=cfg.plain(),
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=120,  # a server that is gone; the rows are on disk for `wandb sync`
            x_transaction_log_flush_interval=2,  # seconds that a kill can cost
        ),
    )


def _count(file: Path, wanted: int) -> int:
    """The rows in a .wandb file, read again until they are as many as wanted or come no more.

    Offline, `finish` returns before W&B's service process has written the last of them.
    """
    held, until = -1, time.monotonic() + SETTLE
    while held < wanted and time.monotonic() < until:
        before, held = held, sum(record.HasField("history") for record in read_back(file))
        if held > before:
            until = time.monotonic() + SETTLE
        if held < wanted:
            time.sleep(0.05)
    return held


def read_back(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: W&B's protobufs, framed as in LevelDB's logs.

    Blocks of 32 KiB hold chunks of (crc32, length, type, bytes); a record is one chunk (type 1) or
    several (2, 3 …, 4). Ends where a crash or a full disk cut the file.
    """
    content, at, record = path.read_bytes(), 7, b""
    while True:
        if (left := 32768 - at % 32768) < 7:
            at += left
        if at + 7 > len(content):
            return
        crc, length, kind = struct.unpack_from("<IHB", content, at)
        chunk = content[at + 7 : at + 7 + length]
        if len(chunk) < length or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != crc:
            return
        at += 7 + length
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield Record.FromString(record)
