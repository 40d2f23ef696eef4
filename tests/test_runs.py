"""Run directories: the state of a run, what a new try keeps, and files after a crash.

Independent truth: how the context was left, and files that the test writes or reads itself.
Run: make test ARGS=tests/test_runs.py
"""

import json
from pathlib import Path

import pytest
from filelock import FileLock

from lora_lab import runs
from lora_lab.runs import Run, RunBusyError, RunFinishedError, find_runs, write_atomic
from lora_lab.training.run_record import record_run


def test_states(tmp_path: Path):
    path = tmp_path / "run"
    with record_run(Run(path), {"a": 1}, seed=3) as run:
        assert run.status["state"] == "running"
        assert run.config == {"a": 1}
        with pytest.raises(RunBusyError), record_run(Run(path), {"a": 1}):
            pass
    assert run.finished
    assert run.status["seed"] == 3
    with pytest.raises(RunFinishedError), record_run(Run(path), {}):
        pass
    assert run.finished
    with pytest.raises(ZeroDivisionError), record_run(Run(path), {}, overwrite=True):
        _ = 1 / 0
    assert run.status["state"] == "failed"
    assert "ZeroDivisionError" in run.status["traceback"]
    with pytest.raises(KeyboardInterrupt), record_run(Run(path), {}):
        raise KeyboardInterrupt
    assert run.status["state"] == "interrupted"
    assert [r.path for r in find_runs(tmp_path)] == [path]


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path: Path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "running"}))
    assert Run(tmp_path).status["state"] == "interrupted"


def test_a_killed_run_in_a_read_only_folder_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Root may write to each folder: that the lock cannot be made anew is acted."""
    (tmp_path / "status.json").write_text(json.dumps({"state": "running"}))
    is_locked = runs._is_locked  # pyright: ignore[reportPrivateUsage]

    class ReadOnly(FileLock):
        def _acquire(self) -> None:
            raise OSError("Read-only file system")

    monkeypatch.setattr(runs, "FileLock", ReadOnly)
    assert Run(tmp_path).status["state"] == "interrupted"
    with FileLock(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")
        assert Run(tmp_path).status["state"] == "running"
    assert Run(tmp_path).status["state"] == "interrupted"


def test_a_new_try_clears_what_the_last_one_left(tmp_path: Path):
    with pytest.raises(OSError, match="full"), record_run(Run(tmp_path), {}) as run:
        (run.path / "adapter").mkdir()
        (run.path / "adapter" / "adapter.json").write_text("{}")
        (run.path / "metrics.jsonl").write_text("{}\n")
        raise OSError("full")
    with record_run(Run(tmp_path), {}):
        assert {p.name for p in tmp_path.iterdir()} == {
            *("config.yaml", "env.json", "status.json", "log.txt", "lock", ".reserve"),
        }
    assert "error" not in run.status


def test_a_last_line_cut_short_is_left_out(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1.0, "a": 2}\n{"epoch": 2.0, "a"')
    assert Run(tmp_path).rows() == [{"epoch": 1.0, "a": 2}]
    assert Run(tmp_path).curve("a") == {1: 2}


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path):
    write_atomic(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"


def test_a_damaged_status_is_a_state(tmp_path: Path):
    (tmp_path / "status.json").write_text("")
    assert Run(tmp_path).status["state"] == "damaged"
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/last.ckpt"):
        assert Run(tmp_path).status["state"] == "damaged"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert Run(tmp_path).status["state"] == "interrupted", "a finished run has no checkpoint"
    (tmp_path / "status.json").unlink()
    assert Run(tmp_path).status == {"state": "interrupted", "error": "status.json is missing"}


def test_runs_behind_links_are_listed_once(tmp_path: Path):
    (tmp_path / "scratch/digits/one").mkdir(parents=True)
    Run(tmp_path / "scratch/digits/one").update_status(state="failed")
    root = tmp_path / "runs"
    root.mkdir()
    (root / "digits").symlink_to("../scratch/digits")
    (root / "again").symlink_to("../scratch/digits")
    (tmp_path / "scratch/digits/up").symlink_to("..")
    assert [run.path.name for run in find_runs(root)] == ["one"]
    assert [run.path.name for run in find_runs(root / "digits")] == ["one"]
