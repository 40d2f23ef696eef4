"""A project: a folder of the user's own configs and modules, marked by a file lora_lab.yaml.

    study/
      lora_lab.yaml    marks the folder; may be empty
      conf/            configs, found before lora_lab's own
      study/           a package, which `_target_: study.model.Net` in conf/ names

A command belongs to the project that `--project DIR` names, or the variable LORA_LAB_PROJECT, or
whose folder it is started in or below. `enter` makes the project's modules importable and tells
Hydra of its conf/ (config/search_path.py). What the command starts (processes for devices, jobs on
a cluster) knows the project by the environment.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lora_lab.runs import is_run

MARKER = "lora_lab.yaml"
"""The file that marks a project. It may set where its conf/ and its modules are."""

DEFAULTS = {"conf": "conf", "import_path": "."}
"""The keys that MARKER may set: folders, from where it lies."""

PROJECT_VARIABLE = "LORA_LAB_PROJECT"
CONFIG_DIRS_VARIABLE = "LORA_LAB_CONFIG_DIRS"
"""Variables of the environment: the folder of the project, and those of --config-dir."""

PROJECT_FLAG = "--project"
CONFIG_DIR_FLAGS = ("--config-dir", "-cd")


@dataclass(frozen=True)
class Project:
    """A folder with a MARKER: where its configs are, and what its modules are imported from."""

    folder: Path
    conf: Path
    import_path: Path


project: Project | None = None
"""The project that this process is in."""

config_dirs: tuple[Path, ...] = ()
"""More folders of configs, of --config-dir and hydra.searchpath, found after lora_lab's own."""


def enter(arguments: Sequence[str] = ()) -> list[str]:
    """Enters the project of a command, and gives the arguments without those that are read here.

    These are --project DIR, --config-dir DIR (-cd) and hydra.searchpath=[DIR, pkg://PACKAGE.FOLDER].
    Modules of the project are looked for last, so that none hides an installed one. Raises
    ConfigError where a folder does not exist, or where MARKER has an unknown key.
    """
    global project, config_dirs
    folders, dirs, rest = [], [], iter(arguments)
    left = []
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == PROJECT_FLAG or name in CONFIG_DIR_FLAGS:
            value = value if equals else next(rest, "")
            if not value:
                raise _error(f"{name}: must be followed by a folder")
            (folders if name == PROJECT_FLAG else dirs).append(_folder(name, value))
        elif re.fullmatch(r"\+{0,2}hydra\.searchpath", name) and equals:
            dirs += [_folder(name, entry) for entry in _entries(value)]
        else:
            left.append(argument)
    inherited = filter(None, os.environ.get(CONFIG_DIRS_VARIABLE, "").split(os.pathsep))
    config_dirs = tuple(dict.fromkeys([*dirs, *map(Path, inherited)]))
    if config_dirs:
        os.environ[CONFIG_DIRS_VARIABLE] = os.pathsep.join(map(str, config_dirs))
    folder = folders[-1] if folders else _folder_of_command()
    project = _read(folder) if folder else None
    if project:
        os.environ[PROJECT_VARIABLE] = str(project.folder)
        if str(project.import_path) not in sys.path:
            sys.path.append(str(project.import_path))
    return left


def _folder_of_command() -> Path | None:
    """The project that the environment names, or the one that the current folder is in.

    A MARKER in a run directory is none: someone else may have sent it. Raises ConfigError where
    another user has placed a MARKER in a folder above, as anyone may in /tmp.
    """
    if named := os.environ.get(PROJECT_VARIABLE):
        return _folder(PROJECT_VARIABLE, named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        marker = folder / MARKER
        if marker.is_file() and not is_run(folder):
            if marker.stat().st_uid != os.getuid():
                raise _error(
                    f"{marker} belongs to another user, who could have your command run other "
                    f"code: --project {folder} uses it"
                )
            return folder
    return None


def _read(folder: Path) -> Project:
    """The project in a folder, by its MARKER, or by the defaults where it has none."""
    marker = folder / MARKER
    settings: Any = {}
    if marker.is_file():
        try:
            settings = yaml.safe_load(marker.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _error(f"{marker}: cannot be read: {' '.join(str(error).split())}") from None
    elif not (folder / DEFAULTS["conf"]).is_dir():
        raise _error(f"{folder}: has no {MARKER} and no conf/; `lora-lab new` makes a project")
    if not isinstance(settings, dict):
        raise _error(f"{marker}: must have keys with values: {_known()}")
    for key in settings.keys() - DEFAULTS.keys():
        raise _error(f"{marker}: {key}: there is no such key{_nearest(key)} ({_known()})")
    paths = {
        key: _folder(f"{marker}: {key}", str(folder / str(settings.get(key, default))))
        for key, default in DEFAULTS.items()
    }
    return Project(folder, **paths)


def _folder(name: str, text: str) -> Path:
    """The folder that a setting names: a path, file://PATH or pkg://PACKAGE.FOLDER."""
    scheme, separator, place = text.partition("://")
    path: Path | None = Path(place if separator else text).expanduser().absolute()
    if separator and scheme == "pkg":
        path = package_folder(place)
    if path is None or not path.is_dir():
        from lora_lab.config.errors import nearest_folder

        hint = nearest_folder(text) if path else ""
        raise _error(f"{name}={text}: there is no such folder{hint}")
    return Path(os.path.normpath(path))


def package_folder(dotted: str) -> Path | None:
    """The folder of PACKAGE.FOLDER, without an import of it; None where it is not installed."""
    package, *folders = dotted.split(".")
    spec = find_spec(package) if package else None
    places = [*(spec.submodule_search_locations or [])] if spec else []
    return Path(places[0], *folders) if places else None


def _entries(value: str) -> list[str]:
    """The folders of hydra.searchpath=[A, B]."""
    content: Any = yaml.safe_load(value)
    entries = [content] if isinstance(content, str) else content
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise _error(f"hydra.searchpath={value}: must be a list of folders, [DIR, pkg://PACKAGE]")
    return entries


def _known() -> str:
    return ", ".join(f"{key}: {default}" for key, default in DEFAULTS.items())


def _nearest(key: object) -> str:
    from lora_lab.config.errors import nearest

    return nearest(key, DEFAULTS)


def _error(message: str) -> ValueError:
    """A ConfigError, whose module takes a tenth of a second to import."""
    from lora_lab.config.errors import ConfigError

    return ConfigError(message)
