"""Reports of runs and of folders of runs: tables, facts, unfinished runs, and `lora-lab ls`.

Truth: means, deviations and gaps computed here by `statistics` from the metrics.jsonl files; a
report made again elsewhere from the run directory alone; run directories damaged by hand.

Run: make test ARGS=tests/report/test_report.py
"""

import csv
import json
import shutil
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from filelock import FileLock

from lora_lab.report.cells import cells_of, read_run, stop_cause
from lora_lab.report.summary import (
    cells_table,
    identical_seeds_note,
    theory_table,
    unfinished_table,
)
from lora_lab.report.tables import format_mean_std
from lora_lab.report.theory import TheoryCheck, check_row
from lora_lab.runs import Run, find_runs
from tests.conftest import Lab, command, only_run
from tests.copied_runs import copy_run


def report_files(run: Path) -> dict[str, bytes]:
    """A report's PNG and CSV files: PDFs hold their date, and table.md its directory's name."""
    files = (run / "report").iterdir()
    return {p.name: p.read_bytes() for p in files if p.suffix in (".png", ".csv")}


def test_a_report_needs_the_run_directory_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("digits", "figures=true")
    run = only_run()
    shown = capsys.readouterr().out
    before = report_files(run.path)
    moved = Path("moved")
    shutil.move(run.path, moved)
    shutil.rmtree("runs")
    shutil.rmtree("bases")
    shutil.rmtree(moved / "report")
    assert command(monkeypatch, "report", "moved") == 0
    again = capsys.readouterr().out
    assert again.split("figures")[0].strip() in shown
    assert report_files(moved) == before
    assert {p.stem for p in (moved / "report").glob("*.pdf")} == {
        *("loss", "spectrum", "delta", "phi", "truncation")
    }


def test_the_tables_hold_the_runs_numbers(lab: Lab):
    lab("digits")
    run = only_run()
    with (run.path / "report" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("epoch", "base loss", "base accuracy", "lora loss", "lora accuracy"),
    ]
    last = rows[-1]
    assert float(last["lora loss"]) == pytest.approx(run.last("val/loss"), rel=1e-4)
    assert float(last["lora accuracy"]) == pytest.approx(run.last("val/accuracy"), rel=1e-4)
    facts = (run.path / "report" / "facts.csv").read_text()
    assert "ΔW of head: effective rank" in facts
    markdown = (run.path / "report" / "table.md").read_text()
    assert "| epoch | base loss |" in markdown


@pytest.mark.parametrize("adapter", ["full", "none"])
def test_every_method_has_a_report(lab: Lab, adapter: str):
    assert lab("digits", f"adapter={adapter}", "figures=true") == 0
    assert (only_run().path / "report" / "loss.png").stat().st_size > 5000


def final_metrics(run: Run) -> dict[str, float]:
    """The last value of each metric, read from metrics.jsonl alone."""
    last = {}
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    return {k: v for k, v in last.items() if k not in ("step", "epoch")}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_folder_of_runs_by_cell_against_a_computation_by_hand(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    brief = ("optimizer=sgd", "trainer.max_epochs=4")
    assert lab("shift", "adapter.r=1,2,3", "seed=0,1,2", *brief, "optimizer.lr=1e-3", "-m") == 0
    assert lab("shift", "adapter=full", *brief, "optimizer.lr=1e-3") == 0
    assert lab("shift", *brief, "optimizer.lr=1e30") == 1
    capsys.readouterr()
    assert command(monkeypatch, "report", "runs/shift") == 0
    shown = capsys.readouterr().out
    folder = Path("runs/shift/report")
    measured: dict[tuple[str, str], list[float]] = {}
    cell_of: dict[tuple[str, str], str] = {}  # (r, lr) as the main table has them
    for run in find_runs(Path("runs")):
        cost = run.path / "cost.json"
        costs = json.loads(cost.read_text()) if run.finished else {}
        costs = {key: value for key, value in costs.items() if key.startswith("cost/")}
        for metric, value in (final_metrics(run) | costs).items() if run.finished else ():
            measured.setdefault((run.status["cell"], metric), []).append(value)
        point = (str(run.config["adapter"].get("r", "")), str(run.config["optimizer"]["lr"]))
        cell_of[point] = run.status["cell"]
    metrics_table = {(row["cell"], row["metric"]): row for row in rows_of(folder / "metrics.csv")}
    assert set(metrics_table) == set(measured)
    for key, values in measured.items():
        row = metrics_table[key]
        assert int(row["n"]) == len(values) == (1 if key[0].startswith("full") else 3)
        assert float(row["mean"]) == pytest.approx(statistics.mean(values), rel=1e-14)
        if len(values) > 1:
            assert float(row["std"]) == pytest.approx(statistics.stdev(values), rel=1e-9)
        assert float(row["median"]) == pytest.approx(statistics.median(values), rel=1e-14)
        assert (float(row["min"]), float(row["max"])) == (min(values), max(values))
    losses = {cell: values for (cell, metric), values in measured.items() if metric == "val/loss"}
    table = rows_of(folder / "cells.csv")
    assert len(table) == 5, "the cell whose only run failed has a row too"
    for row in table:
        cell = cell_of[row["r"], row["lr"]]
        if row["lr"] == "1e+30":
            assert (row["n"], row["runs"], row["val/loss"]) == ("0", "1", "")
            continue
        assert int(row["n"]) == len(losses[cell])
        assert float(row["val/loss"]) == pytest.approx(statistics.mean(losses[cell]), rel=1e-14)
        if len(losses[cell]) > 1:
            std = statistics.stdev(losses[cell])
            assert float(row["val/loss std"]) == pytest.approx(std, rel=1e-9)
        else:
            assert row["val/loss std"] == ""
    best = min(losses, key=lambda cell: statistics.mean(losses[cell]))
    (bold,) = [line for line in (folder / "report.md").read_text().splitlines() if "**" in line]
    best_losses = losses[best]
    text = (
        format_mean_std(statistics.mean(best_losses), statistics.stdev(best_losses))
        if len(best_losses) > 1
        else f"{best_losses[0]:.5g}"
    )
    assert f"**{text}**" in bold
    tex = (folder / "cells.tex").read_text()
    assert r"\toprule" in tex
    assert tex.count(r"\textbf{") == 1
    lines = (
        (folder / "report.md").read_text().split("## cells\n\n")[1].split("\n\n")[0].splitlines()
    )
    for value in (value for line in lines[2:] for value in line.split("|")[1:-1]):
        latex_value = value.strip().strip("*").replace("±", r"$\pm$").replace("–", "--")
        assert latex_value in tex, "LaTeX holds what Markdown holds"
    (failed,) = (r for r in rows_of(folder / "not_finished.csv") if r["status"] == "failed")
    assert "DivergedError" in failed["cause"]
    assert failed["run"] in shown
    for name in ("rank", "tradeoff", "measures", "spectra"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").exists()
    cut = {int(row["k"]): row for row in rows_of(folder / "truncation.csv")}
    assert sorted(cut) == [0, 1, 2, 3]
    assert float(cut[3]["cut from the largest r"]) == pytest.approx(
        float(cut[3]["trained at r = k"]), rel=1e-4
    )
    assert [cut[k]["trained at r = k n"] for k in range(4)] == ["0", "3", "3", "3"]
    assert cut[0]["trained at r = k"] == ""


def test_every_run_that_is_not_finished_is_listed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", "adapter.r=1,2", "seed=0,1,2", "-m") == 0
    runs = {(r.config["adapter"]["r"], r.config["seed"]): r for r in find_runs(Path("runs"))}
    killed, damaged, removed = runs[1, 1], runs[1, 2], runs[2, 1]
    status = json.loads((killed.path / "status.json").read_text())
    (killed.path / "status.json").write_text(json.dumps({**status, "state": "running"}))
    (damaged.path / "metrics.jsonl").write_text('{"a"\n{"epoch": 1}\n')
    shutil.rmtree(removed.path)
    lock = FileLock(runs[2, 2].path / "lock").acquire()
    status = json.loads((runs[2, 2].path / "status.json").read_text())
    (runs[2, 2].path / "status.json").write_text(json.dumps({**status, "state": "running"}))
    capsys.readouterr()
    assert command(monkeypatch, "report", "runs/shift") == 0
    lock.lock.release()
    listed = {r["run"]: r for r in rows_of(Path("runs/shift/report/not_finished.csv"))}
    states = {name: row["status"] for name, row in listed.items()}
    assert states == {
        killed.path.name: "interrupted",
        damaged.path.name: "damaged",
        removed.path.name: "missing",
        runs[2, 2].path.name: "running",
    }
    assert listed[removed.path.name]["cause"] == "not begun: adapter.r=2 seed=1"
    assert "2 finished, 1 interrupted, 1 damaged, 1 running, 1 missing" in capsys.readouterr().out
    first, second = rows_of(Path("runs/shift/report/cells.csv"))
    assert (first["r"], first["n"], first["runs"]) == ("1", "1", "3")
    assert (second["r"], second["n"], second["runs"]) == ("2", "1", "2")


def test_without_a_list_of_what_was_planned_a_missing_seed_is_listed(lab: Lab):
    assert lab("shift") == 0
    first = only_run()
    points = [{"adapter.r": r, "seed": s} for r in (1, 2, 4) for s in (1, 2) if (r, s) != (4, 2)]
    copy_run(first, points, Path("sweep"))
    rows = unfinished_table([read_run(run) for run in find_runs(Path("sweep"))], Path("sweep"))
    ((_, cell, state, cause),) = rows[1:]
    assert cell.startswith("r4-")
    assert state == "missing"
    assert "seed 2 " in cause


def test_a_folder_without_finished_runs_has_a_report(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("shift", "optimizer=sgd", "optimizer.lr=1e30") == 1
    capsys.readouterr()
    assert command(monkeypatch, "report", "runs/shift") == 0
    assert "(none yet: " in capsys.readouterr().out
    assert "DivergedError" in Path("runs/shift/report/index.html").read_text()


@pytest.mark.slow
def test_runs_that_differ_in_more_than_r_are_not_averaged(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    """And one whose files are damaged leaves the others theirs; each experiment has a folder."""
    assert lab("planted_linear", "adapter=lora,lora_fa", "adapter.r=1,2", "-m") == 0
    assert lab("shift") == 0
    assert lab("shift", "seed=1") == 0
    damaged = next(r for r in find_runs(Path("runs/shift")) if r.status["seed"] == 1)
    (damaged.path / "spectra.npz").write_bytes(b"PK\x03\x04 cut")
    assert command(monkeypatch, "report", "runs") == 0
    rows = rows_of(Path("runs/report/planted_linear/truncation.csv"))
    assert {row["series"] for row in rows} == {"trains=both", "trains=zero"}
    for run in find_runs(Path("runs/planted_linear")):
        series = f"trains={run.config['adapter']['trains']}"
        (row,) = [
            row
            for row in rows
            if (row["series"], row["k"]) == (series, str(run.config["adapter"]["r"]))
        ]
        assert float(row["trained at r = k"]) == pytest.approx(run.last("val/loss"), rel=1e-4)
    (row,) = rows_of(Path("runs/report/not_finished.csv"))
    assert (row["run"], row["status"]) == (damaged.path.name, "damaged")
    assert not Path("runs/report/rank.png").exists(), "two experiments have no common axis"
    assert Path("runs/report/planted_linear/rank.png").exists()
    assert Path("runs/report/shift/cells.csv").exists()
    assert command(monkeypatch, "report", "runs/planted_linear") == 0
    assert Path("runs/planted_linear/report/rank.png").exists()
    assert command(monkeypatch, "report", str(damaged.path)) == 2


def test_theory_stands_beside_what_was_measured(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("planted_linear", "adapter.r=1,2", "-m") == 0
    for run in find_runs(Path("runs")):
        with (run.path / "report" / "theory.csv").open() as file:
            loss = next(row for row in csv.DictReader(file) if row["metric"] == "val/loss")
        predicted = run.last("theory/val/loss")
        assert float(loss["theory"]) == pytest.approx(predicted, rel=1e-4)
        assert float(loss["measured"]) == pytest.approx(run.last("val/loss"), rel=1e-4)
        gap = (run.last("val/loss") - predicted) / predicted  # pyright: ignore
        assert float(loss["gap"]) == pytest.approx(gap, rel=1e-2)
        assert loss["holds"] == "NO", "two steps do not reach the floor"
    assert command(monkeypatch, "report", "runs") == 0
    assert " NO" in capsys.readouterr().out
    assert Path("runs/report/theory.png").exists()


def test_ls_lists_every_state(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift", "seed=0")
    lab("shift", "seed=1", "optimizer=sgd", "optimizer.lr=1e30")
    (Path("runs") / "killed").mkdir()
    (Path("runs") / "killed" / "status.json").write_text('{"state": "running"}')
    (Path("runs") / "torn").mkdir()
    (Path("runs") / "torn" / "status.json").write_text('{"state": "finished"}')
    (Path("runs") / "torn" / "metrics.jsonl").write_text('{"a"\n{"epoch": 1}\n')
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    assert command(monkeypatch, "ls") == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    states = ("interrupted", "finished", "failed", "damaged")
    assert [line[0] for line in lines[3:7]] == list(states)
    assert lines[-1][:2] == ["damaged", "runs/torn:"]
    done = next(r for r in find_runs(Path("runs")) if r.finished)
    assert f"{done.last('val/loss'):.5g}" in shown
    stopped = next(r for r in find_runs(Path("runs")) if r.status["state"] == "failed")
    assert stopped.last("val/loss") is not None
    (line,) = [line for line in shown.splitlines() if line.split()[:1] == ["failed"]]
    assert line.split()[-4] == "–", "what it last had is no final loss"


def test_ls_filters_and_sorts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift", "seed=0,1,2", "-m")
    lab("shift", "seed=7", "optimizer=sgd", "optimizer.lr=1e30")
    monkeypatch.setenv("COLUMNS", "200")
    hashes = {r.path.name.rpartition("-")[2]: r for r in find_runs(Path("runs"))}

    def listed(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert command(monkeypatch, "ls", *arguments) == 0
        return [line.split()[-1] for line in capsys.readouterr().out.splitlines()[3:-1]]

    done = [name for name, run in hashes.items() if run.finished]
    assert sorted(listed()) == sorted(hashes)
    assert listed("--state", "failed") == [name for name in hashes if name not in done]
    by_loss = sorted(done, key=lambda name: final_metrics(hashes[name])["val/loss"])
    assert listed("--state", "finished", "--sort", "loss") == by_loss
    by_start = sorted(hashes, key=lambda name: hashes[name].status["started"])
    assert listed("--sort", "started") == by_start


@pytest.mark.parametrize(
    "arguments", [("ls", "nowhere"), ("report", "nowhere"), ("best", "nowhere")]
)
def test_a_path_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
):
    assert command(monkeypatch, *arguments) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["ls", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    program = (
        "import sys; from lora_lab.cli import main as cli; sys.argv[1:] = sys.argv[1:]\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'hydra', 'wandb', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: lora-lab" in done.stdout


def test_data_seeds_are_named_and_pooled_alike(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """data.seed is a column under its full name; a figure that pools data seeds says so."""
    assert lab("shift", "adapter.r=2") == 0
    points = product((1, 2), (0, 1), (0, 1, 2))
    keys = ("adapter.r", "data.seed", "seed")
    runs = copy_run(only_run(), (dict(zip(keys, p, strict=True)) for p in points), Path("sweep"))
    assert command(monkeypatch, "report", "sweep/shift") == 0
    folder = Path("sweep/shift/report")
    for row in rows_of(folder / "cells.csv"):
        members = [r for r in runs if r.status["cell"] == row["cell"]]
        assert row["n"] == "3"
        assert row["data.seed"] == str(members[0].config["data"]["seed"])
    assert {row["trained at r = k n"] for row in rows_of(folder / "truncation.csv")} == {"0", "6"}
    assert "over seeds and data seeds" in (folder / "index.html").read_text()


@pytest.mark.slow
def test_a_note_names_cells_whose_seeds_draw_nothing(lab: Lab):
    assert lab("shift", "adapter=full", "seed=0,1", "-m") == 0
    assert lab("shift", "seed=0,1", "runs_dir=lora", "-m") == 0
    cells, lora = (cells_of([read_run(r) for r in find_runs(Path(d))]) for d in ("runs", "lora"))
    assert "seed draws nothing" in identical_seeds_note(cells)
    assert "± 0" in cells_table(cells)[1][4]
    assert identical_seeds_note(lora) == ""


def test_theory_has_a_row_for_a_cell_with_its_worst_gap(lab: Lab):
    assert lab("planted_linear", "adapter.r=1", "seed=0,1,2", "-m") == 0
    results = [read_run(run) for run in find_runs(Path("runs"))]
    rows = theory_table(cells_of(results))
    (loss,) = [dict(zip(rows[0], row, strict=True)) for row in rows if "val/loss" in row]
    values = [run.metrics["val/loss"] for run in results]
    predicted = results[0].metrics["theory/val/loss"]
    assert loss["n"] == "3"
    assert loss["measured"] == format_mean_std(statistics.mean(values), statistics.stdev(values))
    worst = max(abs(value - predicted) / predicted for value in values)
    assert float(loss["worst gap"]) == pytest.approx(worst, rel=0.1)
    assert loss["holds"] == "NO"


def test_a_measurement_that_is_no_number_has_a_row_that_does_not_hold():
    checks = [TheoryCheck("val/loss", value, 1.0, 0.0, 2.0) for value in (1.0, float("nan"))]
    measured, theory, _, holds = check_row(checks)
    assert (measured, theory, holds) == ("nan", "1", "NO")


def test_a_run_stopped_by_a_signal_has_the_cause_stopped():
    for error in ("SystemExit: 1", "KeyboardInterrupt: "):
        assert stop_cause({"state": "interrupted", "error": error}) == "stopped"
    assert stop_cause({"state": "failed", "error": "ValueError: x\ny"}) == "ValueError: x"
