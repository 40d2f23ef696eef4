"""A report as one HTML page that needs nothing but itself: report/index.html."""

import base64
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_lab.report.cells import Cell, short_text, stop_cause, swept_keys
from lora_lab.report.sections import ExperimentReport, SweepReport
from lora_lab.report.tables import Rows, format_number, is_marked, is_numeric, unmarked
from lora_lab.report.theory import GAP_NOTE
from lora_lab.runs import Run, write_atomic

STATES = ("finished", "running", "failed", "interrupted", "damaged", "missing", "NO")
CAPTIONS = {
    "loss": "Training and validation loss by epoch, of the base and after it.",
    "spectrum": "Singular values of ΔW over training.",
    "delta": "The entries of ΔW: of a large one, the first rows and columns.",
    "phi": "The share of ΔW's first i directions that lies in the first j of W.",
    "truncation": "Validation loss with ΔW cut to rank k.",
}
"""What each figure of a run shows."""
LISTED = 12
"""Values of a swept key that are listed, at most."""
WIDE = 1400
"""A picture wider than this, in pixels, has the page's whole width."""


@dataclass(frozen=True)
class Table:
    """A table of the page; a cell is text, or {text, link}."""

    title: str
    rows: Sequence[Sequence[Any]]
    note: str = ""

    @cached_property
    def kinds(self) -> list[str]:
        """Each column's class: num, long or none."""
        return [self._kind(column) for column in zip(*self.rows[1:], strict=True)]

    @staticmethod
    def _kind(column: tuple[Any, ...]) -> str:
        texts = [c["text"] if isinstance(c, dict) else c for c in column]
        if max(map(len, texts)) > 70:
            return "long"
        return "num" if is_numeric(texts) else ""


def write_sweep_page(sweep: SweepReport) -> Path:
    """The page of a folder of runs."""
    to = sweep.directory / "report"
    several = len(sweep.sections) > 1
    lines = []
    for section in sweep.sections:
        point = ", ".join(
            f"{name}: {_few(section.cells, key)}" for key, name in swept_keys(section.cells).items()
        )
        lines.append(f"{section.name}: swept {point}" if point else f"{section.name}: one cell")
    return _write(
        to,
        title=f"{sweep.directory.resolve().name}: {len(sweep.results)} runs",
        lines=lines,
        counts=sweep.counts,
        sections=[_section(section, several, to) for section in sweep.sections],
        tables=[*_not_finished(sweep, to), _runs(sweep, to)],
    )


def _section(section: ExperimentReport, several: bool, to: Path) -> dict[str, Any]:
    notes = section.notes
    tables = [Table(title, rows, notes[title]) for title, rows in section.tables.items()]
    differ = swept_keys(section.cells)
    if differ:
        rows = [["key", "values"], *([key, _few(section.cells, key)] for key in differ)]
        tables.append(Table("configs that differ", rows))
    flats = [cell.settings for cell in section.cells]
    common = {
        key: value
        for key, value in (flats[0] if flats else {}).items()
        if all(key in one and one[key] == value for one in flats)
    }
    return {
        "name": section.name if several else "",
        "tables": tables,
        "figures": [
            _figure(section.directory / f"{name}.png", caption, to)
            for name, caption in section.figures.items()
        ],
        "config_words": f"what all configs share ({len(common)} keys)",
        "config": "\n".join(f"{key}: {json.dumps(value)}" for key, value in common.items()),
    }


def _few(cells: Sequence[Cell], key: str) -> str:
    """A key's values over the cells."""
    values = list(dict.fromkeys(short_text(cell.value_of(key)) for cell in cells))
    values = [value for value in values if value != "–"] or values
    more = f", … ({len(values)} values)" if len(values) > LISTED else ""
    return ", ".join(values[:LISTED]) + more


def _not_finished(sweep: SweepReport, to: Path) -> list[Table]:
    if len(sweep.not_finished) < 2:
        return []
    paths = {result.run.path.name: result.run.path for result in sweep.results}
    rows: list[list[Any]] = [list(sweep.not_finished[0])]
    for experiment, name, state, why in sweep.not_finished[1:]:
        log = paths[name] / "log.txt" if name in paths else None
        link = _link(log, to) if log and log.exists() else None
        rows.append([experiment, {"text": name, "link": link}, state, why])
    note = "A run's name leads to its log, with the traceback."
    return [Table("not finished", rows, note)]


def _runs(sweep: SweepReport, to: Path) -> Table:
    rows: list[list[Any]] = [["run", "status", "seed", "val/loss", "seconds", "files"]]
    for result in sweep.results:
        page, seconds = result.run.path / "report" / "index.html", result.status.get("seconds")
        link = _link(page, to) if page.exists() else None
        rows.append(
            [
                {"text": result.run.path.name, "link": link},
                result.state,
                str(result.config.get("seed", "–")),
                format_number(result.metrics.get("val/loss") if result.is_finished else None),
                "–" if seconds is None else f"{seconds:.1f}",
                {"text": "directory", "link": f"{_link(result.run.path, to)}/"},
            ]
        )
    return Table("runs", rows, "A run's name leads to its own report.")


def _link(path: Path, to: Path) -> str:
    return quote(Path(os.path.relpath(path, to)).as_posix())


def write_run_page(run: Run, tables: Sequence[tuple[str, Rows]], figures: Sequence[str]) -> Path:
    """The page of one run, of its tables by title and its figures by file name."""
    to, status = run.path / "report", run.status
    shown = [Table(title, rows, GAP_NOTE if title == "theory" else "") for title, rows in tables]
    seconds = status.get("seconds")
    return _write(
        to,
        title=f"{run.config['name']}: {run.path.resolve().name}",
        lines=[why] if (why := stop_cause(status)) else [],
        counts={status["state"] + (f" in {seconds:.0f} s" if seconds else ""): 1},
        sections=[
            {
                "name": "",
                "tables": [table for table in shown if len(table.rows) > 1],
                "figures": [_figure(to / f"{name}.png", CAPTIONS[name], to) for name in figures],
                "config_words": "config.yaml",
                "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
            }
        ],
        tables=[],
    )


def _figure(path: Path, caption: str, to: Path) -> dict[str, Any]:
    """A PNG inside the page, at a size that its letters are as the page's, and a link to it."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    size = {"width": round(width / 1.5), "height": round(height / 1.5)}
    return {
        "source": source,
        "caption": caption,
        "wide": width > WIDE,
        "link": _link(path, to),
        **size,
    }


def _write(to: Path, **content: Any) -> Path:
    loader = PackageLoader("lora_lab.report", package_path="")
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=loader)
    environment.tests["marked"] = is_marked
    environment.filters["bare"] = unmarked
    page = environment.get_template("page.html").render(states=STATES, **content)
    write_atomic(to / "index.html", page)
    return to / "index.html"
