"""The wheel: it has all packages, and `lora-lab train` runs from it.

Truth: a real installation in a new virtual environment, run from another folder.

Run: make test ARGS=tests/test_wheel.py
"""

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
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lora_lab").rglob("__init__.py")}
    assert set(declared) == {".".join(path.parts) for path in folders} | {"lora_lab.conf"}


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
    train = [bin_ / "lora-lab", "train", "tracking=off", *SMALL["shift"]]
    trained = subprocess.run(train, cwd=elsewhere, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert list((elsewhere / "runs" / "shift").glob("*/report/table.md"))
