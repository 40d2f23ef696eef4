"""A run whose files have lost something is not believed: it is named, left out, and run again.

Independent truth: each file of a copied finished run, damaged by hand, in each way; the bytes of
all files before a command and after it.

Run: make test ARGS=tests/test_damaged_runs.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_lab import runs as run_directories
from lora_lab.analysis import findings, weight_svd
from lora_lab.cli.analyze import analyze_again
from lora_lab.config.stored_config import checked_config
from lora_lab.console import silence_lightning
from lora_lab.packing.module import PackedModule
from lora_lab.packing.runs import run_pack
from lora_lab.report.cells import cells_of, read_run
from lora_lab.report.summary import unfinished_table
from lora_lab.run_files import file_records, planned_runs
from lora_lab.runs import PREVIOUS, Run, find_runs
from lora_lab.training.modules import BaseModule
from lora_lab.training.run_record import RunDirectoryError, record_run
from tests.conftest import Lab, command, only_run
from tests.copied_runs import as_earlier_version, copy_run
from tests.packing.test_packing import plans_of
from tests.training.test_resume import assert_equal
from tests.training.test_stored_runs import LORA, SETTINGS, STORED

FILES = (
    *("config.yaml", "metrics.jsonl", "spectra.npz", "advice.yaml", "status.json"),
    *("adapter/adapter.json", "adapter/adapter.safetensors"),
)


def cut(content: bytes) -> bytes:
    """Of text, without its last line."""
    return content[: content[:-1].rfind(b"\n") + 1] or content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """With a bit of its middle flipped; in text that bit leaves letters and digits such."""
    middle = len(content) // 2
    middle += next(i for i, byte in enumerate(content[middle:]) if chr(byte).isalnum())
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def end_in_nuls(content: bytes) -> bytes:
    return content[:-20] + bytes(20)


def nuls(content: bytes) -> bytes:
    return bytes(len(content))


FAULTS = {"cut": cut, "flip": flip, "NULs at its end": end_in_nuls, "NULs": nuls}
FAULTS |= {"empty": lambda _: b"", "missing": None}


def damage(file: Path, fault: str) -> None:
    if (change := FAULTS[fault]) is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


@pytest.fixture
def run(elsewhere: None) -> Run:
    """A finished run, beside another one of its cell that stays as it is."""
    shutil.copytree(STORED, ".", dirs_exist_ok=True)
    for other in Path("runs/planted_linear").glob("full*"):
        shutil.rmtree(other)
    run = only_run()
    run.update_status(files=file_records(run.path))
    copy_run(run, [{"seed": 1}], Path("runs"))
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a run but its report."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {file: file.read_bytes() for file in files if "report" not in file.parts}


def assert_not_believed(
    run: Run, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command uses the run, each names the file, and none writes to it."""
    # Composing the command that repeats the best run takes most of the time.
    monkeypatch.setattr("lora_lab.config.compose.train_command", lambda *_: None)
    before, path = contents(run.path), str(run.path)
    (other,) = [other for other in find_runs(Path("runs")) if other.path != run.path]
    capsys.readouterr()
    for arguments, code in {
        ("ls",): 0,
        ("best", "--shown=1"): 0,
        ("report", path): 2,
        ("diff", path, str(other.path)): 2,
        ("analyze", path): 2,
        ("analyze", path, str(other.path)): 2,
        ("export", path, "exported"): 2,
        ("reproduce", path): 2,
    }.items():
        assert command(monkeypatch, *arguments) == code, arguments
        printed = capsys.readouterr()
        shown = " ".join((printed.out + printed.err).split())
        assert "damaged" in shown, arguments
        assert f"{path}: {file} " in shown or f"{path} is damaged: {file} " in shown, shown
        if arguments[0] == "best":
            assert f"best run {other.path}" in shown
            assert " 1 " in shown.partition("max")[2].partition("best run")[0]
    each_run = [checked_config(Run(each.path)) for each in (run, other)]
    results = [read_run(each, in_full=("spectra.npz",)) for each in each_run]
    assert [result.state for result in results] == ["damaged", "finished"]
    assert results[0].cause.startswith(f"{file} ")
    (row,) = unfinished_table(results, Path("runs"))[1:]
    assert row[1:3] == [run.path.name, "damaged"]
    assert [result for cell in cells_of(results) for result in cell.finished] == results[1:]
    assert contents(run.path) == before
    assert not Path("exported").exists()
    assert not Path("reproduced").exists()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    file: str,
    fault: str,
):
    damage(run.path / file, fault)
    assert_not_believed(run, file, monkeypatch, capsys)
    damaged = {file.relative_to(run.path): text for file, text in contents(run.path).items()}
    config = {"seed": 0}
    with record_run(run, config):
        assert f"the run is damaged ({file} " in caplog.text
        kept = run.path / PREVIOUS
        assert {file.relative_to(kept): text for file, text in contents(kept).items()} == damaged
    assert run.finished
    assert Run(run.path).config == config


@pytest.mark.parametrize(
    ("faults", "named"),
    [
        ({"metrics.jsonl": "flip", "adapter/adapter.json": "missing"}, "adapter/adapter.json is m"),
        ({"config.yaml": "flip", "spectra.npz": "missing"}, "config.yaml was"),
        ({"spectra.npz": "cut", "metrics.jsonl": "cut"}, "metrics.jsonl is cut"),
    ],
)
def test_of_several_damaged_files_the_config_is_named_or_one_that_is_missing(
    run: Run, faults: dict[str, str], named: str
):
    for file, fault in faults.items():
        damage(run.path / file, fault)
    assert run.status["error"].startswith(named)


@pytest.mark.parametrize(
    ("file", "text"), [("config.yaml", "a: [\n"), ("status.json", "[]"), ("status.json", "{}")]
)
def test_a_file_of_another_kind(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str,
):
    (run.path / file).write_text(text)
    assert_not_believed(run, file, monkeypatch, capsys)


@pytest.mark.parametrize("file", ["metrics.jsonl", "adapter/adapter.safetensors"])
def test_the_same_command_trains_it_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
):
    good = (run.path / "metrics.jsonl").read_bytes()
    damage(run.path / file, "cut")
    assert command(monkeypatch, "train", *SETTINGS) == 0
    assert f"the run is damaged ({file} is cut: " in capsys.readouterr().out
    rows = [json.loads(line) for line in good.splitlines()]
    assert run.last("val/loss") == pytest.approx(max(rows, key=lambda r: r["step"])["val/loss"])
    assert run.check()["state"] == "finished"


def test_a_large_file_is_compared_where_it_is_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("lora_lab.run_files.SMALL", 10)
    damage(run.path / "adapter" / "adapter.safetensors", "flip")
    damage(run.path / "spectra.npz", "flip")
    assert run.finished
    assert read_run(run, in_full=("spectra.npz",)).state == "damaged"
    for arguments in (("analyze", str(run.path)), ("export", str(run.path), "exported")):
        assert command(monkeypatch, *arguments) == 2
        assert "spectra.npz was changed" in capsys.readouterr().err
    shutil.copy(STORED / "runs/planted_linear" / LORA / "spectra.npz", run.path)
    assert command(monkeypatch, "export", str(run.path), "exported") == 2
    assert "adapter/adapter.safetensors was changed" in capsys.readouterr().err


EARLIER = {
    "config.yaml": ("NULs at its end", "NULs", "empty", "missing"),
    "metrics.jsonl": ("NULs at its end", "NULs", "empty", "missing"),
    "spectra.npz": ("cut", "NULs at its end", "NULs", "empty"),
    "adapter/adapter.safetensors": ("cut", "NULs", "empty"),
}
"""What can be told where there is no checksum: a row that is missing cannot."""


@pytest.mark.parametrize("file", EARLIER)
def test_what_can_be_told_of_a_run_of_an_earlier_version(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
):
    as_earlier_version(run)
    good = (run.path / file).read_bytes()
    for fault in EARLIER[file]:
        assert run.check()["state"] == "finished"
        damage(run.path / file, fault)
        assert command(monkeypatch, "ls") == 0
        assert f"damaged {run.path}: {file} " in " ".join(capsys.readouterr().out.split())
        (run.path / file).write_bytes(good)


def test_a_config_changed_by_hand_in_a_run_of_an_earlier_version(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    as_earlier_version(run)
    text = (run.path / "config.yaml").read_text()
    assert "alpha: 8" in text
    (run.path / "config.yaml").write_text(text.replace("alpha: 8", "alpha: 16"))
    assert_not_believed(run, "config.yaml", monkeypatch, capsys)
    (run.path / "config.yaml").write_text(text.replace("runs_dir: runs", "runs_dir: other"))
    assert command(monkeypatch, "ls") == 0
    assert "damaged" not in capsys.readouterr().out, "the folder is not of the identity"


def test_a_list_of_planned_runs_that_is_cut(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    planned = run.path.parent / "planned.json"
    planned.write_text('{"a": ["adapter.r=1"], "b"')
    assert command(monkeypatch, "report", "runs") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"damaged {planned} cannot be read" in shown
    assert "2 finished, 1 damaged" in shown
    assert command(monkeypatch, "train", "-m", *SETTINGS) == 0
    assert list(planned_runs(planned.parent)) == [run.path.name]
    planned.write_text(planned.read_text().replace(run.path.name, "r3-of-nobody"))
    assert command(monkeypatch, "report", "runs") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"damaged {planned} was changed after its multirun" in shown
    assert "r3-of-nobody" not in shown


@pytest.mark.parametrize("fault", FAULTS)
def test_an_environment_that_was_changed_is_told_and_damages_no_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
):
    (other,) = [other for other in find_runs(Path("runs")) if other.path != run.path]
    damage(run.path / "env.json", fault)
    assert run.check()["state"] == "finished"
    assert command(monkeypatch, "diff", str(run.path), str(other.path)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert any(f"env.json {how}" in shown for how in ("is cut", "was changed", "is missing"))


def test_an_analysis_that_is_stopped_while_it_writes_leaves_whole_files(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    """After each number of writes: status.json, the two files, status.json again."""
    new = {"spectra.npz": b"new spectra", "metrics.jsonl": b'{"step": 1}\n', "advice.yaml": None}
    write, copy = run_directories.write_atomic, run
    for writes in range(5):
        copy = Run(Path("copies") / str(writes))
        shutil.copytree(run.path, copy.path)
        left = [None] * writes

        def write_or_stop(path: Path, content: str | bytes, left: list[None] = left) -> None:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            write(path, content)

        monkeypatch.setattr(run_directories, "write_atomic", write_or_stop)
        if writes < 4:
            with pytest.raises(KeyboardInterrupt):
                copy.replace_files(new)
        else:
            copy.replace_files(new)
        assert copy.check()["state"] == "finished", writes
    assert copy.rows() == [{"step": 1}]
    assert not (copy.path / "advice.yaml").exists()
    (copy.path / "spectra.npz").write_bytes((run.path / "spectra.npz").read_bytes())
    assert not copy.finished, "the old file is not right any more"


def flip_number(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def lose_checksum(path: Path) -> None:
    path.with_suffix(".json").unlink()


@pytest.mark.parametrize(
    ("adapter", "damages"),
    [("lora", (flip_number, cut_file)), ("full", (flip_number, cut_file, lose_checksum))],
)
def test_a_damaged_base_is_not_analyzed_against(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
    damages: tuple,
):
    assert lab("planted_linear", f"adapter={adapter}", "spectra.truncation=none") == 0
    run, (base,) = only_run(), Path("bases").glob("*.safetensors")
    shutil.copytree("bases", "good")
    before = contents(run.path)
    for damage_base in damages:
        damage_base(base)
        assert command(monkeypatch, "analyze", str(run.path)) == 2
        assert f"the base {base} is damaged (" in capsys.readouterr().err
        assert contents(run.path) == before
        shutil.rmtree("bases")
        shutil.copytree("good", "bases")
    analyze_again(run, Console(quiet=True))
    assert contents(run.path) != before
    assert run.check()["state"] == "finished"


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "missing"])
def test_a_damaged_svd_of_a_weight_is_computed_again(caplog: pytest.LogCaptureFixture, fault: str):
    W = torch.randn(6, 4)
    weight_svd.svd_of_weight(W, Path("bases"))
    (file,) = Path("bases/svd").glob("*")
    good = file.read_bytes()
    damage(file, fault)
    svd = weight_svd.svd_of_weight(W, Path("bases"))
    assert f"the SVD in {file} is damaged" in caplog.text
    torch.testing.assert_close((svd.U * svd.S @ svd.Vh).float(), W)
    assert file.read_bytes() == good


def test_a_directory_that_is_removed_while_its_run_trains(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = BaseModule.training_step

    def remove(module: BaseModule, *args: Any):
        if runs := find_runs(Path("runs")):
            shutil.rmtree(runs[0].path)
        return real(module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BaseModule, "training_step", remove)
        assert lab("planted_linear", "checkpoint_every=0") == 1
    status = only_run().status
    assert status["state"] == "failed"
    assert "was removed while the run trained" in status["error"]
    assert status["cell"].startswith("r")
    capsys.readouterr()
    assert lab("planted_linear") == 0
    assert only_run().check()["state"] == "finished"


def test_a_run_that_begins_in_the_place_of_a_removed_one_keeps_its_files(tmp_path: Path):
    run = Run(tmp_path / "run")
    other = record_run(run, {"a": 2})
    with pytest.raises(RunDirectoryError), record_run(run, {"a": 1}):
        shutil.rmtree(run.path)
        other.__enter__()
    assert run.status["state"] == "running"
    assert Run(run.path).config == {"a": 2}
    other.__exit__(None, None, None)
    assert run.check()["state"] == "finished"


@pytest.mark.parametrize("stage", ["training", "analysis"])
def test_the_other_runs_of_a_pack_finish(monkeypatch: pytest.MonkeyPatch, stage: str):
    silence_lightning()
    removed, *others = plans_of("planted_linear", [[f"seed={seed}"] for seed in range(3)])

    def remove(function: Callable[..., Any]) -> Callable[..., Any]:
        left = [removed.path]

        def removing(*arguments: Any) -> Any:
            if left:
                shutil.rmtree(left.pop())
            return function(*arguments)

        return removing

    place, name = {
        "training": (PackedModule, "training_step"),
        "analysis": (findings, "analyze"),
    }[stage]
    monkeypatch.setattr(place, name, remove(getattr(place, name)))
    error, *none = run_pack([removed, *others], Console(quiet=True))
    assert isinstance(error, RunDirectoryError | FileNotFoundError)
    assert none == [None, None]
    assert Run(removed.path).status["state"] == "failed"
    for plan in others:
        assert Run(plan.path).check()["state"] == "finished"


@pytest.mark.parametrize(
    "settings",
    [
        ("planted_linear",),
        ("planted_linear", "checkpoint_every=0"),
        ("shift", "trainer.max_steps=13", "adapter.dropout=0.3"),
        pytest.param(
            ("shift", "early_stopping={metric: val/loss, patience: 1}", "trainer.max_epochs=40"),
            marks=pytest.mark.slow,
        ),
        ("shift", "adapter=full", "select=best val/loss"),
    ],
)
def test_a_failure_after_the_last_step_keeps_what_was_trained(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
):
    """Also where training was too short for a checkpoint, and where it ends within an epoch."""
    assert lab(*settings, "runs_dir=alone") == 0

    def fail(*args: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.analysis.findings.analyze", fail)
        assert lab(*settings) == 1
        assert only_run().status["state"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(BaseModule, "training_step", fail)
        assert lab(*settings) == 0
    assert_equal(only_run(), only_run("alone"))
    assert not (only_run().path / "checkpoints").exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("a bug")])
def test_a_run_ends_though_its_disk_has_no_room_for_a_checkpoint_of_its_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", fail)
    is_of_disk = isinstance(error, OSError)
    assert lab("planted_linear") == (0 if is_of_disk else 1)
    log = (only_run().path / "log.txt").read_text()
    assert (f"no checkpoint of the end of training: {error}" in log) == is_of_disk


def test_a_report_that_fails_is_written_by_the_same_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (run.path / "report").mkdir()
    (run.path / "report" / "table.md").write_text("a kill left this alone")

    def fail(*args: object) -> None:
        raise RuntimeError("no such font")

    with monkeypatch.context() as patch:
        patch.setattr("lora_lab.report.run.write_figures", fail)
        assert command(monkeypatch, "train", *SETTINGS, "figures=true") == 1
    assert "the run is finished, its report failed: RuntimeError: no such font" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run.finished
    assert command(monkeypatch, "train", *SETTINGS) == 0
    assert run.has_report
    assert "| epoch |" in (run.path / "report" / "table.md").read_text()
