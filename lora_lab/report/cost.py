"""What training cost: a run's table of it, a sweep's, and which costs differ between its cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.report.cell_statistics import Statistics
from lora_lab.report.cells import Cell, swept_keys
from lora_lab.report.tables import Rows, format_mean_std, format_number, format_unit, unit_of
from lora_lab.run_files import read_cost
from lora_lab.runs import Run

SECONDS, MEMORY = "cost/seconds_per_step", "cost/peak_memory_bytes"
FLOPS, ROWS, TOKENS = "cost/flops_per_step", "cost/rows_per_second", "cost/tokens_per_second"


@dataclass(frozen=True)
class Column:
    """One cost in a sweep's tables and figures."""

    metric: str
    title: str
    """A column's title, after its unit if it has one: `ms a step`."""
    label: str
    """What an axis and a text call it."""
    unit: str
    least: float
    """The least share by which cells differ, to count as different: times vary by a fifth."""


COLUMNS = (
    Column("bytes/adapter", "of adapter", "adapter", "B", 0),
    Column(FLOPS, "a step", "FLOPs a step", "FLOP", 0.02),
    Column(SECONDS, "a step", "seconds a step", "s", 0.2),
    Column(TOKENS, "tokens a second", "tokens a second", "", 0.2),
    Column(ROWS, "rows a second", "rows a second", "", 0.2),
    Column(MEMORY, "at the peak", "peak memory in training", "B", 0.05),
)
"""The costs of a sweep's table, in its order."""

NOTE = (
    "Mean ± standard deviation over the runs of a cell. A step is forward, backward and the "
    "optimizer's, without validation."
)
PACK_NOTE = (
    " Of runs that were trained together, seconds are the pack's divided by its runs, and the peak "
    "memory is the pack's."
)


def differing_costs(cells: Sequence[Cell]) -> list[Column]:
    """The costs in which cells differ by more than noise.

    That is the column's least share of the largest mean, and twice the largest deviation over the
    runs of a cell. None where no run has a cost.json.
    """
    if not any(_statistics(cells, column) for column in COLUMNS[1:]):
        return []
    differing = [c for c in COLUMNS if _differs(_statistics(cells, c), c.least)]
    # Rows a second are the other side of seconds a step.
    is_timed = any(column.metric == SECONDS for column in differing)
    return [c for c in differing if c.metric not in (ROWS, TOKENS) or is_timed]


def _statistics(cells: Sequence[Cell], column: Column) -> list[Statistics]:
    return [cell.metrics[column.metric] for cell in cells if column.metric in cell.metrics]


def _differs(statistics: Sequence[Statistics], least: float) -> bool:
    means = [s.mean for s in statistics] or [0.0]
    deviation = max((s.std or 0.0 for s in statistics), default=0.0)
    return max(means) - min(means) > max(least * max(means), 2 * deviation)


def cells_cost_table(cells: Sequence[Cell]) -> Rows:
    """The costs in which cells differ, a row for each; the titles alone where none does."""
    keys, columns = swept_keys(cells), differing_costs(cells)
    if any(column.metric == TOKENS for column in columns):
        columns = [column for column in columns if column.metric != ROWS]
    units = [_unit(cells, column) for column in columns]
    titles = [f"{name} {c.title}".strip() for (_, name), c in zip(units, columns, strict=True)]
    rows = [[*(keys.values() or ["cell"]), "n", *titles]]
    for cell in cells if columns else ():
        row = [*cell.swept_texts(keys), str(len(cell.finished))]
        for (size, _), column in zip(units, columns, strict=True):
            s = cell.metrics.get(column.metric)
            row.append("–" if s is None else _in_unit(s, size))
        rows.append(row)
    return rows


def _unit(cells: Sequence[Cell], column: Column) -> tuple[float, str]:
    """The unit of a column's largest number: 1000 and `kB`; 1 and "" where it has none."""
    largest = max(s.mean for s in _statistics(cells, column))
    return unit_of(largest, column.unit) if column.unit else (1.0, "")


def _in_unit(s: Statistics, size: float) -> str:
    """`12.3 ± 0.4`, in a unit of some size."""
    if not s.std:
        return _rounded(s.mean / size, 4)
    return format_mean_std(s.mean / size, s.std / size)


def _rounded(number: float, digits: int) -> str:
    return format_number(float(f"{number:.{digits}g}"))


def cells_cost_table_in_full(cells: Sequence[Cell]) -> Rows:
    """All costs that were measured, to all digits, mean and deviation in separate columns."""
    keys, columns = swept_keys(cells), [c for c in COLUMNS if _statistics(cells, c)]
    titles = [f"{column.metric}{suffix}" for column in columns for suffix in ("", " std")]
    rows = [["cell", *keys.values(), "n", *titles]]
    for cell in cells:
        row = [*cell.full_texts(keys), str(len(cell.finished))]
        for column in columns:
            s = cell.metrics.get(column.metric)
            numbers = (s.mean, s.std) if s else (None, None)
            row += ["" if number is None else repr(float(number)) for number in numbers]
        rows.append(row)
    return rows


def cost_note(cells: Sequence[Cell]) -> str:
    """What is said below the table: how costs are measured, and those that are equal in all cells.

    "" where no run has a cost.json.
    """
    if not any(_statistics(cells, column) for column in COLUMNS[1:]):
        return ""
    differing, equal = differing_costs(cells), []
    for column in COLUMNS:
        if column not in differing and (s := _statistics(cells, column)):
            size, unit = _unit(cells, column)
            low, high = (_rounded(f(x.mean for x in s) / size, 3) for f in (min, max))
            numbers = low if low == high else f"{low}–{high}"
            equal.append(f"{column.label} {numbers} {unit}".strip())
    packed = any(result.status.get("packed") for cell in cells for result in cell.finished)
    same = f" Different by no more than noise: {', '.join(equal)}." if equal else ""
    return NOTE + PACK_NOTE * packed + same


def run_cost_table(run: Run) -> Rows:
    """(cost, value) rows of one run, titles included; the titles alone where it has no cost.json.

    Raises DamagedRunError where that file cannot be read.
    """
    cost, rows = read_cost(run.path), [["cost", "value"]]
    if SECONDS in cost:
        rows.append(["seconds a step", _seconds_text(cost)])
    for key, name in ((ROWS, "rows a second"), (TOKENS, "tokens a second")):
        if key in cost:
            rows.append([name, _rounded(cost[key], 3)])
    if FLOPS in cost:
        text = f"{format_unit(cost[FLOPS], 'FLOP')} (forward and backward)"
        rows.append(["FLOPs a step", text])
    if MEMORY in cost:
        rows.append(["peak memory in training", _memory_text(cost)])
    return rows


def _seconds_text(cost: dict[str, Any]) -> str:
    """`12.3 ms, without validation (83 steps)`; of a run in a pack, how long the pack's step is."""
    text = f"{format_unit(cost[SECONDS], 's')}, without validation ({cost['steps']} steps)"
    if (runs := cost["runs"]) > 1:
        together = format_unit(runs * cost[SECONDS], "s")
        text += f": a step of the pack took {together}, for {runs} runs"
    return text


def _memory_text(cost: dict[str, Any]) -> str:
    """`616 MB, of the process`; of a run in a pack, that it is the pack's."""
    text = f"{format_unit(cost[MEMORY], 'B')}, of the {cost['memory_of']}"
    text += " that took most" if cost["processes"] > 1 else ""
    return text + (f", for {cost['runs']} runs together" if cost["runs"] > 1 else "")
