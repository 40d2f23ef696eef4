"""W&B's server {answers 500, 429, not at all, dies, comes back}, and W&B's own process is killed.

Whatever happens, the run ends finished with its numbers on disk, those of a run without W&B. Where
W&B lacks rows of it, the run's output and its status.json say so.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lora_lab.runs import Run, find_runs
from tests.faults.commands import SHIFT, Command, copy, fork, processes_of, spawn
from tests.faults.results import compare_with_undisturbed
from tests.faults.trial import Trial
from tests.tracking.test_tracking import as_metrics_row, wandb_content
from tests.wandb_server import WandbServer

WORKERS = 4
"""Most of the time is spent waiting for the server."""

SETTINGS = ("train", *SHIFT, "trainer.max_epochs=60")
ENVIRONMENT = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.05"}
FAULTS: dict[str, str | int] = {"500": 500, "429": 429, "hang": "hang", "dies": "dead"}
MOMENTS = {"at the start": 0, "after some rows": 10, "in mid-run": 40}
"""Rows of the run that the server has when it begins to fail, or W&B's process is killed."""


def prepare(folder: Path) -> None:
    """Runs what nothing happens to."""
    for name in ("undisturbed", "empty"):
        (folder / name).mkdir()
    assert fork(*SETTINGS, folder=folder / "undisturbed").wait().code == 0


def faults(folder: Path, draws: random.Random) -> Iterator[Callable[[], Trial]]:
    """Every trial of this kind."""
    for moment in MOMENTS:
        for fault in FAULTS:
            for comes_back in (False, True) if moment != "after some rows" else ():
                yield partial(failing_server, folder, fault, moment, comes_back)
        for mode in ("online", "offline"):
            yield partial(killed_service, folder, mode, moment)


def failing_server(folder: Path, fault: str, moment: str, comes_back: bool) -> Trial:
    """A run whose server begins to fail, and is well again 2 seconds later where it comes back."""
    name = f"W&B's server: {fault}{', comes back' * comes_back}"
    trial, tree = Trial(name, moment), copy(folder / "empty", "tracked")
    with WandbServer() as server:
        command = _start(tree, server, "online")
        _wait_for_rows(command, server, MOMENTS[moment])
        server.fault = FAULTS[fault]
        if comes_back:
            time.sleep(2)
            server.fault = None
        result = trial.read(command.wait())
        trial.expect(result.code == 0, "wrong end", f"exit code {result.code}")
        compare_with_undisturbed(trial, tree, folder / "undisturbed")
        for run in find_runs(tree / "runs"):
            _expect_loss_said(trial, run, result.output, _rows_on_server(server))
    return trial


def killed_service(folder: Path, mode: str, moment: str) -> Trial:
    """A run whose W&B process, to which W&B's client hands all rows, is killed."""
    trial, tree = Trial(f"kill of W&B's process: {mode}", moment), copy(folder / "empty", "tracked")
    with WandbServer() as server:
        command = _start(tree, server, mode)
        end = time.monotonic() + 60
        if mode == "online":
            _wait_for_rows(command, server, MOMENTS[moment])
        while not (services := processes_of(command.mark, "wandb-core")):
            if time.monotonic() > end:
                break
            time.sleep(0.005)
        if mode == "offline":
            while time.monotonic() < end and _rows_on_disk(tree) < MOMENTS[moment]:
                time.sleep(0.005)
        trial.expect(bool(services), "wrong end", "W&B's process was not seen")
        for service in services:
            os.kill(service, signal.SIGKILL)
        result = trial.read(command.wait())
        trial.expect(result.code == 0, "wrong end", f"exit code {result.code}")
        compare_with_undisturbed(trial, tree, folder / "undisturbed")
        for run in find_runs(tree / "runs"):
            rows = _rows_on_server(server) if mode == "online" else _rows_in_file(run)
            _expect_loss_said(trial, run, result.output, rows)
    return trial


def _start(tree: Path, server: WandbServer, mode: str) -> Command:
    tracked = (f"tracking={mode}", "tracking.finish_timeout=4")
    return spawn(*SETTINGS, *tracked, folder=tree, environment={**server.env, **ENVIRONMENT})


def _wait_for_rows(command: Command, server: WandbServer, count: int) -> None:
    """Waits until the server has so many rows; not longer than the run lasts."""
    end = time.monotonic() + 60
    while count and len(_rows_on_server(server)) < count and time.monotonic() < end:
        if any(served.complete for served in server.runs.values()):
            return
        time.sleep(0.005)


def _rows_on_server(server: WandbServer) -> list[dict]:
    served = [row for run in list(server.runs.values()) for row in list(run.history)]
    return [as_metrics_row(row) for row in served if "trainer/global_step" in row]


def _rows_in_file(run: Run) -> list[dict]:
    """The rows in the file that W&B writes offline."""
    if "wandb" not in run.status or not list((run.path / run.status["wandb"]).glob("*.wandb")):
        return []
    history = wandb_content(run)["history"]
    return [as_metrics_row(row) for row in history if "trainer/global_step" in row]


def _rows_on_disk(tree: Path) -> int:
    return sum(len(run.rows()) for run in find_runs(tree / "runs"))


def _expect_loss_said(trial: Trial, run: Run, output: str, rows: list[dict]) -> None:
    """Notes it where W&B lacks rows of a run and the run does not say so."""
    if rows == run.rows():
        return
    in_output = "".join(output.split())
    is_printed = any(
        words in in_output
        for words in ("W&B'SSERVERTOOK", "W&BHOLDS", "W&Bcannotbeusedonline", "trackingoffline")
    )
    said = f"W&B has {len(rows)} of {len(run.rows())} rows"
    trial.expect(is_printed, "unsaid", f"{said}, and the output does not say it")
    is_offline = "offline" in run.status.get("wandb", "")
    is_in_status = "wandb_error" in run.status or "wandb" not in run.status or is_offline
    trial.expect(is_in_status, "unsaid", f"{said}, and status.json does not say it")
