"""The launchers: one multirun through each; jobs that fail, are killed, or are stopped.

Independent truth: Hydra's basic launcher, which runs the same jobs one after another in this
process and must give the same metrics.jsonl byte for byte; how processes ended is read from the
system and from the files of their runs. A real SLURM of one node runs, where it can be installed.

Run: make test ARGS=tests/sweeps/test_launchers.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lora_lab.runs import Run, find_runs
from lora_lab.sweeps.launchers import processes
from lora_lab.sweeps.launchers.processes import ProcessLauncher, gpus_of_job, resolve_n_jobs
from lora_lab.sweeps.launchers.submission import LocalLauncher, SlurmLauncher
from tests.conftest import SMALL, Lab

ROOT = Path(__file__).parents[2]
SLURM = Path(__file__).with_name("slurm") / "slurm.sh"
PACKED = ["-m", "hydra/launcher=packed"]
JOBLIB = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
LOCAL = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.array_parallelism=3"]
ON_SLURM = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]
ON_SLURM += ["hydra.launcher.mem_gb=1"]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs in other processes have the threads of this one, and can import the tests' models."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "250")


def results(root: str) -> dict[str, bytes]:
    """The metrics.jsonl of each run, by its experiment and name."""
    runs = {f"{run.path.parent.name}/{run.path.name}": run.path for run in find_runs(Path(root))}
    assert all(Run(path).finished for path in runs.values())
    return {name: (path / "metrics.jsonl").read_bytes() for name, path in runs.items()}


def state_by_r_and_lr() -> dict[tuple[int, float], str]:
    """The state of each run, by its r and learning rate."""
    return {
        (run.config["adapter"]["r"], run.config["optimizer"]["lr"]): run.status["state"]
        for run in find_runs(Path("runs"))
    }


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SLURM of one node on this machine: the environment with which its commands find it."""
    directory = tmp_path_factory.mktemp("slurm")
    for step in (["install"], ["start", str(directory)]):
        done = subprocess.run([SLURM, *step], capture_output=True, text=True)
        if done.returncode:
            output = (done.stdout + done.stderr).strip()
            pytest.skip(f"SLURM is not here, and it cannot be set up: {output}")
    yield {"SLURM_CONF": str(directory / "slurm.conf")}
    subprocess.run([SLURM, "stop", str(directory)], check=True)


@pytest.fixture
def cluster(slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's commands work in this test."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)


def check_same_as_basic(lab: Lab, launcher: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    points = ("adapter.r=1,2", "seed=0,1")
    assert lab("shift", *points, "-m", "runs_dir=one", "bases_dir=one") == 0
    capsys.readouterr()
    assert lab("shift", *points, *launcher) == 0
    assert len(results("one")) == 4
    assert results("runs") == results("one")
    logs = [(run.path / "log.txt").read_text() for run in find_runs(Path("runs"))]
    assert sum("base trained in" in log for log in logs) == 1
    assert sum("base found" in log for log in logs) == 3
    shown = capsys.readouterr().out
    assert "multirun: 4 runs" in shown
    assert "multirun: 4 of 4 done" in shown
    assert not list(Path("runs").glob(".sweeps/*"))
    # The same command again starts no process for what is done.
    before = [run.status for run in find_runs(Path("runs"))]
    assert lab("shift", *points, *launcher) == 0
    assert "multirun: 4 runs (4 finished)" in capsys.readouterr().out
    assert [run.status for run in find_runs(Path("runs"))] == before


def test_joblib_gives_what_basic_gives(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_same_as_basic(lab, JOBLIB, capsys)


@pytest.mark.slow
def test_submitit_gives_what_basic_gives(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_same_as_basic(lab, LOCAL, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_slurm_gives_what_basic_gives(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_same_as_basic(lab, ON_SLURM, capsys)


def check_other_jobs_finish(
    lab: Lab, launcher: list[str], capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """One job is killed, one diverges, three have a config error; the last one finishes."""
    points = ("adapter.r=1,99", "optimizer=sgd", "optimizer.lr=1e-3,1e30,2e-3")
    killed = "model._target_=tests.process_models.KillsItself"
    Path("kill").touch()
    assert lab("shift", killed, *points, *launcher) == 1
    shown = capsys.readouterr().out
    ended = state_by_r_and_lr()
    assert ended.pop((1, 1e30)) == "failed"
    assert sorted(ended.values()) == ["finished", "interrupted"]
    assert "multirun: 6 runs (3 config error)" in shown
    assert "multirun: 1 of 3 done, 1 failed, 1 interrupted" in shown
    rows = [line.split() for line in shown.splitlines() if " adapter.r=" in line]
    assert sorted(row[0] for row in rows) == [*["config"] * 3, "failed", "finished", "interrupted"]
    assert "adapter.r=99 exceeds the rank of" in shown
    assert "DivergedError: train/loss became" in shown
    assert lost in shown
    (folder,) = Path("runs").glob(".sweeps/*")
    assert [file for file in folder.rglob("*") if file.is_file()]
    assert f"output of jobs that were lost: {folder}" in shown
    # The same command again runs it, and what failed.
    assert lab("shift", killed, *points, *launcher) == 1
    assert sorted(state_by_r_and_lr().values()) == ["failed", "finished", "finished"]


def test_joblib_loses_only_the_job_that_is_killed(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_other_jobs_finish(lab, JOBLIB, capsys, "its process ended by SIGKILL (out of memory?)")


@pytest.mark.slow
def test_submitit_loses_only_the_job_that_is_killed(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_other_jobs_finish(lab, LOCAL, capsys, "was killed or cancelled")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_slurm_loses_only_the_job_that_is_killed(lab: Lab, capsys: pytest.CaptureFixture[str]):
    check_other_jobs_finish(lab, ON_SLURM, capsys, "was killed or cancelled")


def test_fail_fast_begins_no_job_after_the_first_failure(lab: Lab):
    points = ("optimizer=sgd", "optimizer.lr=1e30,1e-3", "sweep.fail_fast=true")
    assert lab("shift", *points, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1") == 1
    assert list(state_by_r_and_lr().values()) == ["failed"]


def test_a_wrong_launcher_is_a_config_error(lab: Lab, capsys: pytest.CaptureFixture[str]):
    assert lab("shift", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0") == 2
    assert "hydra.launcher.n_jobs=0: must be greater than 0 or" in capsys.readouterr().err
    assert lab("shift", "-m", "hydra/launcher=jobl") == 2
    shown = capsys.readouterr().err
    assert "hydra/launcher=jobl" in shown
    assert "nearest: joblib" in shown
    assert not find_runs(Path("runs"))


def start_endless(*arguments: str) -> subprocess.Popen[Any]:
    """A multirun whose runs do not end, in a process that hears Ctrl-C, once two are training."""
    command = [sys.executable, "-m", "lora_lab.train", *SMALL["shift"], "tracking=off"]
    command += ["figures=false", "adapter.r=1,2,3", "trainer.max_epochs=1000000", *arguments]
    process = subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None
    )
    wait_for(lambda: len(training()) == 2, process)
    return process


def training() -> list[Run]:
    runs = find_runs(Path("runs")) if Path("runs").exists() else []
    return [r for r in runs if r.status["state"] == "running" and 2 in r.curve("val/loss")]


def wait_for(condition, process: subprocess.Popen[Any] | None = None, seconds: float = 180) -> None:
    end = time.time() + seconds
    while not condition():
        assert process is None or process.poll() is None
        assert time.time() < end
        time.sleep(0.1)


def processes_here() -> list[str]:
    """Command lines of the other processes whose working directory is this test's folder."""
    commands = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == Path.cwd() and int(process.name) != os.getpid():
                commands.append((process / "cmdline").read_text())
        except OSError:
            continue
    return commands


SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize("signum", [signal.SIGINT, *SLOW])
@pytest.mark.slow
def test_jobs_end_when_the_launcher_ends(signum: signal.Signals):
    process = start_endless(*JOBLIB)
    process.send_signal(signum)
    process.wait(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[signum.name]
    wait_for(lambda: not processes_here())
    assert [run.status["state"] for run in find_runs(Path("runs"))] == ["interrupted"] * 2


def test_ctrl_c_while_a_packed_multirun_starts_is_one_line():
    """As a terminal sends it, to all processes: here while the fork server imports."""
    program = "import sys; from lora_lab.cli.main import main; main()"
    command = [sys.executable, "-c", program, "train", *PACKED, *SMALL["shift"], "seed=0,1"]
    with Path("output").open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
    wait_for(lambda: any("forkserver" in command for command in processes_here()), process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    time.sleep(0.3)  # the server would print its traceback meanwhile
    (line,) = Path("output").read_text().splitlines()
    assert line.startswith("interrupted")


def test_the_gpus_are_shared_out():
    gpus = ["0", "1", "2", "3"]
    assert [gpus_of_job(gpus, place, 4) for place in range(4)] == [["0"], ["1"], ["2"], ["3"]]
    assert [gpus_of_job(gpus, place, 2) for place in range(2)] == [["0", "1"], ["2", "3"]]
    assert [gpus_of_job(gpus, place, 3) for place in range(3)] == [["0"], ["1"], ["2"]]
    assert [gpus_of_job(["5", "7"], place, 4) for place in range(4)] == [["5"], ["7"]] * 2
    assert gpus_of_job([], 0, 3) == []


def test_as_many_jobs_at_once_as_there_are_gpus_or_cores():
    assert resolve_n_jobs(None, 4, 1) == 4
    assert resolve_n_jobs(None, 4, 2) == 2
    assert resolve_n_jobs(None, 1, 2) == 1
    assert resolve_n_jobs(3, 4, 1) == 3
    assert resolve_n_jobs(None, 0, 1) == resolve_n_jobs(-1, 0, 1) >= 1


def test_a_search_asks_for_as_many_as_run_at_once():
    launcher = ProcessLauncher(n_jobs=3)
    launcher.config = OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 1}})
    assert launcher.jobs_at_once == 3
    for kind in (LocalLauncher, SlurmLauncher):
        assert kind(array_parallelism=4).jobs_at_once == 4


def test_a_job_has_its_gpu_and_its_threads(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    target = "model._target_=tests.process_models.WritesItsDevices"
    assert lab("shift", target, "adapter.r=1,2", *JOBLIB) == 0
    assert sorted(Path("devices").read_text().split()) == ["5:3", "7:3"]


@pytest.mark.parametrize(("swept", "threads"), [("seed=0,1", "48"), ("data.seed=0,1", "44")])
def test_a_base_is_trained_by_the_cores_of_all_that_wait_for_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, swept: str, threads: str
):
    """A process tells what it trains first: a run with its share of the cores, or a base."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processes, "cpu_count", lambda: 8)
    assert lab("shift", "model._target_=tests.process_models.WritesItsDevices", swept, *JOBLIB) == 0
    assert sorted(line.split(":")[1] for line in Path("devices").read_text().split()) == [*threads]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_job_that_slurm_queues_again_goes_on_and_a_cancelled_one_is_reported():
    """scontrol requeue is what preemption does; USR2 is what comes before the end of the time."""
    long = ["trainer.max_epochs=3000", "trainer.check_val_every_n_epoch=100"]
    command = [sys.executable, "-m", "lora_lab.train", *SMALL["shift"], "tracking=off", *long]
    command += ["figures=false", "seed=0,1,2", "spectra.every_n_epochs=3000", *ON_SLURM]
    command += ["checkpoint_every=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def running() -> list[str]:
        command = ["squeue", "--noheader", "--states=R", "--format=%i"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    def rows(seed: int) -> int:
        runs = [r for r in find_runs(Path("runs")) if f"-seed{seed}-" in r.path.name]
        return len(runs[0].curve("val/loss")) if runs else 0

    commands = (["scontrol", "requeue"], ["scancel", "--signal=USR2"], ["scancel"])
    for index, command in enumerate(commands):
        wait_for(lambda index=index: rows(index) > 5, process, 300)
        (job,) = [job for job in running() if job.endswith(f"_{index}")]
        subprocess.run([*command, job], check=True)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    ended = {run.config["seed"]: run.status for run in find_runs(Path("runs"))}
    assert {seed: status["state"] for seed, status in ended.items()} == {
        **{0: "finished", 1: "finished", 2: "interrupted"}
    }
    for seed in (0, 1):
        assert ended[seed]["tries"] == 2
        (run,) = (run for run in find_runs(Path("runs")) if run.config["seed"] == seed)
        assert "run resumed from epoch" in (run.path / "log.txt").read_text()
    assert "was killed or cancelled" in ended[2]["error"]
    assert "2 of 3 done, 1 interrupted" in shown
