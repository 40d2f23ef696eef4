"""The wheel: it has all packages, and a project of one's own runs from it, with nothing edited.

Truth: a real installation in a new virtual environment, run from another folder.

Run: make test ARGS=tests/test_wheel.py
"""

import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import lora_lab

ROOT = Path(__file__).parents[1]


def test_every_package_is_packaged():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lora_lab").rglob("__init__.py")}
    at_the_top = {"lora_lab.conf", "lora_lab.sweep_files"}
    assert set(declared) == {".".join(path.parts) for path in folders} | at_the_top


@pytest.mark.slow
def test_a_wheel_runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    install = [bin_ / "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # What lora_lab needs is borrowed from here; lora_lab itself must be the wheel's.
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(site.getsitepackages()[0])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    locate = [bin_ / "python", "-c", "import lora_lab; print(lora_lab.__file__)"]
    module_path = subprocess.run(
        locate, cwd=elsewhere, check=True, capture_output=True, text=True
    ).stdout
    assert Path(module_path.strip()).is_relative_to(packages)
    version = [bin_ / "lora-lab", "--version"]
    printed = subprocess.run(
        version, cwd=elsewhere, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["lora_lab", lora_lab.__version__]
    assert (packages / "lora_lab/sweep_files/rank.yaml").read_text() == (
        ROOT / "sweeps/rank.yaml"
    ).read_text()
    runs_a_project_of_ones_own(bin_ / "lora-lab", elsewhere)


def runs_a_project_of_ones_own(lora_lab: Path, folder: Path) -> None:
    """Makes a project, sweeps over two ranks in it, and writes the report; without PYTHONPATH."""
    brief = ["base.epochs=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
    train = ["train", "-m", "experiment=mine", "adapter.r=1,2", "tracking=off", *brief]
    for cwd, arguments in ((folder, ["new", "mine"]), (folder / "mine", train)):
        done = subprocess.run([lora_lab, *arguments], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    report = [lora_lab, "report"]
    printed = subprocess.run(report, cwd=folder / "mine", capture_output=True, text=True)
    assert "2 finished" in printed.stdout, printed.stdout + printed.stderr
    assert (folder / "mine/runs/report/index.html").exists()
