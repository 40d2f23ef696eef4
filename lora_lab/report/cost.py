"""What training cost: a run's table of it."""

from typing import Any

from lora_lab.report.tables import Rows, format_number, format_unit
from lora_lab.run_files import read_cost
from lora_lab.runs import Run

SECONDS, MEMORY = "cost/seconds_per_step", "cost/peak_memory_bytes"
FLOPS, ROWS, TOKENS = "cost/flops_per_step", "cost/rows_per_second", "cost/tokens_per_second"


def run_cost_table(run: Run) -> Rows:
    """(cost, value) rows of one run, titles included; the titles alone where it has no cost.json.

    Raises DamagedRunError where that file cannot be read.
    """
    cost, rows = read_cost(run.path), [["cost", "value"]]
    if SECONDS in cost:
        rows.append(["seconds a step", _seconds_text(cost)])
    for key, name in ((ROWS, "rows a second"), (TOKENS, "tokens a second")):
        if key in cost:
            rows.append([name, format_number(float(f"{cost[key]:.3g}"))])
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
