"""How Hydra is told of the folders of configs."""

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lora_lab.config.folders import config_folders, package_conf


class ConfigFolders(SearchPathPlugin):
    """Puts a project's folder before lora_lab's own, those of plugins and --config-dir after it.

    Hydra asks for them wherever it begins to compose: for one run, for the points of a multirun,
    and for a launcher, which sends its jobs what it was told.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the folders to Hydra's search path, in which "main" is lora_lab's own."""
        folders = config_folders()
        ours = folders.index(package_conf())
        for folder in folders[:ours]:
            search_path.prepend("project", f"file://{folder}", SearchPathQuery("main", None))
        for folder in folders[ours + 1 :]:
            search_path.append("lora_lab", f"file://{folder}")
