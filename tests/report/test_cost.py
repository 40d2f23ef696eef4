"""What training cost in reports: a run's table, a sweep's, and the figure against the metric.

Independent truth: `statistics.mean` of numbers that the test writes, and texts written by hand.

Run: make test ARGS=tests/report/test_cost.py
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from lora_lab.report.cells import Cell, RunResult, cells_of, read_run
from lora_lab.report.cost import (
    cells_cost_table,
    cells_cost_table_in_full,
    cost_note,
    run_cost_table,
)
from lora_lab.report.tables import format_unit
from lora_lab.report.tradeoff_figure import metric_by_costs, pareto_front
from lora_lab.run_files import DamagedRunError
from lora_lab.runs import Run

FLOPS, SECONDS, MEMORY = "cost/flops_per_step", "cost/seconds_per_step", "cost/peak_memory_bytes"
ROWS, BYTES = "cost/rows_per_second", "bytes/adapter"
ALONE = {"steps": 83, "runs": 1, "processes": 1, "memory_of": "process"}
MEASURED = {SECONDS: 0.0123, ROWS: 5203.25, FLOPS: 6437888, MEMORY: 615657472}

RUN_TABLES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "alone": (
        {**MEASURED, "cost/tokens_per_second": 83252.0, **ALONE},
        {
            "seconds a step": "12.3 ms, without validation (83 steps)",
            "rows a second": "5,200",
            "tokens a second": "83,300",
            "FLOPs a step": "6.44 MFLOP (forward and backward)",
            "peak memory in training": "616 MB, of the process",
        },
    ),
    "in a pack": (
        {**MEASURED, **ALONE, "runs": 4, "memory_of": "GPU"},
        {
            "seconds a step": "12.3 ms, without validation (83 steps): a step of the pack took "
            "49.2 ms, for 4 runs",
            "rows a second": "5,200",
            "FLOPs a step": "6.44 MFLOP (forward and backward)",
            "peak memory in training": "616 MB, of the GPU, for 4 runs together",
        },
    ),
    "on several devices": (
        {MEMORY: 10**9, **ALONE, "processes": 2, "memory_of": "GPU"},
        {"peak memory in training": "1 GB, of the GPU that took most"},
    ),
    "an earlier version": ({}, {}),
}


@pytest.mark.parametrize("case", RUN_TABLES)
def test_the_table_of_a_run(case: str, tmp_path: Path):
    cost, expected = RUN_TABLES[case]
    if cost:
        (tmp_path / "cost.json").write_text(json.dumps(cost))
    assert run_cost_table(Run(tmp_path)) == [["cost", "value"], *map(list, expected.items())]


def test_a_file_that_is_no_cost_is_told(tmp_path: Path):
    (tmp_path / "cost.json").write_text("[")
    with pytest.raises(DamagedRunError, match=r"cost\.json cannot be read"):
        run_cost_table(Run(tmp_path))
    assert read_run(Run(tmp_path)).last == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (352, "352 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (0.0123, "12.3 mB")],
)
def test_a_number_with_its_unit(value: float, text: str):
    assert format_unit(value, "B") == text


def cells(costs: dict[int, list[dict[str, float]]], state: dict[str, Any] | None = None):
    """A cell for each r, with a run for each of its dicts of costs."""
    results = []
    for r, by_seed in costs.items():
        for seed, last in enumerate(by_seed):
            config = {"name": "x", "adapter": {"method": "lora", "r": r}, "seed": seed}
            config["target"] = {"linear": {}}
            status = {"state": "finished", "cell": f"r{r}", **(state or {})}
            numbers = {"val/loss": 1 / r, "parameters/trainable": 90 * r, BYTES: 360 * r, **last}
            run = Run(Path(f"r{r}-{seed}"))
            results.append(RunResult(run, status, config, numbers, {}, 2, first={}))
    return cells_of(results)


def costs_of(flops: float, seconds: float, memory: float) -> dict[str, float]:
    return {FLOPS: flops, SECONDS: seconds, ROWS: 8 / seconds, MEMORY: memory}


TIMES = {1: (0.001, 0.0011), 4: (0.002, 0.0023)}
DIFFERENT = {
    1: [costs_of(1.5e6, seconds, 500e6) for seconds in TIMES[1]],
    4: [costs_of(2e6, seconds, 505e6) for seconds in TIMES[4]],
}
"""All but the memory differ, which varies by 1%."""


def drawn_panels(of_cells: list[Cell]) -> dict[str, list[str]]:
    """Label of the axis → the labels on the front, of each panel."""
    figure = metric_by_costs(of_cells, "val/loss")
    assert figure is not None
    return {axes.get_xlabel(): [text.get_text() for text in axes.texts] for axes in figure.axes}


def test_a_sweep_shows_the_costs_that_differ():
    head, *rows = cells_cost_table(of_cells := cells(DIFFERENT))
    assert head == ["r", "n", "kB of adapter", "MFLOP a step", "ms a step", "rows a second"]
    assert rows[0][:5] == ["1", "2", "0.36", "1.5", "1.050 ± 0.071"]
    assert rows[1][:5] == ["4", "2", "1.44", "2", "2.15 ± 0.21"]
    assert float(rows[0][5].split(" ± ")[0].replace(",", "")) == pytest.approx(
        mean(8 / seconds for seconds in TIMES[1]), rel=0.01
    )
    note = cost_note(of_cells)
    assert note.endswith("Different by no more than noise: peak memory in training 500–505 MB.")
    assert "pack" not in note
    assert "the pack's divided by its runs" in cost_note(cells(DIFFERENT, {"packed": 4}))
    in_full = cells_cost_table_in_full(of_cells)
    (column,) = [i for i, title in enumerate(in_full[0]) if title == SECONDS]
    assert [float(row[column]) for row in in_full[1:]] == [mean(TIMES[1]), mean(TIMES[4])]
    assert drawn_panels(of_cells) == {
        "trained parameters": ["r=1", "r=4"],
        "FLOPs a step (MFLOP)": ["r=1", "r=4"],
        "seconds a step (ms)": ["r=1", "r=4"],
    }


def test_each_panel_has_its_own_front():
    """r = 4 is the better, and here the quicker and smaller too: it alone is on those fronts."""
    costs = {1: [costs_of(1e6, 0.004, 2e9)], 4: [costs_of(2e6, 0.002, 1e9)]}
    assert pareto_front([(0.004, 1.0), (0.002, 0.25)], "minimize") == [1]
    assert drawn_panels(cells(costs)) == {
        "trained parameters": ["r=1", "r=4"],
        "FLOPs a step (MFLOP)": ["r=1", "r=4"],
        "seconds a step (ms)": ["r=4"],
        "peak memory in training (GB)": ["r=4"],
    }


ALIKE: dict[str, dict[int, list[dict[str, float]]]] = {
    # of one adapter size, to see these alone
    "by a fifth, in one run each": {
        1: [costs_of(1e6, 0.001, 1e9) | {BYTES: 1}],
        4: [costs_of(1e6, 0.0012, 1e9) | {BYTES: 1}],
    },
    "by less than two deviations": {
        1: [costs_of(1e6, s, 1e9) | {BYTES: 1} for s in (0.001, 0.003)],
        4: [costs_of(1e6, s, 1e9) | {BYTES: 1} for s in (0.002, 0.004)],
    },
    "an earlier version": {1: [{}], 4: [{}]},
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_differs_by_noise_alone_is_not_shown(case: str):
    of_cells = cells(ALIKE[case])
    assert len(cells_cost_table(of_cells)) == 1
    assert list(drawn_panels(of_cells)) == ["trained parameters"]
    assert ("FLOPs a step 1 MFLOP" in cost_note(of_cells)) is (case != "an earlier version")
