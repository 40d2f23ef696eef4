"""Whatever W&B does, a run finishes, and one line says what W&B lacks of it.

Truth: what a loopback server that fails on purpose has kept (tests/wandb_server.py), full disks
(small file systems in memory, which only root can mount), and the files of runs.

Run: make test ARGS=tests/tracking/test_wandb_faults.py
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb

from lora_lab.runs import Run, RunFinishedError, find_runs
from lora_lab.tracking import wandb_run, wandb_service
from lora_lab.tracking.wandb_run import Server, WandbRun
from lora_lab.training.run_record import RESERVE, record_run
from tests.conftest import Lab, only_run
from tests.tracking.test_tracking import use_server
from tests.wandb_server import WandbServer

ROWS = 20 + 4
"""Rows that W&B is to have: those of metrics.jsonl, the cost, two charts, pictures with a table."""


@contextmanager
def failing_server(
    monkeypatch: pytest.MonkeyPatch, fault: str | int, rows: int = 8
) -> Iterator[WandbServer]:
    """A server that fails when a run logs more than `rows` rows; its client soon gives up.

    With 0 rows it fails from the start, for processes that this one starts too.
    """
    log_metrics = WandbRun.log_metrics

    def log_and_fail(run: WandbRun, metrics: Any, step: int | None = None) -> None:
        log_metrics(run, metrics, step)
        if run.rows > rows:
            server.fault = fault

    with WandbServer() as server:
        use_server(monkeypatch, server)
        monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.05")
        monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
        monkeypatch.setattr(wandb_run, "ANSWER_TIMEOUT", 1)
        monkeypatch.setattr(wandb_run, "LAST_ROW_TIMEOUT", 1)
        monkeypatch.setattr(wandb_run, "GRACE", 0.5)
        monkeypatch.setattr(WandbRun, "log_metrics", log_and_fail)
        server.fault = None if rows else fault
        yield server
        server.fault = None


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Within it `folder` is a file system of `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def is_complete(run: Run) -> bool:
    """Whether the run is finished and has its files."""
    files = ("spectra.npz", "advice.yaml", "adapter/adapter.safetensors")
    present = all((run.path / file).exists() for file in files)
    return run.finished and present and len(run.rows()) == ROWS - 4


FAULTS = [500, "hang", "ArtifactType"]
FAULTS += [pytest.param(fault, marks=pytest.mark.slow) for fault in (429, 404, "dead")]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_in_mid_run_fails_no_run(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str | int,
):
    with failing_server(monkeypatch, fault) as server:
        assert lab("shift", "tracking.finish_timeout=1", tracking="online") == 0
        run, (served,) = only_run(), server.runs.values()
        assert is_complete(run)
        out = capsys.readouterr().out
        assert out.count("W&B'S SERVER TOOK") == 1
        assert "W&B'S SERVER TOOK" in (run.path / "log.txt").read_text()
        assert "Traceback" not in out
        if fault in ("hang", "dead"):  # it does not say either
            assert f"TOOK AN UNKNOWN NUMBER OF {ROWS} ROWS" in run.status["wandb_error"]
        else:
            assert f"TOOK {len(served.history)} OF {ROWS} ROWS" in run.status["wandb_error"]
            assert run.status["wandb_rows_lost"] == ROWS - len(served.history) > 0


def test_a_process_of_wandbs_that_does_not_start_fails_no_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """W&B 0.31 waits for ever where its process dies as it starts."""
    monkeypatch.setattr(wandb, "setup", lambda *_: threading.Event().wait())
    monkeypatch.setattr(wandb_service, "_problem", "")
    monkeypatch.setattr(wandb_service, "START_TIMEOUT", 0.1)
    for seed in (0, 1):
        assert lab("shift", f"seed={seed}", tracking="offline") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "W&B HOLDS NOTHING of this run (its process did not start in 0.1 s)" in out
    assert all(is_complete(run) for run in find_runs(Path("runs")))


KILLED = """
import os, pathlib, signal, sys, time
from lora_lab.tracking import wandb_run, wandb_service
assert wandb_service.start() == ""
run = wandb_run.WandbRun(wandb_run.wandb.init(mode="offline"), 4)
def is_service(folder):
    return "wandb-core" in (folder / "cmdline").read_text() and \\
        (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
(service,) = filter(is_service, [p for p in pathlib.Path("/proc").glob("[0-9]*") if p.exists()])
for step in range(6):
    if sys.argv[1:] == [str(step)]:
        os.kill(int(service.name), signal.SIGKILL)
        time.sleep(0.5 * (step % 2))
    run.log_metrics({"a": 1.0}, step)
if "end" in sys.argv:
    os.kill(int(service.name), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["0", "1", "4", "5", "end"])
def test_a_killed_process_of_wandbs_shows_no_traceback_at_the_end(moment: str):
    command = [sys.executable, "-c", KILLED, moment]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr


def test_what_is_ours_is_on_disk_before_wandb_is_sent_the_result(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    complete = []

    finish = wandb.Run.finish

    def refuse(*_: object, **__: object) -> None:
        complete.append(is_complete(only_run()))
        raise RuntimeError("anything at all")

    def finish_and_refuse(run: wandb.Run, exit_code: int) -> None:
        finish(run, exit_code)
        refuse()

    monkeypatch.setattr(wandb.Run, "log_artifact", refuse)
    monkeypatch.setattr(wandb.Run, "finish", finish_and_refuse)
    monkeypatch.setattr(wandb_run, "LAST_ROW_TIMEOUT", 0.5)
    assert lab("shift", tracking="offline") == 0
    assert all(complete)
    for what in ("adapter", "end"):
        assert f"{what}: RuntimeError: anything at all" in only_run().status["wandb_error"]


def test_the_server_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Of several runs that are online when it fails, as in a pack, the first alone waits."""
    with failing_server(monkeypatch, 500, rows=0):
        started = [_start(tmp_path, timeout=1) for _ in range(3)]
        seconds = [_seconds(run.finish, 0) for run in started]
    assert seconds[0] >= 1
    assert all(s < 1 for s in seconds[1:])
    assert all("end" in run.errors for run in started)
    # And another process of the multirun, which has waited for nothing.
    Server.failure_file = tmp_path / "sweep" / "failed"
    Server.fail(1)
    Server.waited = 0
    assert Server.has_failed()


def _start(directory: Path, timeout: float) -> WandbRun:
    settings = wandb.Settings(silent=True, console="off", finish_timeout=timeout)
    settings.finish_timeout_raises = True
    run = wandb.init(mode="online", dir=directory, reinit="create_new", settings=settings)
    started = WandbRun(run, timeout)
    started.log_metrics({"a": 1.0}, 0)
    return started


def _seconds(function, *arguments) -> float:
    began = time.monotonic()
    function(*arguments)
    return time.monotonic() - began


def test_a_full_disk_is_told_in_status_and_log(tmp_path: Path):
    path = tmp_path / "disk" / "run"
    with small_disk(path.parent, "300k"):
        with pytest.raises(OSError, match="No space left"), record_run(Run(path), {}):
            (path / "model").write_bytes(bytes(1_000_000))
        assert Run(path).status["error"] == "OSError: [Errno 28] No space left on device"
        assert "No space left" in (path / "log.txt").read_text()
        assert not [*path.glob(".*.part"), *path.glob(RESERVE)]
        # So full that not even the reserve can be written: all stays as it was.
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(OSError, match="No space left"):
            (path.parent / "other").write_bytes(bytes(1_000_000))
        with pytest.raises(OSError, match="No space left"), record_run(Run(path), {}):
            pass
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_ctrl_c_while_wandb_is_waited_for_leaves_a_finished_run(tmp_path: Path):
    @contextmanager
    def stopped() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), record_run(Run(tmp_path), {}, last=stopped()):
        pass
    assert Run(tmp_path).finished
    with pytest.raises(RunFinishedError), record_run(Run(tmp_path), {}):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "packed"])
def test_a_sweep_waits_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], launcher: str
):
    with failing_server(monkeypatch, 500, rows=0):
        seeds = "seed=0,1,2", f"hydra/launcher={launcher}", "tracking.finish_timeout=15"
        seconds = _seconds(lambda: lab("shift", "-m", *seeds, tracking="online"))
        assert 15 < seconds < 30
    assert all(is_complete(run) for run in find_runs(Path("runs")))
    assert "lacks rows of" in capfd.readouterr().out
    assert not Path("runs/.sweeps").exists()


@pytest.mark.slow
def test_a_server_that_comes_back_gets_everything(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    with failing_server(monkeypatch, 500) as server:
        monkeypatch.setattr(WandbRun, "finish", _healing(server, WandbRun.finish))
        assert lab("shift", "tracking.finish_timeout=60", tracking="online") == 0
        (served,) = server.runs.values()
        assert len(served.history) == ROWS
        assert "wandb_error" not in only_run().status


def _healing(server: WandbServer, finish):
    def finish_with_a_healthy_server(run: WandbRun, exit_code: int) -> dict:
        server.fault = None
        return finish(run, exit_code)

    return finish_with_a_healthy_server


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "16k", "64k"])
def test_wandbs_folder_alone_on_a_full_disk(lab: Lab, monkeypatch: pytest.MonkeyPatch, size: str):
    monkeypatch.delenv("WANDB_DATA_DIR")
    with small_disk(Path("runs/shift/wandb"), size):
        assert lab("shift", tracking="offline") == 0
        assert is_complete(only_run())
        assert only_run().status["wandb_rows_lost"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("size", ["100k", "200k", "300k"])
def test_a_sweep_on_a_full_disk_names_the_cause(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], size: str
):
    disk = Path("disk").absolute()
    with small_disk(disk, size):
        monkeypatch.chdir(disk)
        assert lab("shift", "-m", "seed=0,1,2", tracking="offline") == 1
        monkeypatch.chdir(disk.parent)
        printed = capfd.readouterr()
        _, _, table = printed.out.partition(" status ")
        assert "No space left on device" in table
        assert "Traceback" not in printed.out + printed.err
        assert not [*disk.rglob("*.part"), *disk.rglob(RESERVE), *disk.glob("runs/.sweeps")]
