"""Makes the launchers of conf/hydra/launcher known to Hydra."""

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from lora_lab.sweeps.launchers.processes import ProcessLauncher
from lora_lab.sweeps.launchers.submission import LocalLauncher, SlurmLauncher


def register() -> None:
    """Makes the launchers of conf/hydra/launcher known to Hydra."""
    plugins, store = Plugins.instance(), ConfigStore.instance()
    for plugin in (ProcessLauncher, LocalLauncher, SlurmLauncher):
        # Hydra takes only plugins whose name begins with hydra_plugins.
        plugins.class_name_to_class[f"hydra_plugins.lora_lab.{plugin.__name__}"] = plugin
    for name in ("joblib", "submitit_local", "submitit_slurm"):
        # Hydra's plugins store a config by the same name, with which it would merge our YAML.
        store.repo["hydra"]["launcher"].pop(f"{name}.yaml", None)
