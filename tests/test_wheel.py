"""The wheel: installed in a virtual environment of its own, run from another folder."""

import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import lora_lab
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]


def test_every_package_is_packaged():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {path.parent.relative_to(ROOT) for path in (ROOT / "lora_lab").rglob("__init__.py")}
    assert set(told) == {".".join(path.parts) for path in there} | {"lora_lab.conf"}


def test_a_wheel_runs_elsewhere(tmp_path: Path):
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
    where = [bin_ / "python", "-c", "import lora_lab; print(lora_lab.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).is_relative_to(packages)
    version = [bin_ / "lora-lab", "--version"]
    said = subprocess.run(version, cwd=elsewhere, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["lora_lab", lora_lab.__version__]
    train = [bin_ / "lora-lab", "train", "tracking=off", *SMALL["shift"]]
    done = subprocess.run(train, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((elsewhere / "runs" / "shift").glob("*/report/table.md"))
