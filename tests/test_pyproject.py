"""What pyproject.toml lists is what the package has.

Run: make test ARGS=tests/test_pyproject.py
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_all_modules_that_name_shapes_are_checked_in_tests():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    (option,) = (one for one in options["addopts"] if one.startswith("--jaxtyping-packages="))
    named = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "lora_lab").rglob("*.py")
        if "from jaxtyping import" in path.read_text()
    }
    assert {*option.partition("=")[2].split(",")} == named | {"tests.checker"}
