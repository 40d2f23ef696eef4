"""Reports from run directories alone."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.runs import find_runs
from tests.conftest import Lab, command, only_run


def kept(run: Path) -> dict[str, bytes]:
    """A report's files but for PDFs, which hold their date, and table.md, which names the run."""
    files = (run / "report").iterdir()
    return {p.name: p.read_bytes() for p in files if p.suffix in (".png", ".csv")}


def test_a_report_needs_the_run_directory_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("digits", "figures=true")
    run = only_run()
    shown = capsys.readouterr().out
    before = kept(run.path)
    moved = Path("moved")
    shutil.move(run.path, moved)
    shutil.rmtree("runs")
    shutil.rmtree("bases")
    shutil.rmtree(moved / "report")
    assert command(monkeypatch, "report", "moved") == 0
    again = capsys.readouterr().out
    assert again.split("figures")[0].strip() in shown
    assert kept(moved) == before
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
    made = Path("runs/shift/report")
    losses: dict[str, list[float]] = {}
    for run in find_runs(Path("runs")):
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
        if run.finished:
            last = next(row["val/loss"] for row in reversed(rows) if "val/loss" in row)
            losses.setdefault(run.status["cell"], []).append(last)
    with (made / "cells.csv").open() as file:
        table = {row["cell"]: row for row in csv.DictReader(file)}
    assert set(table) == set(losses)
    for cell, own in losses.items():
        center, *spread = table[cell]["val/loss"].split(" ± ")
        assert int(table[cell]["runs"]) == len(own)
        assert float(center) == pytest.approx(statistics.mean(own), rel=1e-4)
        if len(own) > 1:
            assert float(spread[0]) == pytest.approx(statistics.stdev(own), rel=1e-4)
    best = min(losses, key=lambda cell: statistics.mean(losses[cell]))
    (bold,) = [line for line in (made / "report.md").read_text().splitlines() if "**" in line]
    assert bold.startswith(f"| shift | {best} |")
    tex = (made / "cells.tex").read_text()
    assert r"\toprule" in tex
    assert tex.count(r"\textbf{") == 1
    assert tex.count(r"$\pm$") == 3
    with (made / "not_finished.csv").open() as file:
        (failed,) = csv.DictReader(file)
    assert failed["status"] == "failed"
    assert "DivergedError" in failed["cause"]
    assert failed["run"] in shown
    assert (made / "rank.png").stat().st_size > 5000
    with (made / "truncation.csv").open() as file:
        cut = {int(row["k"]): row for row in csv.DictReader(file)}
    assert sorted(cut) == [0, 1, 2, 3]
    assert float(cut[3]["cut from the largest r"].split()[0]) == pytest.approx(
        float(cut[3]["trained at r = k"].split()[0]), rel=1e-4
    )


def test_runs_that_differ_in_more_than_r_are_not_averaged(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    """And one whose files are damaged leaves the others theirs."""
    assert lab("planted_linear", "adapter=lora,lora_fa", "adapter.r=1,2", "-m") == 0
    assert lab("shift") == 0
    assert lab("shift", "seed=1") == 0
    damaged = next(r for r in find_runs(Path("runs/shift")) if r.status["seed"] == 1)
    (damaged.path / "spectra.npz").write_bytes(b"PK\x03\x04 cut")
    assert command(monkeypatch, "report", "runs") == 0
    with Path("runs/report/truncation.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {f"planted_linear, trains={trains}" for trains in ("both", "zero")}
    assert {row["series"] for row in rows} == names
    for run in find_runs(Path("runs/planted_linear")):
        series = f"planted_linear, trains={run.config['adapter']['trains']}"
        (row,) = [
            row
            for row in rows
            if (row["series"], row["k"]) == (series, str(run.config["adapter"]["r"]))
        ]
        assert float(row["trained at r = k"]) == pytest.approx(run.last("val/loss"), rel=1e-4)
    with Path("runs/report/not_finished.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["run"], row["status"]) == (damaged.path.name, "damaged")
    assert not Path("runs/report/rank.png").exists(), "two experiments have no common axis"
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
        said = run.last("theory/val/loss")
        assert float(loss["theory"]) == pytest.approx(said, rel=1e-4)
        assert float(loss["measured"]) == pytest.approx(run.last("val/loss"), rel=1e-4)
        gap = (run.last("val/loss") - said) / said  # pyright: ignore
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
    assert [line.split()[0] for line in shown.splitlines()[3:-1]] == [
        *("interrupted", "finished", "failed", "damaged"),
    ]
    done = next(r for r in find_runs(Path("runs")) if r.finished)
    assert f"{done.last('val/loss'):.5g}" in shown


@pytest.mark.parametrize("arguments", [("ls", "nowhere"), ("report", "nowhere")])
def test_what_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
):
    assert command(monkeypatch, *arguments) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["ls", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    program = (
        "import sys; from lora_lab import cli; sys.argv[1:] = sys.argv[1:]\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'hydra', 'wandb', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: lora-lab" in done.stdout
