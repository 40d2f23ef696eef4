"""Checks of what a command sets of Hydra itself: its launcher, that launcher's settings."""

from collections.abc import Sequence
from typing import Any, Literal

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from lora_lab.config import compose
from lora_lab.config.checks import error_messages
from lora_lab.config.components import Node
from lora_lab.config.messages import hydra_error_message
from lora_lab.config.schema import ConfigError


class Launcher(Node, extra="allow"):
    """Settings of conf/hydra/launcher that have a range, and the others unchecked."""

    n_jobs: PositiveInt | Literal[-1] | None = None
    pack: bool = False
    max_runs: PositiveInt | None = None
    array_parallelism: PositiveInt = 1
    timeout_min: PositiveInt = 1
    max_num_timeout: NonNegativeInt = 0
    signal_delay_s: NonNegativeInt = 0
    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = 1
    cpus_per_task: PositiveInt | None = None
    gpus_per_node: NonNegativeInt | str | None = None


class Sweeper(Node, extra="allow"):
    """Settings of Hydra's own sweeper that have a range."""

    max_batch_size: PositiveInt | None = None


def check_hydra_settings(arguments: Sequence[str]) -> None:
    """Raises ConfigError where hydra/launcher, or a hydra.* setting of a multirun, is wrong."""
    overrides = [a for a in arguments if a.lstrip("+~").startswith(("hydra.", "hydra/"))]
    overrides = [a for a in overrides if a != "hydra/sweeper=points"]  # the program's own
    if not overrides:
        return
    try:
        with compose.composition():
            composed = hydra.compose("train", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(hydra_error_message(error)) from None
    for key, kind in {"launcher": Launcher, "sweeper": Sweeper}.items():
        content: Any = OmegaConf.to_container(composed.hydra[key])
        try:
            kind.model_validate(content)
        except ValidationError as error:
            messages = error_messages(error, content, ["hydra", key])
            raise ConfigError("\n".join(messages)) from None
