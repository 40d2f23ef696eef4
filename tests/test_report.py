"""Reports from run directories alone."""

import csv
import shutil
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
