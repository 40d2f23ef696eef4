"""metrics.jsonl and W&B: each row, chart and artifact arrives, and what is lost is reported.

Truth: W&B's own files, read back offline, and what a loopback server receives online.

Run: make test ARGS=tests/tracking/test_tracking.py
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lora_lab.runs import Run, find_runs
from lora_lab.tracking import tracking, wandb_run
from lora_lab.tracking.metrics_file import JsonlLogger
from lora_lab.tracking.wandb_run import read_records
from tests.conftest import Lab, only_run, small
from tests.wandb_server import ServedRun, WandbServer


def wandb_directory(run: Run) -> Path:
    return run.path / run.status["wandb"]


def wandb_content(run: Run) -> dict:
    """The content of a run's .wandb file: config, history, summary, exit code, artifacts, run."""
    (path,) = wandb_directory(run).glob("*.wandb")
    content: dict = {"config": {}, "history": [], "summary": {}, "exit": None, "artifacts": []}

    def unfold(items) -> dict:
        return {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items
        }

    for record in read_records(path):
        match record.WhichOneof("record_type"):
            case "run":
                content["run"] = record.run
                content["config"] |= unfold(record.run.config.update)
            case "config":
                content["config"] |= unfold(record.config.update)
            case "history":
                content["history"].append(unfold(record.history.item))
            case "summary":
                content["summary"] |= unfold(record.summary.update)
            case "exit":
                content["exit"] = record.exit.exit_code
            case "request" if record.request.HasField("log_artifact"):
                content["artifacts"].append(record.request.log_artifact.artifact)
            case "artifact":
                content["artifacts"].append(record.artifact)
    return content


def as_metrics_row(row: dict) -> dict:
    """A row of W&B as metrics.jsonl has it: without the keys that W&B adds, and numbers only."""
    numbers = {k: v for k, v in row.items() if not k.startswith("_") and isinstance(v, int | float)}
    return {"step": numbers.pop("trainer/global_step"), **numbers}


def test_offline_all_that_was_logged_is_in_wandbs_file(lab: Lab):
    assert lab("shift", "adapter.r=2", tracking="offline") == 0
    run = only_run()
    content = wandb_content(run)
    assert content["config"]["adapter"] == run.config["adapter"]
    assert content["config"]["data"] == run.config["data"]
    assert content["exit"] == 0
    assert content["run"].run_group == run.status["cell"]
    assert content["run"].job_type == "lora"
    assert set(content["run"].tags) == {"shift", "linear"}
    assert content["run"].display_name == run.path.name
    pictures = [row for row in content["history"] if "trainer/global_step" not in row]
    shown = {"/".join(key.split("/")[:3]) for row in pictures for key in row if key[0] != "_"}
    for wanted in (
        "spectra/linear/phi_base",
        "spectra/linear/chart_table",
        "truncation/chart_table",
    ):
        assert any(key.startswith(wanted) for key in shown), wanted
    assert any(key.startswith("spectra/table") for key in shown)
    assert len(pictures) == 4  # one of them is what training cost
    rows = [as_metrics_row(row) for row in content["history"] if row not in pictures]
    assert rows == run.rows()
    assert content["summary"]["val/loss"] == run.last("val/loss")
    assert content["summary"]["merged/val/loss"] == run.last("merged/val/loss")
    histograms = [r for r in content["history"] if "spectra/linear/sigma_1" in r]
    for row in histograms:
        assert row["spectra/linear/singular_values/_type"] == "histogram"
        assert sum(row["spectra/linear/singular_values/values"]) == 2
    assert len(histograms) == 3
    artifact = next(a for a in content["artifacts"] if a.type == "adapter")
    contents = {entry.path for entry in artifact.manifest.contents}
    assert contents == {"adapter.json", "adapter.safetensors"}


def test_one_wandb_folder_for_all_runs_of_an_experiment(lab: Lab):
    lab("shift", "seed=0,1", "-m", tracking="offline")
    assert len(list(Path("runs/shift/wandb").glob("offline-run-*"))) == 2
    assert [run.status["state"] for run in find_runs(Path("runs"))] == ["finished"] * 2


@pytest.mark.slow
def test_a_cached_bases_rows_are_in_every_run(lab: Lab):
    lab("shift", "seed=0,1", "-m", tracking="offline")
    for run in find_runs(Path("runs")):
        base = [
            as_metrics_row(row) for row in wandb_content(run)["history"] if "base/val/loss" in row
        ]
        assert [row["epoch"] for row in base] == [2, 4]


def test_a_failed_run_ends_as_failed(lab: Lab):
    assert lab("shift", "optimizer=sgd", "optimizer.lr=1e30", tracking="offline") == 1
    assert wandb_content(only_run())["exit"] == 1


def test_off_is_off(lab: Lab):
    assert lab("shift") == 0
    assert not Path("runs/shift/wandb").exists()


def test_rows_that_wandb_lost_are_reported_as_an_error(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Only the beginning of the file is read, as after a full disk."""
    read_records = wandb_run.read_records

    def read_beginning(path: Path):
        part = path.with_suffix(".cut")
        part.write_bytes(path.read_bytes()[:6000])
        return read_records(part)

    monkeypatch.setattr(wandb_run, "read_records", read_beginning)
    monkeypatch.setattr(wandb_run, "LAST_ROW_TIMEOUT", 0.5)
    assert lab("shift", tracking="offline") == 0
    assert "W&B HOLDS" in capsys.readouterr().out
    run = only_run()
    (path,) = wandb_directory(run).glob("*.wandb")
    left = sum(record.HasField("history") for record in read_beginning(path))
    # And four rows that only W&B has: the cost, two charts, and pictures with a table.
    assert run.status["wandb_rows_lost"] == len(run.rows()) + 4 - left
    # base: 4 train, 2 val; adapter: 3 val, 4 train, 3 spectra, findings; merged; parameters; what
    # was forgotten.
    assert len(run.rows()) == 4 + 2 + 3 + 4 + 3 + 1 + 1 + 1 + 1


def test_a_damaged_byte_ends_the_reading(lab: Lab):
    lab("shift", tracking="offline")
    (path,) = wandb_directory(only_run()).glob("*.wandb")
    records = list(read_records(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    part = list(read_records(path))
    assert 0 < len(part) < len(records)
    assert part == records[: len(part)]


def serve(served: ServedRun) -> None:
    run = only_run()
    assert served.complete
    assert served.exitcode == 0
    assert served.config["adapter"] == run.config["adapter"]
    assert served.group == run.status["cell"]
    assert set(served.tags) == {"shift", "linear"}
    rows = [as_metrics_row(row) for row in served.history if "trainer/global_step" in row]
    assert rows == run.rows()
    assert served.summary["val/loss"] == run.last("val/loss")
    adapter = next(a for a in served.artifacts if a["type"] == "adapter")
    stored = (run.path / "adapter" / "adapter.safetensors").read_bytes()
    assert adapter["files"]["adapter.safetensors"] == stored
    assert adapter["committed"]


def test_online_the_server_gets_everything(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    with WandbServer() as server:
        use_server(monkeypatch, server)
        assert lab("shift", tracking="online") == 0
        (served,) = server.runs.values()
        serve(served)
        assert served.project == "lora_lab"


def test_offline_then_synced_the_server_gets_everything(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    assert lab("shift", tracking="offline") == 0
    with WandbServer() as server:
        use_server(monkeypatch, server)
        command = [str(Path(sys.executable).with_name("wandb")), "sync"]
        subprocess.run([*command, wandb_directory(only_run())], check=True, capture_output=True)
        (served,) = server.runs.values()
        serve(served)


def use_server(monkeypatch: pytest.MonkeyPatch, server: WandbServer) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    wandb_run.wandb.teardown()  # settings are read once a process


def test_no_login_falls_back_to_offline_and_says_so_once(
    lab: Lab, capsys: pytest.CaptureFixture[str]
):
    wandb_run.wandb.teardown()
    assert lab("shift", "seed=0,1", "-m", tracking="online") == 0
    assert capsys.readouterr().out.count("W&B cannot be used online") == 1
    for run in find_runs(Path("runs")):
        assert wandb_content(run)["exit"] == 0


def test_no_server_falls_back_to_offline(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 2)
    wandb_run.wandb.teardown()
    started = time.time()
    assert lab("shift", tracking="online") == 0
    assert time.time() - started < 30
    assert "W&B cannot be used online" in capsys.readouterr().out
    assert wandb_content(only_run())["exit"] == 0


def test_rows_that_come_late_are_waited_for(tmp_path: Path, lab: Lab):
    """W&B's process may still be writing when finish has returned."""
    lab("shift", tracking="offline")
    (path,) = wandb_directory(only_run()).glob("*.wandb")
    content = path.read_bytes()
    late = tmp_path / "late.wandb"
    late.write_bytes(content[:5000])
    writer = threading.Timer(0.3, lambda: late.write_bytes(content))
    writer.start()
    wanted = sum(record.HasField("history") for record in read_records(path))
    assert wandb_run.count_rows(late, wanted) == wanted
    assert "wandb_rows_lost" not in only_run().status


def test_a_row_is_on_disk_once_it_is_logged(tmp_path: Path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"a": 1.0}, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "a": 1.0}\n'
    logger.file.close()


@pytest.mark.parametrize("values", [[9, 9 * (1 + 1e-15)], [0, 0], [3], [2, 1, 0]])
def test_histograms_of_any_spectrum(values: list[float]):
    counts, edges = tracking._histogram(np.array(values, dtype=float))
    assert (counts.sum(), len(edges)) == (len(values), 33)


def test_a_runs_id_left_in_the_environment_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_RUN_ID", "left-over")
    assert small("shift", tracking="offline") == 0
    assert "left-over" not in str(wandb_directory(only_run()))
