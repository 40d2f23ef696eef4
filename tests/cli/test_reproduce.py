"""`lora-lab reproduce`: the same bits where nothing changed, and a report of what did.

Independent truth: the files of both runs read back, and differences that the test makes by hand.
Run: make test ARGS=tests/cli/test_reproduce.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lora_lab.run_files import file_records
from lora_lab.runs import Run, find_runs
from tests.conftest import Lab, command, only_run, quick
from tests.copied_runs import as_earlier_version


def reproduce(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """The exit code of `lora-lab reproduce ARGUMENTS`, and all that it printed."""
    capsys.readouterr()
    code = command(monkeypatch, "reproduce", *map(str, arguments))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def content(run: Run) -> dict[str, bytes]:
    return {
        path.relative_to(run.path).as_posix(): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("experiment", quick(["shift", "digits"], ["digits"]))
@pytest.mark.parametrize("adapter", quick(["lora", "full", "none"], ["lora", "full"]))
def test_the_same_bits(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    experiment: str,
    adapter: str,
):
    assert lab(experiment, f"adapter={adapter}") == 0
    run = only_run()
    before = content(run)
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 0, output
    assert "environment and settings: the same" in output
    assert "not equal bit for bit" not in output
    assert content(run) == before
    assert only_run() == run  # what `lora-lab ls` lists is as before
    new = only_run("reproduced")
    assert new.path == Path("reproduced", *run.path.parts[1:])
    assert (new.path / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]
    weights = [name for name in before if name.endswith(".safetensors")]
    assert len(weights) == (adapter != "none")
    for name in weights:
        assert content(new)[name] == before[name]
        assert f"metrics.jsonl, {name}" in output
    for key in ("val/loss", "base/val/loss", "parameters/base"):
        assert any(line.split()[:1] == [key] for line in output.splitlines()), key
    assert (new.path / "reproduction.md").read_text().count("| val/loss |") == 1


def test_the_base_is_reused_or_trained_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift")
    run = only_run()
    (file,) = Path("bases").glob("*.safetensors")
    base_hash = json.loads((run.path / "adapter" / "adapter.json").read_text())["base"][:10]
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 0
    assert f"base: found, not trained again ({file})" in output
    assert f"stored {base_hash}, new {base_hash}" in output
    written = file.stat().st_mtime_ns
    code, output = reproduce(monkeypatch, capsys, run.path, "--fresh")  # over the one before
    assert code == 0
    again = only_run("reproduced").path / "bases" / file.name
    assert f"base: trained again ({again})" in output
    assert again.read_bytes() == file.read_bytes()
    assert file.stat().st_mtime_ns == written


def record_again(run: Run) -> None:
    """Makes the files of a finished run, as they are now, those that it ended with."""
    run.update_status(files=file_records(run.path))


@pytest.mark.slow
def test_what_differs_is_named(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each file of numbers is changed by hand; a tolerance takes in what is smaller."""
    lab("digits")
    run = only_run()
    path = run.path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    loss = run.last("val/loss")
    assert loss is not None
    for row in rows:
        row |= {"val/loss": loss * 1.001} if row.get("val/loss") == loss else {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record_again(run)
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 1
    marked = [line.split() for line in output.splitlines() if line.rstrip().endswith("≠")]
    (name, stored, new, absolute, relative, _) = marked[0]
    assert len(marked) == 1
    assert name == "val/loss"
    assert float(stored) == pytest.approx(loss * 1.001, rel=1e-8)
    assert float(new) == pytest.approx(loss, rel=1e-8)
    assert float(absolute) == pytest.approx(0.001 * loss, rel=5e-3)
    assert float(relative) == pytest.approx(0.001 / 1.001, rel=5e-3)
    assert "NOT REPRODUCED: 1 of" in output
    assert "most val/loss" in output
    assert "not equal bit for bit: metrics.jsonl" in output
    assert reproduce(monkeypatch, capsys, run.path, "--tolerance", "0.002")[0] == 0
    assert reproduce(monkeypatch, capsys, run.path, "--tolerance", "0.0005")[0] == 1

    with np.load(run.path / "spectra.npz") as kept:
        arrays = dict(kept)
    arrays["head/singular_values"][-1, 0] *= 1.1
    np.savez(run.path / "spectra.npz", **arrays)
    file = run.path / "adapter" / "adapter.safetensors"
    factors = load_file(file)
    factors["head.B"] *= 1.2
    save_file(factors, file)
    record_again(run)
    code, output = reproduce(monkeypatch, capsys, run.path, "--tolerance", "0.01")
    assert code == 1
    marked = [line.split("  ")[0].strip() for line in output.splitlines() if "≠" in line]
    assert marked == ["head: singular values", "adapter: head.B"]
    assert "not equal bit for bit: metrics.jsonl, adapter/adapter.safetensors" in output


def test_a_metric_that_is_gone_is_a_difference_and_a_new_one_is_not(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift")
    run = only_run()
    path = run.path / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"merged/val/loss"', '"merged/val/before"'))
    record_again(run)
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 1
    assert "NOT REPRODUCED: 1 of" in output
    assert "most merged/val/before" in output
    lines = [line for line in text.splitlines(keepends=True) if "merged/val/loss" not in line]
    path.write_text("".join(lines))
    record_again(run)
    assert reproduce(monkeypatch, capsys, run.path)[0] == 0


def test_rows_that_analyze_added_are_no_difference(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift")
    run = only_run()
    assert command(monkeypatch, "analyze", str(run.path)) == 0
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 0
    assert "bit for bit equal: metrics.jsonl, adapter" in output


def test_differences_of_environment_and_settings_are_shown(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A run of an older version: other packages, and without settings that are newer than it."""
    lab("shift")
    run = only_run()
    env = json.loads((run.path / "env.json").read_text())
    now = env["packages"]["torch"]
    env["packages"]["torch"] = "1.0.0"
    env["cpus"] = 1000
    del env["processor"]
    (run.path / "env.json").write_text(json.dumps(env))
    assert run.status["threads"] == torch.get_num_threads()
    run.update_status(threads=1000, devices=None, packed=4)
    config = run.config
    for key in ("sweep", "figures"):
        del config[key]
    del config["spectra"]["first_step"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    as_earlier_version(run)
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 0, output
    printed_rows = [line.split() for line in output.splitlines()]
    assert ["packages.torch", "1.0.0", now] in printed_rows
    assert ["spectra.first_step", "–", "False"] in printed_rows
    assert ["sweep.fail_fast", "–", "False"] in printed_rows
    assert any(line[:2] == ["cpus", "1000"] for line in printed_rows)
    assert ["threads", "1000", str(torch.get_num_threads())] in printed_rows
    assert any(line[:2] == ["processor", "–"] for line in printed_rows)
    assert ["devices", "–", "1", "×", "cpu"] in printed_rows
    assert "devices: stored not recorded, by its config accelerator=auto devices=1; new 1" in output
    assert "pack: stored in a pack of 4, the new one alone: equal up to rounding" in output
    assert "environment and settings: the same" not in output


def test_what_cannot_be_reproduced(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift")
    run = only_run()

    def refused(*arguments: object) -> str:
        code, output = reproduce(monkeypatch, capsys, run.path, *arguments)
        assert code == 2
        assert "Traceback" not in output
        return output

    before = content(run)
    assert "the stored run is in that folder" in refused("--to", "runs")
    assert "the stored run is in that folder" in refused("--to", run.path)
    assert "argument --tolerance" in refused("--tolerance", "-1")
    shutil.copytree("runs", "others")
    assert "is another run; give" in refused("--to", "others")
    config = (run.path / "config.yaml").read_text()
    as_earlier_version(run)
    before = content(run)
    (run.path / "config.yaml").write_text(config + "rank: 3\n")
    assert "rank=3: there is no such key" in refused()
    (run.path / "config.yaml").write_text(config)
    assert content(run) == before
    run.update_status(state="failed")
    assert "is failed: only a finished run can be reproduced" in refused()
    assert not Path("reproduced").exists()


@pytest.mark.slow
def test_a_reproduction_that_ended_before_it_was_compared_is_repeated(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift")
    assert reproduce(monkeypatch, capsys, only_run().path)[0] == 0
    (report,) = Path("reproduced").rglob("reproduction.md")
    report.unlink()
    assert reproduce(monkeypatch, capsys, only_run().path)[0] == 0
    assert report.exists()


def test_a_checkpoint_that_changed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lab("shift")
    (trained,) = Path("bases").glob("*.safetensors")
    shutil.copy(trained, "base.safetensors")
    assert lab("shift", "base=checkpoint", "base.path=base.safetensors", "runs_dir=kept") == 0
    run = only_run("kept")
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 0, output
    assert "base: loaded from base.safetensors" in output
    weights = load_file("base.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, "base.safetensors")
    code, output = reproduce(monkeypatch, capsys, run.path)
    assert code == 2
    assert "base.safetensors is not the file that" in output


def test_a_new_run_that_fails(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The stored learning rate is changed to one that diverges; a second try fails alike."""
    lab("shift", "optimizer=sgd")
    run = only_run()
    config = (run.path / "config.yaml").read_text()
    wild = yaml.safe_load(config)
    wild["optimizer"]["lr"] = 1e30
    (run.path / "config.yaml").write_text(yaml.safe_dump(wild))
    record_again(run)
    for _ in range(2):
        code, output = reproduce(monkeypatch, capsys, run.path)
        assert code == 1
        assert "failed: DivergedError" in output
    assert [run.status["state"] for run in find_runs(Path("reproduced"))] == ["failed"]
