"""The folders in which the YAML files of configs are looked for, in their order.

A file in an earlier folder stands before one of the same group and name in a later one:

    PROJECT/conf        of the project that the command belongs to (config/project.py)
    lora_lab/conf       the package's own
    PACKAGE/conf        of each installed package that an entry point `lora_lab.plugins` names
    --config-dir DIR    and hydra.searchpath=[DIR]
"""

from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

from lora_lab.config import project

PLUGINS = "lora_lab.plugins"
"""The group of entry points by which an installed package brings its conf/: NAME = "PACKAGE"."""


def config_folders() -> tuple[Path, ...]:
    """All of them, in their order. Raises ConfigError where a plugin has no conf/."""
    before = (project.project.conf,) if project.project else ()
    return (*before, package_conf(), *plugin_folders(), *project.config_dirs)


@cache
def package_conf() -> Path:
    """The folder of lora_lab's own configs."""
    return Path(str(files("lora_lab.conf")))


@cache
def plugin_folders() -> tuple[Path, ...]:
    """conf/ of each plugin, by the names of their entry points. No plugin is imported."""
    folders = []
    for point in sorted(entry_points(group=PLUGINS), key=lambda point: point.name):
        package = project.package_folder(point.module)
        if package is None or not (package / "conf").is_dir():
            from lora_lab.config.errors import ConfigError

            raise ConfigError(
                f"the plugin {point.name} (entry point {PLUGINS}: {point.value}): there is no "
                f"folder {point.module.replace('.', '/')}/conf; reinstall or remove its package"
            )
        folders.append(package / "conf")
    return tuple(folders)
