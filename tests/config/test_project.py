"""A project of the user's: every command knows its conf/ and its modules, and only then.

Independent truth: the YAML and Python files that the test writes, and Hydra's own --config-dir in
another process.
Run: make test ARGS=tests/config/test_project.py
"""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_lab.cli.help_text import train_help
from lora_lab.cli.new import write_project
from lora_lab.config import compose, folders, project
from lora_lab.config.options import options
from lora_lab.config.schema import Config, ConfigError
from lora_lab.runs import find_runs
from lora_lab.training import source_code
from tests.conftest import command

BRIEF = ["base.epochs=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
BRIEF += ["tracking=off", "figures=false", "spectra.truncation=none", "spectra.against_base=false"]
STUDY = ["experiment=study", *BRIEF]
SMALL_DIGITS = "_target_: lora_lab.data.digits.Digits\nbatch_size: 720\nseed: 0\n"


def forget() -> None:
    """Lets this process import the project's modules and compose its configs anew."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("study", "plug")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    source_code._code_of.cache_clear()
    compose._compose_choices.cache_clear()
    folders.plugin_folders.cache_clear()


@pytest.fixture(autouse=True)
def study(elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new project, which this process is not in yet."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name, value in (("project", None), ("config_dirs", ())):
        monkeypatch.setattr(project, name, value)
    for name in (project.PROJECT_VARIABLE, project.CONFIG_DIRS_VARIABLE):
        monkeypatch.setenv(name, "")
    forget()
    write_project(tmp_path / "study")
    yield tmp_path / "study"
    forget()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def composed(*overrides: str) -> Config:
    ((_, cfg),) = compose.compose_points([list(overrides)])
    assert isinstance(cfg, Config), cfg
    return cfg


@pytest.mark.parametrize(
    ("folder", "arguments", "variable"),
    [
        ("study", [], ""),
        ("study/sweeps", [], ""),
        (".", ["--project", "study"], ""),
        (".", ["--project=study"], ""),
        (".", [], "study"),
    ],
)
def test_ways_into_a_project(study: Path, monkeypatch, folder, arguments, variable):
    if variable:
        monkeypatch.setenv(project.PROJECT_VARIABLE, variable)
    monkeypatch.chdir(study.parent / folder)
    assert project.enter(["train", *arguments, "seed=1"]) == ["train", "seed=1"]
    cfg = composed("experiment=study", "data.quarter_turns=2", "runs_dir=${project:out}")
    assert cfg.runs_dir == str(study / "out")
    assert cfg.model.callee.__module__ == "study.model"
    assert os.environ[project.PROJECT_VARIABLE] == str(study)
    assert options()["experiment"]["study"].startswith("A network that")
    assert "data.KEY:\n  # Handwritten" in train_help(["data=turned_digits"])
    assert "digits" in options()["experiment"]


def test_outside_a_project_nothing_of_it_is_known(study: Path):
    project.enter()
    assert project.project is None
    ((_, error),) = compose.compose_points([["runs_dir=${project:out}"]])
    assert "--project DIR names one" in str(error)
    assert "study" not in options()["experiment"]
    assert find_spec("study") is None


def test_a_projects_file_stands_before_ours_and_no_module_of_it_before_an_installed_one(
    study: Path, monkeypatch
):
    write(
        study / "conf/optimizer/adam.yaml",
        "_target_: torch.optim.SGD\nlr: 0.5\nschedule: constant\nwarmup: 0\n",
    )
    write(study / "wandb.py", "raise RuntimeError('imported')")
    monkeypatch.chdir(study)
    project.enter()
    assert composed("experiment=shift").optimizer.target == "torch.optim.SGD"
    origin = find_spec("wandb").origin  # pyright: ignore
    assert not Path(str(origin)).is_relative_to(study)


@pytest.mark.parametrize("marker", ["conf: configs\nimport_path: src\n", ""])
def test_the_marker_says_where_things_are(study: Path, marker: str):
    write(study / project.MARKER, marker)
    if marker:
        (study / "conf").rename(study / "configs")
        (study / "study").rename(study.parent / "moved")
        (study / "src").mkdir()
        (study.parent / "moved").rename(study / "src" / "study")
    project.enter(["--project", str(study)])
    assert composed("experiment=study").data.callee.__module__ == "study.data"


@pytest.mark.parametrize(
    ("marker", "arguments", "says"),
    [
        ("cnof: x", ["--project", "study"], "cnof: there is no such key; nearest: conf"),
        ("conf: confs", ["--project", "study"], "there is no such folder; nearest: "),
        ("[1]", ["--project", "study"], "must have keys with values"),
        ("a: [", ["--project", "study"], "cannot be read"),
        ("", ["--project", "studdy"], "--project=studdy: there is no such folder; nearest: study"),
        ("", ["--project", "study/study"], "has no lora_lab.yaml and no conf/"),
        ("", ["--project"], "--project: must be followed by a folder"),
        ("", ["train", "-cd=cnof"], "-cd=cnof: there is no such folder"),
        ("", ["train", "hydra.searchpath=[pkg://no_such]"], "there is no such folder"),
        ("", ["train", "hydra.searchpath={a: 1}"], "must be a list of folders"),
    ],
)
def test_what_is_wrong_is_named(study: Path, monkeypatch, capsys, marker, arguments, says):
    write(study / project.MARKER, marker)
    assert command(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_marker_that_others_may_have_placed_is_not_followed(study: Path, monkeypatch):
    run = study / "runs/study/RUN"
    write(run / "status.json", "{}")
    write(run / project.MARKER, "")
    monkeypatch.chdir(run)
    project.enter()
    assert project.project
    assert project.project.folder == study
    monkeypatch.setenv(project.PROJECT_VARIABLE, "")
    monkeypatch.setattr(os, "getuid", lambda: study.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"belongs to another user.*--project"):
        project.enter()
    assert project.enter(["--project", str(study)]) == []


@pytest.mark.parametrize(
    "arguments",
    [["--config-dir", "more"], ["-cd=more"], ["hydra.searchpath=[file://MORE]"]],
)
def test_the_points_of_a_multirun_know_more_folders_of_configs(arguments):
    more = write(Path("more/data/small.yaml"), SMALL_DIGITS).parents[1].absolute()
    arguments = [argument.replace("MORE", str(more)) for argument in arguments]
    left = project.enter(["-m", *arguments, "experiment=digits", "data=small,digits"])
    assert left == ["-m", "experiment=digits", "data=small,digits"]
    points = compose.sweep_points(compose.hydra_arguments(left))
    configs = [cfg for _, cfg in compose.compose_points(points) if isinstance(cfg, Config)]
    assert [cfg.data.arguments["batch_size"] for cfg in configs] == [720, 64]


def test_a_plugin_brings_its_conf(tmp_path: Path, monkeypatch):
    site = tmp_path / "site"
    write(site / "plug" / "__init__.py", "")
    write(site / "plug" / "net.py", (tmp_path / "study/study/model.py").read_text())
    write(site / "plug/conf/model/plugged.yaml", "# A plug.\n_target_: plug.net.Net\nwidth: 8\n")
    write(site / "plug/conf/adapter/lora.yaml", "method: none\n")
    metadata = site / "plug-1.0.dist-info"
    write(metadata / "METADATA", "Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    write(metadata / "entry_points.txt", "[lora_lab.plugins]\nplug = plug\n")
    monkeypatch.syspath_prepend(site)
    forget()
    assert options()["model"]["plugged"] == "A plug."
    cfg = composed("experiment=digits", "model=plugged")
    assert cfg.model.callee.__module__ == "plug.net"
    assert cfg.adapter.method == "lora"
    for file in sorted((site / "plug/conf").rglob("*.yaml")):
        file.unlink()
        file.parent.rmdir()
    (site / "plug/conf").rmdir()
    forget()
    with pytest.raises(ConfigError, match=r"the plugin plug .*no folder plug/conf"):
        options()


def test_commands_of_a_project(study: Path, monkeypatch, capsys):
    monkeypatch.chdir(study)
    write(study.parent / "more/model/wide.yaml", "_target_: study.model.Net\nwidth: 65\n")
    swept = ("model=net,wide", "adapter.r=1", "--config-dir=../more")
    assert command(monkeypatch, "train", "-m", *STUDY, *swept) == 0
    runs = find_runs(Path("runs"))
    assert {run.config["model"]["width"] for run in runs} == {64, 65}
    assert {*runs[0].status["code"]} >= {"study.model", "study.data"}
    path = str(runs[0].path)
    monkeypatch.chdir(study.parent)
    # Outside, the run's modules are not known. A process that was in the project still has them.
    for name in (project.PROJECT_VARIABLE, project.CONFIG_DIRS_VARIABLE):
        monkeypatch.setenv(name, "")
    sys.path.remove(str(study))
    forget()
    assert command(monkeypatch, "analyze", f"study/{path}") == 2
    assert "--project DIR" in " ".join(capsys.readouterr().err.split())
    arguments = ("--project", "study", "--truncation=none")
    assert command(monkeypatch, "analyze", f"study/{path}", *arguments) == 0
    monkeypatch.chdir(study)
    assert command(monkeypatch, "reproduce", path) == 0
    assert command(monkeypatch, "best") == 0
    assert "lora-lab train experiment=study" in capsys.readouterr().out
    model = study / "study/model.py"
    model.write_text(model.read_text().replace("relu()", "tanh()"))
    forget()
    assert command(monkeypatch, "train", *STUDY, "adapter.r=1") == 2
    assert "study.model changed" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["-m", "hydra/launcher=packed", "seed=1,2"],
        ["-m", "hydra/launcher=joblib", "seed=1,2"],
        ["-m", "hydra/launcher=submitit_local", "seed=1,2"],
        ["-m", "hydra/launcher=submitit_local", "hydra.launcher.pack=true", "seed=1,2"],
        ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
    ],
)
def test_other_processes_know_the_project_and_its_folders(study: Path, monkeypatch, settings):
    """From another folder, so that only the environment tells them of the project."""
    write(Path("more/model/wide.yaml"), "_target_: study.model.Net\nwidth: 65\n")
    for name in (project.PROJECT_VARIABLE, project.CONFIG_DIRS_VARIABLE):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    lora_lab = [sys.executable, "-m", "lora_lab.cli", "train", "--project", "study", "-cd", "more"]
    subprocess.run([*lora_lab, *STUDY, "model=wide", *settings], check=True)
    runs = find_runs(Path("runs"))
    assert [run.finished for run in runs] == [True] * len(runs)
    assert len(runs) == (2 if "-m" in settings else 1)
    assert {run.config["model"]["width"] for run in runs} == {65}


@pytest.mark.parametrize(
    ("files", "setting", "says"),
    [
        ({}, "model._target_=study.model.Nett", "no attribute 'Nett'; nearest: Net"),
        ({}, "model._target_=study.modle.Net", "'study.modle'; nearest: model"),
        ({}, "model._target_=studdy.model.Net", "'studdy'; nearest: study"),
        ({"model.py": "import pandsa"}, "seed=1", "'pandsa' (imported by study.model)"),
        ({"model.py": "1 / 0"}, "seed=1", "division by zero"),
    ],
)
def test_what_cannot_be_imported(study: Path, monkeypatch, capsys, files, setting, says):
    for name, text in files.items():
        write(study / "study" / name, text)
    monkeypatch.chdir(study)
    assert command(monkeypatch, "train", *STUDY, setting) == 2
    assert says in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("study", "is not empty"),
        ("json", "json is a name of Python's own; nearest: json_study"),
        ("torch", "a package torch is installed; nearest: torch_study"),
        ("2nd", "must begin with a letter"),
    ],
)
def test_names_that_a_new_project_cannot_have(study: Path, folder: str, says: str):
    before = sorted(study.parent.rglob("*"))
    with pytest.raises(ConfigError, match=re.escape(says)):
        write_project(Path(folder))
    assert sorted(study.parent.rglob("*")) == before


def test_our_sweep_files_are_there_where_the_package_is_installed(monkeypatch, capsys):
    ours = Path(__file__).parents[2] / "sweeps"
    monkeypatch.setattr(project, "package_folder", lambda name: ours)
    arguments = ("adapter.r=1", "seed=0", "--dry-run")
    assert command(monkeypatch, "sweep", "sweeps/rank.yaml", *arguments) == 0
    assert "lora-lab train experiment=digits adapter.r=1 seed=0" in capsys.readouterr().out
    assert command(monkeypatch, "sweep", "other/rank.yaml", *arguments) == 2
    write(Path("sweeps/rank.yaml"), "method: none")
    assert command(monkeypatch, "sweep", "sweeps/rank.yaml", *arguments) == 2
    assert "method=none" in capsys.readouterr().err


def test_a_new_project_has_its_folders_name(study: Path):
    assert write_project(Path("my-study.2")) == "my_study_2"
    written = [path.relative_to("my-study.2").as_posix() for path in Path("my-study.2").rglob("*")]
    expected = [path.relative_to(study).as_posix() for path in study.rglob("*")]
    assert sorted(written) == sorted(name.replace("study", "my_study_2") for name in expected)
    text = Path("my-study.2/conf/model/net.yaml").read_text()
    assert "_target_: my_study_2.model.Net" in text
