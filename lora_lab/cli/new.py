"""`lora-lab new`: writes a small project, from the files of new_project/."""

import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from lora_lab.config.errors import ConfigError

TEMPLATE = Path(__file__).parent / "new_project"
"""The files of a project, in which my_project stands for its name."""

PLACEHOLDER = "my_project"
LONGEST_NAME = 64
"""Characters of an experiment's name, at most; W&B's rule for a tag."""


def write_project(folder: Path) -> str:
    """Writes a project into a folder that is new or empty, and gives its name.

    The name is the folder's, as a Python package can have it: my-study → my_study. Raises
    ConfigError where the folder has files, or where an installed package has the name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty; a project is written into a new folder")
    name = _package_name(folder.resolve().name)
    for file in sorted(TEMPLATE.rglob("*")):
        path = file.relative_to(TEMPLATE)
        if file.is_dir() or "__pycache__" in path.parts:
            continue
        written = folder / str(path).replace(PLACEHOLDER, name).replace("gitignore", ".gitignore")
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(file.read_text().replace(PLACEHOLDER, name))
    (folder / name / "__init__.py").touch()
    return name


def _package_name(folder_name: str) -> str:
    """The name of a project in a folder of this name. Raises ConfigError where it cannot be one."""
    name = re.sub(r"\W", "_", folder_name).lower()
    other = f"; nearest: {name}_study"
    if not name.isascii() or not name.isidentifier() or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"{folder_name}: must begin with a letter and have letters, digits, - and _ alone, "
            f"{LONGEST_NAME} at most: the project's package has the folder's name"
        )
    if keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise ConfigError(f"{folder_name}: {name} is a name of Python's own{other}")
    installed = find_spec(name)
    if installed is not None and installed.origin is not None:  # no origin: a folder with no files
        raise ConfigError(f"{folder_name}: a package {name} is installed{other}")
    return name
