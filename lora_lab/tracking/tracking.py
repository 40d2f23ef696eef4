"""Where a run's numbers go: metrics.jsonl, which is complete, and with it W&B.

What W&B is sent:
- config, name, group, job type and tags: `_init`
- each row of metrics.jsonl: `Tracking.log`; with a row of spectra, histograms of the singular
  values: `Tracking.log_spectra`
- line charts of singular values and of the truncation curve: `Tracking.log_line_series`
- heat maps of φ and a table of singular values: `Tracking.log_findings`
- the adapter and the trained model: `Tracking.log_artifact`
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from wandb.errors import Error as WandbError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

from lora_lab.analysis.spectra import Spectrum
from lora_lab.config.schema import Config
from lora_lab.runs import Run, process_rank
from lora_lab.tracking import charts, record_log
from lora_lab.tracking.metrics_file import JsonlLogger

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30
"""Seconds that W&B's server has to answer; after them the run is tracked offline."""

LAST_ROW_TIMEOUT = 10
"""Seconds without a new row after which W&B's file is taken to be complete."""

MAX_LINES = 16
"""How many lines a line chart in W&B shows, at most."""

Histograms = dict[str, tuple[list[int], list[float]]]
"""W&B key → (counts, edges of the bins)."""


class Tracking:
    """Writes a run's rows to metrics.jsonl and to W&B, from the start of the run to its end.

    Used as a context. On leaving it by an exception, the W&B run is marked as failed. At the end,
    the rows in both files are counted. A shortfall in metrics.jsonl is an OSError, one in W&B's
    file an error in the log and in status.json.
    """

    server_failed = False
    """Whether W&B's server could not be used in this process: then it is not tried again."""

    def __init__(self, cfg: Config, run: Run, directory: Path):
        self.run = run
        # Where several processes train one run, only the first of them logs.
        is_first = process_rank() == 0
        self.jsonl = JsonlLogger(directory / "metrics.jsonl" if is_first else Path(os.devnull))
        self.loggers: list[Logger] = [self.jsonl]
        self.wandb_only_rows = 0
        self.histograms_by_row: dict[int, Histograms] = {}  # by index in `rows`
        self.wandb = None
        if is_first and cfg.tracking.mode != "off":
            # The W&B run of an interrupted try is replaced: this try logs the same rows again,
            # under the same id, which ends its directory's name (offline-run-DATE-ID).
            if earlier := run.status.get("wandb"):
                shutil.rmtree(run.path / earlier, ignore_errors=True)
            self.wandb = _start(cfg, directory, earlier and earlier.rpartition("-")[2])
            self.loggers.append(WandbLogger(experiment=self.wandb))
            run.update_status(wandb=os.path.relpath(self.wandb.settings.sync_dir, run.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.jsonl.file.close()
        lost = self.jsonl.lost_rows() if error is None else ""
        if self.wandb is not None:
            self._finish_wandb(exit_code=0 if error is None and not lost else 1)
        if lost:
            raise OSError(lost)

    def _finish_wandb(self, exit_code: int) -> None:
        """Ends the W&B run, and counts the rows in its file."""
        assert self.wandb is not None
        file = Path(self.wandb.settings.sync_file)
        self.wandb.finish(exit_code=exit_code)
        expected = len(self.rows) + self.wandb_only_rows
        if (written := _count_rows(file, expected)) < expected:
            self.run.update_status(wandb_rows_lost=expected - written)
            log.error(
                "W&B HOLDS %d OF %d ROWS of this run (%s): is the disk full? "
                "metrics.jsonl in the run directory has them all",
                *(written, expected, file),
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return self.jsonl.rows

    def log(self, metrics: dict[str, Any], step: int, histograms: Histograms | None = None) -> None:
        """Logs one row to metrics.jsonl and to W&B; only W&B's row has the histograms."""
        self.jsonl.log_metrics(metrics, step)
        if self.wandb is None:
            return
        row = dict(metrics)
        if histograms:
            self.histograms_by_row[len(self.rows) - 1] = histograms
            for key, (counts, edges) in histograms.items():
                row[key] = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        self.loggers[-1].log_metrics(row, step)

    def replay(
        self, rows: list[dict[str, Any]], histograms_by_row: Mapping[str, Any] | None = None
    ) -> None:
        """Logs rows that another run or an earlier try of this run has logged before.

        `histograms_by_row` is that of the earlier try, its keys as JSON has them.
        """
        for row in rows:
            histograms = (histograms_by_row or {}).get(str(len(self.rows)))
            self.log(_metrics(row), row["step"], histograms)

    def log_spectra(
        self, spectra: dict[str, Spectrum], groups: dict[str, Spectrum], epoch: float, step: int
    ) -> None:
        """Logs one row with the measures of each site's spectrum and of each group of sites.

        W&B also gets a histogram of each site's singular values.
        """
        row: dict[str, Any] = {"epoch": float(epoch)}
        for prefix, by_name in (("spectra/", spectra), ("spectra_of/", groups)):
            for name, spectrum in by_name.items():
                row |= {f"{prefix}{name}/{key}": v for key, v in spectrum.measures().items()}
        histograms = {}
        if self.wandb is not None:
            for site, spectrum in spectra.items():
                counts, edges = np.histogram(spectrum.singular_values.numpy(), bins=32)
                histograms[f"spectra/{site}/singular_values"] = counts.tolist(), edges.tolist()
        self.log(row, step, histograms)

    def log_line_series(
        self, key: str, title: str, xs: Sequence[float], lines: charts.Arrays, xname: str
    ) -> None:
        """Logs a line chart to W&B: the first MAX_LINES of `lines`, y by name, over `xs`."""
        if self.wandb is not None:
            shown = dict(list(lines.items())[:MAX_LINES])
            ys = [line.tolist() for line in shown.values()]
            chart = wandb.plot.line_series(list(xs), ys, list(shown), title, xname)
            self._log_wandb_only({key: chart})

    def log_findings(self, metrics: dict[str, float], arrays: charts.Arrays, step: int) -> None:
        """Logs an analysis: its metrics as a row, and to W&B heat maps, a table and a chart.

        `arrays` are those of spectra.npz: `SITE/phi_base`, `SITE/S`, `truncation/ranks` and so on.
        """
        if metrics:
            self.log(metrics, step)
        if self.wandb is None:
            return
        media: dict[str, Any] = {
            f"spectra/{key}": wandb.Image(pixels, caption="φ(ΔW, W), i down, j across")
            for key, pixels in charts.heat_maps(arrays).items()
        }
        columns: list[Any] = ["site", "σ1", "σ2", "σ3", "σ4"]
        rows: list[Any] = charts.singular_value_rows(arrays)
        media["spectra/table"] = wandb.Table(columns=columns, data=rows)
        self._log_wandb_only(media)
        if "truncation/ranks" in arrays:
            ranks, lines = arrays["truncation/ranks"].tolist(), charts.truncation_lines(arrays)
            title = "validation loss with ΔW cut to rank k"
            self.log_line_series("truncation/chart", title, ranks, lines, "k")

    def _log_wandb_only(self, row: dict[str, Any]) -> None:
        """Logs a row of media that metrics.jsonl does not have."""
        assert self.wandb is not None
        self.wandb.log(row)
        self.wandb_only_rows += 1

    def log_artifact(self, directory: Path, kind: str) -> None:
        """Stores the files of a directory of the run in W&B, as an artifact of type `kind`."""
        if self.wandb is not None:
            _log_artifact(self.wandb, directory, kind)


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without its step, which loggers take apart from it."""
    return {key: value for key, value in row.items() if key != "step"}


def copy_to_wandb(cfg: Config, run: Run) -> None:
    """Logs a finished run's rows and artifacts to a new W&B run.

    It is for a W&B agent that asks for settings which were run before: the agent waits for a W&B
    run of its own, and training again would give the same numbers.
    """
    if cfg.tracking.mode == "off":
        return
    wandb_run = _start(cfg, run.path, None)
    logger = WandbLogger(experiment=wandb_run)
    for row in run.rows():
        logger.log_metrics(_metrics(row), row["step"])
    for kind in ("adapter", "model"):
        if (run.path / kind).is_dir():
            _log_artifact(wandb_run, run.path / kind, kind)
    wandb_run.finish(exit_code=0)


def _start(cfg: Config, directory: Path, run_id: str | None) -> wandb.Run:
    """Starts a W&B run: on the server where that is asked for and works, else offline.

    With the `run_id` of an existing W&B run, that run is written anew from its first row.
    """
    if "WANDB_RUN_ID" in os.environ:
        run_id = None  # a W&B agent chose the id
    if cfg.tracking.mode == "online" and not Tracking.server_failed:
        try:
            wandb.setup(wandb.Settings(silent=True))
            if not wandb.login(prompt=False, verify=False):
                raise WandbError("there is no login: `wandb login` makes one")
            return _init(cfg, directory, "online", run_id)
        except WandbError as error:
            Tracking.server_failed = True
            log.warning("W&B cannot be used online (%s): tracking offline", error)
    return _init(cfg, directory, "offline", run_id)


def _log_artifact(run: wandb.Run, directory: Path, kind: str) -> None:
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for file in sorted(directory.iterdir()):
        artifact.add_file(str(file))
    run.log_artifact(artifact)


def _init(cfg: Config, directory: Path, mode: Any, run_id: str | None) -> wandb.Run:
    # W&B copies artifacts until `wandb sync`; by default it does so in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(cfg.runs_dir).absolute() / ".wandb"))
    return wandb.init(
        mode=mode,
        reinit="create_new" if wandb.run else None,  # several runs at once in a pack
        id=run_id,
        project=cfg.tracking.project,
        entity=cfg.tracking.entity,
        dir=directory.parent.absolute(),  # one wandb/ for each experiment, for `wandb leet`
        name=directory.name,
        group=cfg.cell(),
        job_type=cfg.adapter.method,
        tags=[tag[:64] for tag in (cfg.name, *cfg.target, *cfg.tracking.tags)],  # W&B's limit
        config=cfg.to_dict(),
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_save_requirements=False,  # slow, as it reads all installed packages; see env.json
            init_timeout=INIT_TIMEOUT,
            finish_timeout=120,  # seconds for a lost server; the rows are on disk for `wandb sync`
            x_transaction_log_flush_interval=2,  # seconds of rows that a kill can lose
        ),
    )


def _count_rows(file: Path, expected: int) -> int:
    """How many rows a .wandb file has, once it has those expected or gets no more.

    Offline, `finish` returns before W&B's service process has written the last of them, so the file
    is read until they are complete, or until LAST_ROW_TIMEOUT seconds without a new row.
    """
    rows, deadline = -1, time.monotonic() + LAST_ROW_TIMEOUT
    while rows < expected and time.monotonic() < deadline:
        previous = rows
        rows = sum(record.HasField("history") for record in read_records(file))
        if rows > previous:
            deadline = time.monotonic() + LAST_ROW_TIMEOUT
        if rows < expected:
            time.sleep(0.05)
    return rows


def read_records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file. Ends where a crash or a full disk cut the file."""
    return map(Record.FromString, record_log.records(path))
