"""Where a run's numbers go: metrics.jsonl, which is complete, and with it W&B.

What W&B is sent:
- config, name, group, job type and tags: `wandb_run.start`
- each row of metrics.jsonl: `Tracking.log`; with a row of spectra, histograms of the singular
  values: `Tracking.log_spectra`
- what training cost, from cost.json: `Tracking.log_cost`
- line charts of singular values and of the truncation curve: `Tracking.log_line_series`
- heat maps of φ and a table of singular values: `Tracking.log_findings`
- a table of generated texts: `Tracking.log_texts`
- the adapter and the trained model: `Tracking.log_artifact`
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger

from lora_lab.analysis.spectra import Spectrum
from lora_lab.config.schema import Config
from lora_lab.run_files import cost_metrics
from lora_lab.runs import Run, process_rank
from lora_lab.tracking import charts, wandb_run
from lora_lab.tracking.metrics_file import JsonlLogger
from lora_lab.tracking.wandb_run import WandbRun

MAX_LINES = 16
"""How many lines a line chart in W&B shows, at most."""

MAX_TEXTS = 1000
"""How many generated texts W&B's table has, at most; generated.jsonl has all."""

Histograms = dict[str, tuple[list[int], list[float]]]
"""W&B key → (counts, edges of the bins)."""


class Tracking:
    """Writes a run's rows to metrics.jsonl and to W&B, from the start of the run to its end.

    Used as a context, which closes metrics.jsonl: a shortfall of rows in it is an OSError.
    `finish_wandb` is called after it, once all that is the run's own is on disk.
    """

    def __init__(self, cfg: Config, run: Run, directory: Path):
        self.run = run
        # Where several processes train one run, only the first of them logs.
        is_first = process_rank() == 0
        self.jsonl = JsonlLogger(directory / "metrics.jsonl" if is_first else Path(os.devnull))
        self.loggers: list[Logger] = [self.jsonl]
        self.histograms_by_row: dict[int, Histograms] = {}  # by index in `rows`
        # Artifacts, and media with tables, which W&B makes artifacts of: its client asks the server
        # about each, and a dead one takes it 19 s. They are sent when the run is finished.
        self.at_end: list[Callable[[WandbRun], None]] = []
        self.wandb = None
        if is_first and cfg.tracking.mode != "off":
            # The W&B run of an interrupted try is replaced: this try logs the same rows again,
            # under the same id, which ends its directory's name (offline-run-DATE-ID).
            if earlier := run.status.get("wandb"):
                _remove_earlier(run, earlier)
            self.wandb = wandb_run.start(cfg, directory, earlier and earlier.rpartition("-")[2])
        if self.wandb is not None:
            self.loggers.append(self.wandb)
            run.update_status(wandb=os.path.relpath(self.wandb.folder, run.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.jsonl.file.close()
        if error is None and (lost := self.jsonl.lost_rows()):
            raise OSError(lost)

    def finish_wandb(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Sends media and artifacts and ends the W&B run: as failed where an exception ended it.

        Its arguments are those of `__exit__`. What W&B lacks of the run is an error in the log and
        in status.json.
        """
        if self.wandb is None:
            return
        for send in self.at_end:
            send(self.wandb)
        if lost := self.wandb.finish(exit_code=0 if error is None else 1):
            with suppress(OSError):  # a full disk: the log has it
                self.run.update_status(**lost)

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
            with self.wandb.guarded("histograms"):
                for key, (counts, edges) in histograms.items():
                    row[key] = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        self.wandb.log_metrics(row, step)

    def log_cost(self) -> None:
        """Logs what the run's cost.json has, to W&B alone: metrics.jsonl has no times."""
        if self.wandb is not None:
            self.wandb.log_metrics(cost_metrics(self.run.path))

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
        self, sites: dict[str, list[Spectrum]], groups: dict[str, Spectrum], epoch: float, step: int
    ) -> None:
        """Logs one row with the measures of each site's spectrum and of each group of sites.

        Of experts, whose matrices have a spectrum each, it is the mean of each measure over them.
        W&B also gets a histogram of each site's singular values.
        """
        row: dict[str, Any] = {"epoch": float(epoch)}
        by_name = {f"spectra/{site}": spectra for site, spectra in sites.items()}
        by_name |= {f"spectra_of/{group}": [spectrum] for group, spectrum in groups.items()}
        for name, spectra in by_name.items():
            measures = [spectrum.measures() for spectrum in spectra]
            row |= {f"{name}/{key}": fmean(m[key] for m in measures) for key in measures[0]}
        histograms = {}
        if self.wandb is not None:
            for site, spectra in sites.items():
                values = [spectrum.singular_values.double().numpy() for spectrum in spectra]
                counts, edges = _histogram(np.concatenate(values))
                histograms[f"spectra/{site}/singular_values"] = counts.tolist(), edges.tolist()
        self.log(row, step, histograms)

    def log_line_series(
        self, key: str, title: str, xs: Sequence[float], lines: charts.Arrays, xname: str
    ) -> None:
        """Has W&B show a line chart: the first MAX_LINES of `lines`, y by name, over `xs`."""
        shown = dict(list(lines.items())[:MAX_LINES])
        ys = [line.tolist() for line in shown.values()]

        def chart() -> dict[str, Any]:
            return {key: wandb.plot.line_series(list(xs), ys, list(shown), title, xname)}

        self.at_end.append(lambda run: run.log_media(chart))

    def log_findings(self, metrics: dict[str, float], arrays: charts.Arrays, step: int) -> None:
        """Logs an analysis: its metrics as a row; at the end W&B gets pictures, a table, a chart.

        `arrays` are those of spectra.npz: `SITE/phi_base`, `SITE/S`, `truncation/ranks` and so on.
        """
        if metrics:
            self.log(metrics, step)

        def media() -> dict[str, Any]:
            columns: list[Any] = ["site", "σ1", "σ2", "σ3", "σ4"]
            rows: list[Any] = charts.singular_value_rows(arrays)
            return {
                **{
                    f"spectra/{key}": wandb.Image(pixels, caption="φ(ΔW, W), i down, j across")
                    for key, pixels in charts.heat_maps(arrays).items()
                },
                "spectra/table": wandb.Table(columns=columns, data=rows),
            }

        self.at_end.append(lambda run: run.log_media(media))
        if "truncation/ranks" in arrays:
            ranks, lines = arrays["truncation/ranks"].tolist(), charts.truncation_lines(arrays)
            title = "validation loss with ΔW cut to rank k"
            self.log_line_series("truncation/chart", title, ranks, lines, "k")

    def log_texts(self, texts: Sequence[Mapping[str, Any]]) -> None:
        """Has W&B show the first MAX_TEXTS generated texts as a table. Their keys are its columns.

        A list, as of references, is shown with a line for each.
        """

        def table() -> dict[str, Any]:
            rows: list[Any] = [
                ["\n".join(v) if isinstance(v, list) else v for v in text.values()]
                for text in texts[:MAX_TEXTS]
            ]
            return {"generate/texts": wandb.Table(columns=[*texts[0]], data=rows)}

        self.at_end.append(lambda run: run.log_media(table))

    def store_artifact(self, directory: Path, kind: str) -> None:
        """Has W&B store a directory's files at the run's end, as an artifact of type `kind`."""
        self.at_end.append(lambda run: run.log_artifact(directory, kind))


def _remove_earlier(run: Run, earlier: str) -> None:
    """Removes the folder of an earlier W&B run, which status.json names, as a path from the run's.

    It lies in wandb/ beside the run directory: any other, as of an edited status.json, stays.
    """
    folder = Path(os.path.normpath(run.path.absolute() / earlier))
    is_of_wandb = re.fullmatch(r"(offline-)?run-[0-9_]+-\w+", folder.name)
    if is_of_wandb and folder.parent == run.path.absolute().parent / "wandb":
        shutil.rmtree(folder, ignore_errors=True)


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without its step, which loggers take apart from it."""
    return {key: value for key, value in row.items() if key != "step"}


def copy_to_wandb(cfg: Config, run: Run) -> None:
    """Logs a finished run's rows and artifacts to a new W&B run.

    It is for a W&B agent that asks for settings which were run before: the agent waits for a W&B
    run of its own, and training again would give the same numbers.
    """
    if cfg.tracking.mode == "off" or (copy := wandb_run.start(cfg, run.path, None)) is None:
        return
    for row in run.rows():
        copy.log_metrics(_metrics(row), row["step"])
    if cost := cost_metrics(run.path):
        copy.log_metrics(cost)
    for kind in ("adapter", "model"):
        if (run.path / kind).is_dir():
            copy.log_artifact(run.path / kind, kind)
    copy.finish(exit_code=0)


def _histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The counts of values ≥ 0 in 32 bins, and the bins' 33 edges.

    Values that are equal but for rounding have bins of 1e-5 of their size together: numpy finds no
    edges between neighbouring numbers.
    """
    low, high = values.min(), values.max()
    return np.histogram(values, bins=32, range=(low, max(high, low * (1 + 1e-5))))
