"""Where a run's numbers go: metrics.jsonl, which is the truth, and W&B beside it."""

import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from wandb.errors import Error as WandbError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

from lora_lab.analysis.spectra import Spectrum
from lora_lab.config.schema import Config
from lora_lab.runs import Run, process_rank
from lora_lab.tracking.metrics_file import JsonlLogger

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30
"""Seconds that the server has to answer before a run goes on offline."""

SETTLE = 10
"""Seconds without a new row after which W&B is taken to have written all it will."""

SERIES = 16
"""Lines that a line-series chart in W&B shows, at most."""

Histograms = dict[str, tuple[list[int], list[float]]]
"""Counts and the edges of their bins, by the name in W&B."""


class Tracking:
    """A run's loggers, from its start to its end.

    Used as a context: left by an exception, the W&B run ends as failed. What W&B holds at the end
    is counted against metrics.jsonl.
    """

    server_failed = False
    """Whether W&B's server could not be used: said once, and not tried again in this process."""

    def __init__(self, cfg: Config, run: Run, directory: Path):
        self.run = run
        # Of a run's several processes the first alone logs.
        first = process_rank() == 0
        self.jsonl = JsonlLogger(directory / "metrics.jsonl" if first else Path(os.devnull))
        self.loggers: list[Logger] = [self.jsonl]
        self.beside = 0  # rows that only W&B has
        self.histograms_by_row: dict[int, Histograms] = {}  # by the number of their row
        self.wandb = None
        if first and cfg.tracking.mode != "off":
            # A try that was interrupted: this one has its rows again, and takes its place.
            if earlier := run.status.get("wandb"):
                shutil.rmtree(run.path / earlier, ignore_errors=True)
            self.wandb = _start(cfg, directory, earlier and earlier.rpartition("-")[2])
            self.loggers.append(WandbLogger(experiment=self.wandb))
            run.update_status(wandb=os.path.relpath(self.wandb.settings.sync_dir, run.path))

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
            self.run.update_status(wandb_rows_lost=wanted - held)
            log.error(
                "W&B HOLDS %d OF %d ROWS of this run (%s): is the disk full? "
                "metrics.jsonl in the run directory has them all",
                *(held, wanted, file),
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return self.jsonl.rows

    def log(self, metrics: dict[str, Any], step: int, beside: Histograms | None = None) -> None:
        """One row, to every logger; in W&B with histograms beside it."""
        self.jsonl.log_metrics(metrics, step)
        if self.wandb is None:
            return
        row = dict(metrics)
        if beside:
            self.histograms_by_row[len(self.rows) - 1] = beside
            for key, (counts, edges) in beside.items():
                row[key] = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        self.loggers[-1].log_metrics(row, step)

    def replay(self, rows: list[dict[str, Any]], beside: Mapping[str, Any] | None = None) -> None:
        """Logs rows that were logged before, by another run or by an earlier try of this one."""
        for row in rows:
            own = (beside or {}).get(str(len(self.rows)))
            self.log({k: v for k, v in row.items() if k != "step"}, row["step"], own)

    def log_spectra(
        self,
        spectra: dict[str, Spectrum],
        wholes: dict[str, Spectrum],
        epoch: float,
        step: int,
    ) -> None:
        """One row of the measures of every site and of every group of sites.

        W&B has a histogram of each site's singular values beside them.
        """
        row: dict[str, Any] = {"epoch": float(epoch)}
        for prefix, every in (("spectra/", spectra), ("spectra_of/", wholes)):
            for site, spectrum in every.items():
                row |= {f"{prefix}{site}/{name}": v for name, v in spectrum.measures().items()}
        histograms = {}
        if self.wandb is not None:
            for site, spectrum in spectra.items():
                counts, edges = np.histogram(spectrum.singular_values.numpy(), bins=32)
                histograms[f"spectra/{site}/singular_values"] = counts.tolist(), edges.tolist()
        self.log(row, step, histograms)

    def log_line_series(
        self,
        key: str,
        title: str,
        xs: Sequence[float],
        lines: Mapping[str, np.ndarray],
        xname: str,
    ) -> None:
        """A line-series chart in W&B, the first SERIES of `lines` by their names."""
        if self.wandb is not None:
            shown = dict(list(lines.items())[:SERIES])
            ys = [line.tolist() for line in shown.values()]
            chart = wandb.plot.line_series(
                xs=list(xs), ys=ys, keys=list(shown), title=title, xname=xname
            )
            self.wandb.log({key: chart})
            self.beside += 1

    def log_findings(
        self, metrics: dict[str, float], arrays: Mapping[str, np.ndarray], step: int
    ) -> None:
        """What an analysis found: a row; in W&B also φ as heat maps, truncation curves, a table."""
        if metrics:
            self.log(metrics, step)
        if self.wandb is None:
            return
        shown: dict[str, Any] = {}
        for key, values in arrays.items():
            if key.endswith("/phi_base"):
                # Enlarged without smoothing: one block of pixels an entry.
                picture = np.kron((255 * values.clip(0, 1)).astype(np.uint8), np.ones((8, 8), "u1"))
                shown[f"spectra/{key}"] = wandb.Image(picture, caption="φ(ΔW, W), i down, j across")
        rows = [
            [key.removesuffix("/S"), *map(float, [*values[:4], *[0.0] * (4 - len(values[:4]))])]
            for key, values in arrays.items()
            if key.endswith("/S")
        ]
        columns: list[Any] = ["site", "σ1", "σ2", "σ3", "σ4"]
        shown["spectra/table"] = wandb.Table(columns=columns, data=rows)
        self.wandb.log(shown)
        self.beside += 1
        if "truncation/ranks" in arrays:
            ranks = arrays["truncation/ranks"]
            lines = {"all sites": arrays["truncation/loss"]}
            for key in arrays:
                site = key.removesuffix("/truncation/ranks")
                if site != key and np.array_equal(arrays[key], ranks):
                    lines[site] = arrays[f"{site}/truncation/loss"]
            title = "validation loss with ΔW cut to rank k"
            self.log_line_series("truncation/chart", title, ranks.tolist(), lines, "k")

    def log_artifact(self, directory: Path, kind: str) -> None:
        """Keeps a directory of the run in W&B, as an artifact of that type."""
        if self.wandb is not None:
            _artifact(self.wandb, directory, kind)


def copy_to_wandb(cfg: Config, run: Run) -> None:
    """What a finished run logged, and what it trained, into a new run of W&B's: an agent's."""
    if cfg.tracking.mode == "off":
        return
    started = _start(cfg, run.path, None)
    logger = WandbLogger(experiment=started)
    for row in run.rows():
        logger.log_metrics({k: v for k, v in row.items() if k != "step"}, row["step"])
    for kind in ("adapter", "model"):
        if (run.path / kind).is_dir():
            _artifact(started, run.path / kind, kind)
    started.finish(exit_code=0)


def _start(cfg: Config, directory: Path, name: str | None) -> wandb.Run:
    """The W&B run, on the server if asked for and there, else on this machine.

    With the id `name` of a run there is, it is written anew from its first row.
    """
    if "WANDB_RUN_ID" in os.environ:
        name = None  # an agent's
    if cfg.tracking.mode == "online" and not Tracking.server_failed:
        try:
            wandb.setup(wandb.Settings(silent=True))
            if not wandb.login(prompt=False, verify=False):
                raise WandbError("there is no login: `wandb login` makes one")
            return _init(cfg, directory, "online", name)
        except WandbError as error:
            Tracking.server_failed = True
            log.warning("W&B cannot be used online (%s): tracking offline", error)
    return _init(cfg, directory, "offline", name)


def _artifact(run: wandb.Run, directory: Path, kind: str) -> None:
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for file in sorted(directory.iterdir()):
        artifact.add_file(str(file))
    run.log_artifact(artifact)


def _init(cfg: Config, directory: Path, mode: Any, name: str | None) -> wandb.Run:
    # Artifacts wait for `wandb sync` in copies, which W&B would keep in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(cfg.runs_dir).absolute() / ".wandb"))
    return wandb.init(
        mode=mode,
        reinit="create_new" if wandb.run else None,  # beside the other runs of a pack
        id=name,
        project=cfg.tracking.project,
        entity=cfg.tracking.entity,
        dir=directory.parent.absolute(),  # one wandb/ an experiment, for `wandb leet`
        name=directory.name,
        group=cfg.cell(),
        job_type=cfg.adapter.method,
        tags=[tag[:64] for tag in (cfg.name, *cfg.target, *cfg.tracking.tags)],  # W&B's limit
        config=cfg.to_dict(),
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_save_requirements=False,  # reads all that is installed, for each run; env.json has it
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
        before, held = held, sum(record.HasField("history") for record in read_records(file))
        if held > before:
            until = time.monotonic() + SETTLE
        if held < wanted:
            time.sleep(0.05)
    return held


def read_records(path: Path) -> Iterator[Record]:
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
