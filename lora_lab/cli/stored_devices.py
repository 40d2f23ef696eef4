"""The devices that a stored run was trained on, and those that its reproduction takes."""

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lora_lab.config.schema import Config, ConfigError
from lora_lab.runs import DEVICE_KEYS, Run
from lora_lab.training.trainer_checks import Devices, check_trainer

ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


def recorded_devices(run: Run) -> Devices | None:
    """The devices in a run's status.json; None where an earlier version recorded none."""
    try:
        return TypeAdapter(Devices).validate_python(run.status.get("devices"))
    except ValidationError:
        return None


def on_devices(cfg: Config, run: Run, number: int | None) -> tuple[Config, str]:
    """The config with the devices of a reproduction, and a line that says which and why.

    They are those that the stored run had, or `number` of that kind. Where this machine has them
    not: one device of the kind that it has, or `number` of these. An earlier version recorded none:
    then what the config says counts. Raises ConfigError where `number` of neither kind are here.
    """
    stored = recorded_devices(run)
    configured = {key: v for key, v in cfg.trainer.model_dump().items() if key in DEVICE_KEYS}
    settings = asdict(stored) | {"devices": stored.processes} if stored else configured
    settings = {**settings, "num_nodes": 1}  # processes of several nodes can be on one machine
    if number:
        settings |= ONE_DEVICE if number == 1 else {"devices": number}
    reason = ", by --devices" if number else ""
    try:
        new_cfg, devices = _with_devices(cfg, settings)
    except ConfigError:
        settings |= {"accelerator": "auto", **({} if number else ONE_DEVICE)}
        try:
            new_cfg, devices = _with_devices(cfg, settings)
        except ConfigError as error:
            raise ConfigError(f"--devices {number}: {error}" if number else str(error)) from None
        reason = ", as this machine lacks those"
    if devices == stored:
        return new_cfg, f"devices: {devices}, as the stored run"
    config_text = " ".join(f"{key}={value}" for key, value in configured.items())
    had = stored or f"not recorded, by its config {config_text}"
    return new_cfg, f"devices: stored {had}; new {devices}{reason}"


def _with_devices(cfg: Config, settings: dict[str, Any]) -> tuple[Config, Devices]:
    """The config with these settings of `trainer`, and its devices. Raises ConfigError."""
    changed = cfg.model_copy(update={"trainer": cfg.trainer.model_copy(update=settings)})
    return changed, check_trainer(changed)
