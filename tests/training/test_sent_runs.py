"""Runs that were sent or archived are read where they lie: read-only, and from any folder.

Independent truth: the bytes of all files before and after; what the same commands write of the runs
in the folder that they were started in.

Run: make test ARGS=tests/training/test_sent_runs.py
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lora_lab.report import run as run_report
from lora_lab.report import sweep
from lora_lab.run_files import file_records
from lora_lab.runs import Run
from tests.conftest import command
from tests.training.test_stored_runs import FULL, LORA, STORED

SENT = Path("sent")
RUNS = SENT / "runs" / "planted_linear"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time."""
    monkeypatch.setattr(run_report, "write_figures", lambda *_: [])
    monkeypatch.setattr(sweep, "_figures", lambda *_: {})


@pytest.fixture
def sent(elsewhere: None) -> Path:
    """The stored runs and their base in a folder beside the current one."""
    shutil.copytree(STORED, SENT)
    (SENT / "bases").mkdir()
    for name in (LORA, FULL):
        run = Run(RUNS / name)
        run.update_status(files=file_records(run.path))
    return SENT


@pytest.fixture
def read_only(sent: Path) -> Iterator[Path]:
    """The same on a read-only mount; it is made by root alone."""
    folder = str(sent.absolute())
    steps = (["--bind", folder, folder], ["-o", "remount,bind,ro", folder])
    if any(subprocess.run(["mount", *step], capture_output=True).returncode for step in steps):
        subprocess.run(["umount", folder], capture_output=True)
        pytest.skip("no read-only mount can be made here")
    yield sent
    subprocess.run(["umount", folder], check=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


COMMANDS = {
    "ls": ("ls", "sent/runs"),
    "best": ("best", "sent/runs"),
    "diff": ("diff", str(RUNS / LORA), str(RUNS / FULL)),
    "report of a run": ("report", str(RUNS / LORA), "--to=to"),
    "report of runs": ("report", "sent/runs", "--to=to"),
    "peft": ("export", str(RUNS / LORA), "to"),
    "merged": ("export", str(RUNS / LORA), "to", "--format=merged"),
    "full": ("export", str(RUNS / FULL), "to", "--format=merged"),
    "analyze": ("analyze", str(RUNS / LORA)),
    "analyze --to": ("analyze", str(RUNS / FULL), "--to=to"),
    "compare": ("analyze", str(RUNS / LORA), str(RUNS / FULL), "--to=to"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_reading_writes_nothing_beside_the_runs(
    read_only: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    before = contents(read_only)
    assert not os.access(read_only, os.W_OK)
    assert command(monkeypatch, *arguments) == 0
    assert contents(read_only) == before
    writes = {"to"} if arguments[-1] == "--to=to" or arguments[0] == "export" else set()
    writes |= {"analysis"} if arguments[0] == "analyze" and not writes else set()
    assert {path.name for path in Path().iterdir()} == {"sent", *writes}


def test_a_report_of_a_read_only_run_says_where_to(
    read_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for path in (RUNS / LORA, RUNS):
        assert command(monkeypatch, "report", str(path)) == 2
        assert f"{path} cannot be written to: --to DIR" in " ".join(capsys.readouterr().err.split())


def test_a_copy_has_the_analysis_and_nothing_else(sent: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(RUNS / LORA)
    (run.path / "notes.md").write_text("mine")
    (run.path / "log.txt").symlink_to(Path("secret").absolute())
    Path("secret").write_text("secret")
    before = contents(run.path)
    assert command(monkeypatch, "analyze", str(run.path), "--to=copies") == 0
    assert contents(run.path) == before
    copy = Run(Path("copies") / LORA)
    assert copy.check()["state"] == "finished"
    assert copy.rows()[:-1] == run.rows()
    assert not {"notes.md", "log.txt"} & {path.name for path in copy.path.iterdir()}
    with np.load(run.path / "spectra.npz") as old, np.load(copy.path / "spectra.npz") as new:
        np.testing.assert_allclose(new["linear/S"], old["linear/S"], rtol=1e-5)
    assert command(monkeypatch, "analyze", str(run.path), "--to=copies") == 2


TRAINED = {"method": "train", "epochs": 1, "seed": 0}
TRAINED |= {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1}}
TRAINED["optimizer"] |= {"schedule": "constant", "warmup": 0}


@pytest.mark.parametrize("base", ["checkpoint", "trained"])
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_run_alone_finds_its_base_by_its_hash(
    sent: Path,
    base: str,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run = Run(RUNS / LORA)
    if base == "trained":
        (run.path / "config.yaml").write_text(yaml.safe_dump(run.config | {"base": TRAINED}))
        run.update_status(files=file_records(run.path))
    else:
        words = ("export", str(run.path), "there", f"--format={format}")
        assert command(monkeypatch, *words) == 0
    shutil.move(run.path, "alone")
    Path("kept").mkdir()
    shutil.move(sent / "base.safetensors", "kept/renamed.safetensors")
    weights = load_file("kept/renamed.safetensors")
    (Path("kept") / "a.safetensors").write_bytes(b"no base")
    words = ("export", "alone", "here", f"--format={format}")
    capsys.readouterr()
    assert command(monkeypatch, *words) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "--bases DIR names the folder that has it" in shown
    assert command(monkeypatch, *words, "--bases=kept") == 0
    (written,) = Path("here").glob("*.safetensors")
    if base == "checkpoint":
        assert written.read_bytes() == (Path("there") / written.name).read_bytes()
    if format == "merged":
        merged = load_file(written)
        assert merged.keys() == weights.keys()
