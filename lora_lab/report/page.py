"""report/index.html: a report as one HTML page, its figures inside, that needs no other file."""

import base64
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_lab.report.cells import Cell, epoch_of, stop_cause, swept_keys
from lora_lab.report.sections import ExperimentReport, SweepReport
from lora_lab.report.setting_values import short_text
from lora_lab.report.tables import Rows, format_number, is_marked, is_numeric, unmarked
from lora_lab.report.theory import GAP_NOTE
from lora_lab.runs import Run, write_atomic

STATES = ("finished", "running", "failed", "interrupted", "damaged", "missing", "NO")
"""Texts of table cells that the page colours, each by a CSS class of that name."""
CAPTIONS = {
    "loss": "Training and validation loss by epoch, of the base and after it.",
    "spectrum": "Singular values of ΔW over training.",
    "delta": "The entries of ΔW: of a large one, the first rows and columns.",
    "phi": "The share of ΔW's first i directions that lies in the first j of W.",
    "truncation": "Validation loss with ΔW cut to rank k.",
}
"""The captions of a run's figures, by file name."""
MAX_VALUES = 12
"""The values of a swept key that are listed, at most."""
WIDE_PIXELS = 1400
"""A figure wider than this takes the full width of the page."""


@dataclass(frozen=True)
class PageTable:
    """A table of the page."""

    title: str
    rows: Sequence[Sequence[Any]]
    """The column titles, then the rows; a cell is a text, or {"text": …, "link": … or None}."""
    note: str = ""

    @cached_property
    def column_classes(self) -> list[str]:
        """Each column's CSS class: num (numbers), long (texts that wrap) or none."""
        classes = []
        for column in zip(*self.rows[1:], strict=True):
            texts = [cell["text"] if isinstance(cell, dict) else cell for cell in column]
            short = "num" if is_numeric(texts) else ""
            classes.append("long" if max(map(len, texts)) > 70 else short)
        return classes


def write_sweep_page(sweep: SweepReport) -> Path:
    """Writes the page of a folder of runs, and returns its path."""
    to = sweep.report
    several = len(sweep.experiments) > 1
    lines = []
    for experiment in sweep.experiments:
        keys = swept_keys(experiment.cells)
        swept = ", ".join(f"{name}: {_values(experiment.cells, key)}" for key, name in keys.items())
        lines.append(f"{experiment.name}: {f'swept {swept}' if swept else 'one cell'}")
    return _write(
        to,
        title=f"{sweep.directory.resolve().name}: {len(sweep.results)} runs",
        lines=lines,
        counts=sweep.counts,
        sections=[_experiment(experiment, several, to) for experiment in sweep.experiments],
        tables=[*_unfinished_tables(sweep, to), _runs_table(sweep, to)],
    )


def _experiment(experiment: ExperimentReport, several: bool, to: Path) -> dict[str, Any]:
    """One experiment as the template takes it, with its name where the page has several."""
    tables = [
        PageTable(title, rows, experiment.notes[title]) for title, rows in experiment.tables.items()
    ]
    if keys := swept_keys(experiment.cells):
        rows = [["key", "values"], *([key, _values(experiment.cells, key)] for key in keys)]
        tables.append(PageTable("configs that differ", rows))
    common = _common_settings(experiment.cells)
    return {
        "name": experiment.name if several else "",
        "tables": tables,
        "figures": [
            _figure(experiment.directory / f"{name}.png", caption, to)
            for name, caption in experiment.captions.items()
        ],
        "config_title": f"what all configs share ({len(common)} keys)",
        "config": "\n".join(f"{key}: {json.dumps(value)}" for key, value in common.items()),
    }


def _common_settings(cells: Sequence[Cell]) -> dict[str, Any]:
    """The settings that all cells have with the same value, by dotted key."""
    first, *others = [cell.settings for cell in cells] or [{}]
    return {
        key: value
        for key, value in first.items()
        if all(key in settings and settings[key] == value for settings in others)
    }


def _values(cells: Sequence[Cell], key: str) -> str:
    """The values that a swept key has over the cells, the first MAX_VALUES of them."""
    values = list(dict.fromkeys(short_text(cell.value_of(key)) for cell in cells))
    values = [value for value in values if value != "–"] or values
    more = f", … ({len(values)} values)" if len(values) > MAX_VALUES else ""
    return ", ".join(values[:MAX_VALUES]) + more


def _unfinished_tables(sweep: SweepReport, to: Path) -> list[PageTable]:
    """The table of unfinished runs, in a list that is empty where all are finished."""
    if len(sweep.unfinished) < 2:
        return []
    paths = {result.run.path.name: result.run.path for result in sweep.results}
    rows: list[list[Any]] = [list(sweep.unfinished[0])]
    for experiment, name, state, cause in sweep.unfinished[1:]:
        log = paths[name] / "log.txt" if name in paths else None
        link = _link(log, to) if log and log.exists() else None
        rows.append([experiment, {"text": name, "link": link}, state, cause])
    note = "A run's name leads to its log, with the traceback."
    return [PageTable("not finished", rows, note)]


def _runs_table(sweep: SweepReport, to: Path) -> PageTable:
    """All runs, each with links to its page, where it has one, and to its directory."""
    rows: list[list[Any]] = [["run", "status", "seed", "val/loss", "seconds", "files"]]
    for result in sweep.results:
        path, seconds = result.run.path, result.status.get("seconds")
        run_page = path / "report" / "index.html"
        name = {"text": path.name, "link": _link(run_page, to) if run_page.exists() else None}
        seed = str(result.config.get("seed", "–"))
        loss = format_number(result.metrics.get("val/loss") if result.is_finished else None)
        duration = "–" if seconds is None else f"{seconds:.1f}"
        directory = {"text": "directory", "link": f"{_link(path, to)}/"}
        rows.append([name, result.state, seed, loss, duration, directory])
    where = f"val/loss {epoch_of('val/loss', sweep.results)}"
    return PageTable("runs", rows, f"A run's name leads to its own report. {where}.")


def _link(path: Path, to: Path) -> str:
    """A file as a link from a page in the folder `to`."""
    return quote(Path(os.path.relpath(path, to)).as_posix())


def write_run_page(run: Run, tables: dict[str, Rows], figures: Sequence[str], to: Path) -> Path:
    """Writes the page of one run to the folder `to`, and returns its path.

    `tables` is title → rows; `figures` are the file names of its PNGs without the suffix.
    """
    status = run.status
    shown = {title: rows for title, rows in tables.items() if len(rows) > 1}
    notes = {"theory": GAP_NOTE}
    seconds = status.get("seconds")
    return _write(
        to,
        title=f"{run.config['name']}: {run.path.resolve().name}",
        lines=[cause] if (cause := stop_cause(status)) else [],
        counts={status["state"] + (f" in {seconds:.0f} s" if seconds else ""): 1},
        sections=[
            {
                "name": "",
                "tables": [PageTable(t, rows, notes.get(t, "")) for t, rows in shown.items()],
                "figures": [_figure(to / f"{name}.png", CAPTIONS[name], to) for name in figures],
                "config_title": "config.yaml",
                "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
            }
        ],
        tables=[],
    )


def write_update_page(
    title: str,
    lines: Sequence[str],
    tables: Mapping[str, Rows],
    note: str,
    captions: Mapping[str, str],
    to: Path,
) -> Path:
    """Writes the page on an update's spectra to the folder `to`, and returns its path.

    `captions` are those of its figures, by file name without the suffix.
    """
    section = {
        "name": "",
        "tables": [PageTable(name, rows, note) for name, rows in tables.items()],
        "figures": [_figure(to / f"{name}.png", text, to) for name, text in captions.items()],
        "config_title": "",
        "config": "",
    }
    return _write(to, title=title, lines=lines, counts={}, sections=[section], tables=[])


def _figure(path: Path, caption: str, to: Path) -> dict[str, Any]:
    """A PNG as the template takes it: its bytes as a data URL, its size, and a link to the file.

    Shown at 1/1.5 of its pixels, the letters of a figure are as large as the page's.
    """
    content = path.read_bytes()
    # The first chunk of a PNG is IHDR, whose data starts at byte 16: width and height, big-endian.
    width, height = struct.unpack(">II", content[16:24])
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    size = {"width": round(width / 1.5), "height": round(height / 1.5), "wide": width > WIDE_PIXELS}
    return {"source": source, "caption": caption, "link": _link(path, to), **size}


def _write(to: Path, **content: Any) -> Path:
    """Renders page.html with `content` to index.html in the folder `to`."""
    loader = PackageLoader("lora_lab.report", package_path="")
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=loader)
    environment.tests["marked"] = is_marked
    environment.filters["unmarked"] = unmarked
    page = environment.get_template("page.html").render(states=STATES, **content)
    write_atomic(to / "index.html", page)
    return to / "index.html"
