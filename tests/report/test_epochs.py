"""Metrics at the last epoch and at their best one, in `best` and in reports.

Independent truth: a plain loop over rows that are written here, of runs whose last epoch is not the
best, and `statistics` of what it gives.

Run: make test ARGS=tests/report/test_epochs.py
"""

import csv
import json
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from lora_lab.report import best_by_experiment, rank_figures
from lora_lab.report.cells import RunResult, cells_of, epoch_of, read_run
from lora_lab.report.epochs import OPTIMISTIC, BestValue, best_values, epoch_text
from lora_lab.report.tables import format_mean_std, format_number
from lora_lab.report.tradeoff_figure import metric_by_costs
from lora_lab.run_files import file_records
from lora_lab.runs import Run, write_status
from tests.conftest import Lab, command, only_run, quick
from tests.copied_runs import copy_run


def rows_of(metric: str, values: dict[float, float]) -> list[dict[str, Any]]:
    """A row for each epoch, as training logs them, between rows of the base and of an analysis."""
    base = [{"step": 1, "base/" + metric: -9.0, "epoch": 1}]
    rows = [{"step": 10 * epoch, metric: v, "epoch": epoch} for epoch, v in values.items()]
    return [*base, *rows, {"step": 40, "spectra/head/stable_rank": 1.0, "merged/val/loss": -9.0}]


# metric, values by epoch, what is best (None: nothing), at which epoch
CASES: dict[str, tuple[str, dict[float, float], float | None, float | None]] = {
    "loss": ("val/loss", {0: 9, 1: 3, 2: 1, 3: 2}, 1, 2),
    "accuracy": ("val/accuracy", {0: 0.1, 1: 0.5, 2: 0.7, 3: 0.6}, 0.7, 2),
    "the last": ("val/perplexity", {0: 9, 1: 3, 2: 2}, 2, 2),
    "better before the first step": ("val/loss", {0: 0.5, 1: 3, 2: 2, 3: 4}, 2, 2),
    "within an epoch": ("val/loss", {0: 9, 0.25: 3, 0.5: 1, 1: 2}, 1, 0.5),
    "equal": ("val/accuracy", {0: 0, 1: 0.5, 2: 0.5}, 0.5, 1),
    "NaN": ("val/matthews", {0: nan, 1: nan, 2: 0.2, 3: nan}, 0.2, 2),
    "NaN alone": ("val/matthews", {0: nan, 1: nan}, None, None),
    "no goal": ("val/effective_rank", {0: 1, 1: 2}, None, None),
    "not trained": ("val/loss", {0: 2}, None, None),
    "no validation": ("test/loss", {3: 2}, None, None),
}


@pytest.mark.parametrize(("metric", "values", "best", "epoch"), CASES.values(), ids=CASES)
def test_the_best_value_of_a_metric(
    metric: str, values: dict[float, float], best: float | None, epoch: float | None
):
    expected = {} if best is None else {metric: (best, epoch)}
    assert best_values(rows_of(metric, values)) == expected


def test_a_goal_that_is_given_goes_before_the_name():
    rows = rows_of("val/loss", {0: 9, 1: 3, 2: 1, 3: 2})
    assert best_values(rows, {"val/loss": "maximize"}) == {"val/loss": (3, 1)}


@pytest.mark.parametrize(
    ("metric", "at", "selects", "text"),
    [
        ("val/loss", "last", ["last", "last"], "at the last epoch"),
        ("val/loss", "last", ["best val/loss"], "at the selected epoch"),
        ("val/loss", "last", ["last", "best val/loss"], "at the last, or the selected, epoch"),
        ("val/loss", "best", ["best val/accuracy"], "at its best epoch"),
        ("test/loss", "best", ["last"], "at the end"),
    ],
)
def test_how_an_epoch_is_told(metric: str, at: Any, selects: list[str], text: str):
    assert epoch_text(metric, at, selects) == text


@pytest.mark.parametrize(
    ("best", "select", "text"),
    [
        ({}, "last", "at the last epoch"),  # never trained, or a metric without a goal
        ({}, "best val/loss", "at the selected epoch"),
        ({"val/loss": BestValue(1.0, 2)}, "last", "at its best epoch"),
    ],
)
def test_a_last_value_is_not_called_the_best(best: dict[str, BestValue], select: str, text: str):
    run, status = Run(Path("run")), {"state": "finished"}
    result = RunResult(run, status, {"select": select}, {"val/loss": 1.0}, best, 2, at="best")
    assert epoch_of("val/loss", [result]) == epoch_of("val/", [result]) == text


LOSSES = {  # r, seed → the loss of epochs 1, 2 and 3: r=1 is the best at the end, r=4 before
    **{(1, 0): (3.0, 2.5, 2.0), (1, 1): (3.2, 2.6, 2.2)},
    **{(4, 0): (1.1, 2.0, 4.0), (4, 1): (2.0, 1.3, 5.0)},
}


@pytest.fixture
def runs(lab: Lab) -> list[Run]:
    """Copies of a real run with the losses of LOSSES, and a third of them as accuracies."""
    assert lab("digits", "runs_dir=first", "adapter.r=1") == 0
    points = ({"adapter.r": r, "seed": seed} for r, seed in LOSSES)
    copies = copy_run(only_run("first"), points, Path("runs"))
    for run, losses in zip(copies, LOSSES.values(), strict=True):
        other = [row for row in run.rows() if not any(key.startswith("val/") for key in row)]
        rows = [
            {"step": i, "val/loss": loss, "val/accuracy": loss / 9, "epoch": i}
            for i, loss in enumerate((0.5, *losses))
        ]
        lines = [json.dumps(row) for row in [*rows, {"step": 3, "test/loss": losses[0]}, *other]]
        (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        write_status(run.path, {**run.status, "state": "finished", "files": file_records(run.path)})
    return copies


def by_hand(r: int, at: str, metric: str = "val/loss") -> list[float]:
    """A metric of each seed's run: the last, or the best after epoch 0."""
    curves = [losses for (rank, _), losses in LOSSES.items() if rank == r]
    if metric == "val/accuracy":
        curves = [[loss / 9 for loss in losses] for losses in curves]
        return [losses[-1] if at == "last" else max(losses) for losses in curves]
    return [losses[-1] if at == "last" else min(losses) for losses in curves]


WHERE = {"last": "at the last epoch", "best": "at its best epoch"}


@pytest.mark.parametrize(("at", "order"), [("last", [1, 4]), ("best", [4, 1])])
def test_best_ranks_at_an_epoch(
    runs: list[Run],
    at: Any,
    order: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (best_cells,) = best_by_experiment(runs, "val/loss", at=at)
    head, *rows = best_cells.rows(9)
    assert head == ["r", "n", "val/loss", "min", "max", "best epoch"]
    epochs = {1: "3 of 3", 4: "1–2 of 3"}
    for row, r in zip(rows, order, strict=True):
        values = by_hand(r, at)
        limits = [format_number(min(values)), format_number(max(values))]
        text = format_mean_std(mean(values), stdev(values))
        assert row == [str(r), "2", text, *limits, epochs[r]]
    assert command(monkeypatch, "best", f"--at={at}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"minimize val/loss {WHERE[at]}" in shown
    value = min(by_hand(order[0], at))
    epoch = ", 1 of 3" if at == "best" else ""
    assert f"(val/loss {value:.5g} {WHERE[at]}{epoch})" in shown
    assert OPTIMISTIC in shown


def test_best_by_another_goal_is_that_goals_best(runs: list[Run]):
    (best_cells,) = best_by_experiment(runs, "val/loss", "maximize", "best")
    assert [cell.metrics["val/loss"].mean for cell in best_cells.cells] == [
        mean([4.0, 5.0]),
        mean([3.0, 3.2]),
    ]


@pytest.mark.parametrize("at", quick(["last", "best"], ["best"]))
def test_a_report_at_an_epoch_says_which(
    runs: list[Run], at: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "report", "runs", f"--at={at}", "--to=to") == 0
    shown = " ".join(capsys.readouterr().out.split())
    with Path("to/cells.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["val/ at"] == at
            for metric in ("val/loss", "val/accuracy"):
                values = by_hand(int(row["r"]), at, metric)
                assert float(row[metric]) == pytest.approx(mean(values), rel=1e-14)
            assert float(row["test/loss"]) == mean(
                losses[0] for (r, _), losses in LOSSES.items() if r == int(row["r"])
            )
    with Path("to/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            is_at_best = at == "best" and row["metric"].startswith("val/")
            assert row["at"] == ("best" if is_at_best else "last"), row["metric"]
    note = f"each val/ metric {WHERE[at]}"
    markdown, page = Path("to/report.md").read_text(), Path("to/index.html").read_text()
    best_r4 = f"**{format_mean_std(mean(by_hand(4, 'best')), stdev(by_hand(4, 'best')))}**"
    for text in (shown, markdown, page):
        assert note in text
        assert ("best val/loss" in text) == (at == "best")
        assert (OPTIMISTIC in text) == (at == "best")
    assert (best_r4 in markdown) == (at == "best")
    assert f"![Validation loss {WHERE[at]}, against r:" in markdown
    assert f"val/loss {WHERE[at]}." in page
    assert Path("to/cells.tex").read_text().startswith(f"% val/ {WHERE[at]}\n")
    results = [read_run(run, at=at) for run in runs]
    figures = (
        rank_figures.metric_by_rank(results, "val/loss"),
        metric_by_costs(cells_of(results), "val/loss"),
    )
    for figure in figures:
        assert figure is not None
        assert figure.axes[0].get_ylabel() == f"validation loss {WHERE[at]}"
    # What is cut is the ΔW of the end, so that the losses beside it are those of the end.
    with Path("to/truncation.csv").open() as file:
        trained = {int(row["k"]): row["trained at r = k"] for row in csv.DictReader(file)}
    assert {r: float(trained[r]) for r in (1, 4)} == {
        r: pytest.approx(mean(by_hand(r, "last"))) for r in (1, 4)
    }


@pytest.mark.parametrize("at", quick(["last", "best"], ["best"]))
def test_a_runs_report_at_an_epoch(
    runs: list[Run], at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (run,) = [run for run in runs if (run.config["adapter"]["r"], run.config["seed"]) == (4, 0)]
    assert command(monkeypatch, "report", str(run.path), f"--at={at}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    value = min(LOSSES[4, 0]) if at == "best" else LOSSES[4, 0][-1]
    fact = f"loss on the new data after adaptation, {WHERE[at]}"
    assert f"{fact} {value:g}" in shown
    assert f'"{fact}",{value:g}' in (run.path / "report" / "facts.csv").read_text()
    assert "test loss, looked at once, at the end 1.1" in shown
    assert "loss of the merged model, at the last epoch" in shown
    assert "best loss 1.1 after epoch 1; last 4" in shown
    assert f"a best value {OPTIMISTIC}" in shown
    result = read_run(run)
    assert (result.metrics["val/loss"], result.best["val/loss"]) == (4.0, (1.1, 1))
