"""Whether a stored run's config names code that may be run: someone else may have sent the run."""

import inspect
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

from lora_lab.config.components import Component, TrainedBase
from lora_lab.config.schema import Config, ConfigError

LIBRARIES = ("torch", "transformers", "timm")
"""Packages whose classes may be called. Their functions may not: some run what a file holds."""


def check_trusted(cfg: Config, folder: Path) -> None:
    """Raises ConfigError where the config in a run directory names code that may be anything's.

    What may be run is lora_lab, the classes of LIBRARIES, and what the user's own import path
    holds: modules of PYTHONPATH and of the project that the command belongs to, and installed
    packages that lora_lab does not need. Not Python's library, what lora_lab depends on, what came
    with the run (a module in the run directory, or a package or folder of modules that it lies in,
    as runs.study.RUN.model), or the code beside a model's weights (`model.remote_code`).
    """
    settings = [
        f"{key}._target_={component.target}"
        for key, component in components_of(cfg).items()
        if not _is_trusted(component, folder)
    ]
    if cfg.model.arguments.get("remote_code"):
        settings.append(f"model.remote_code=true (model.path={cfg.model.arguments.get('path')})")
    if settings:
        raise ConfigError(
            f"{folder / 'config.yaml'} would run code that is neither lora_lab's nor in your "
            f"import path, or that lies with the run: {', '.join(settings)}; --trust runs it"
        )


def components_of(cfg: Config) -> dict[str, Component]:
    """What the config names by a `_target_`: key → component."""
    components = {"data": cfg.data, "model": cfg.model, "optimizer": cfg.optimizer}
    if isinstance(cfg.base, TrainedBase):
        components["base.optimizer"] = cfg.base.optimizer
    if cfg.forget is not None:
        components["forget"] = cfg.forget
    return components


def _is_trusted(component: Component, folder: Path) -> bool:
    """Whether the code of a `_target_` may be run. Imports nothing but a library of LIBRARIES."""
    package = re.split("[.:]", component.target)[0]
    if package == "lora_lab":
        return True
    if package in LIBRARIES:
        with suppress(Exception):  # what cannot be imported is told as for any config
            return inspect.isclass(component.callee)
        return True
    if package in ("__main__", *sys.stdlib_module_names) or _is_dependency(package):
        return False
    try:
        module = find_spec(package)
    except ValueError:  # a module that no file holds
        return False
    if module is None:
        return True
    named = [module.origin, *(module.submodule_search_locations or [])]
    places, run = [Path(place).resolve() for place in named if place], folder.resolve()
    return not any(run.is_relative_to(p) or p.is_relative_to(run) for p in places)


def _is_dependency(package: str) -> bool:
    """Whether a package belongs to a distribution that lora_lab requires."""
    try:
        required = {re.split(r"[^\w.-]", line)[0] for line in requires("lora_lab") or ()}
    except PackageNotFoundError:  # run from its source
        return False
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in required}
    distributions = packages_distributions().get(package, [])
    return any(re.sub(r"[-_.]+", "-", name).lower() in names for name in distributions)
