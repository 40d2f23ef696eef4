"""Checks of `trainer`: its arguments, the devices that it wants, and what FSDP cannot do."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from lora_lab.config.checks import check_arguments
from lora_lab.config.schema import Config, ConfigError, Lora
from lora_lab.training.loop import trainer_arguments

RESERVED_TRAINER_ARGUMENTS = (
    *("logger", "callbacks", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps", "use_distributed_sampler"),
)
"""Arguments of Lightning's Trainer that each run sets, so that a config must not."""


def _is_share_or_count(n: Any) -> bool:
    """Whether it is a share above 0 and at most 1.0, or a number of batches."""
    return n is not True and (0 < n <= 1 if isinstance(n, float) else n >= 1)


SHARE_OR_COUNT = "a number of batches, or a share of an epoch above 0 and at most 1.0"
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "devices": (
        "auto, 1 or more, -1 (all), or a list of GPUs",
        lambda n: (
            n == -1 or (n > 0 if isinstance(n, int) else len(n) == len({*n}) > 0)
            if not isinstance(n, str)
            else n != ""
        ),
    ),
    "max_time": ("more than no time", lambda time: any(map(int, re.findall(r"\d+", str(time))))),
    "max_steps": ("-1, or 1 or more", lambda n: n == -1 or n >= 1),
    "min_steps": ("1 or more", lambda n: n >= 1),
    "min_epochs": ("1 or more", lambda n: n >= 1),
    "val_check_interval": (
        "a whole number of steps, or a share of an epoch below 1",
        lambda n: 0 < n < 1 or (n >= 1 and float(n).is_integer()),
    ),
    "log_every_n_steps": ("1 or more", lambda n: n >= 1),
    "accumulate_grad_batches": ("1 or more", lambda n: n >= 1),
    "limit_train_batches": (SHARE_OR_COUNT, _is_share_or_count),
    "limit_val_batches": (SHARE_OR_COUNT, _is_share_or_count),
    "gradient_clip_val": ("0 or more (0 and null: no clipping)", lambda n: n >= 0),
    "fast_dev_run": ("false: trainer.limit_train_batches=N makes a run short", lambda n: not n),
    "barebones": ("false: a run logs its numbers", lambda n: not n),
    "overfit_batches": ("0: data.limit=N trains on N rows, over and over", lambda n: n == 0),
}
"""Arguments of Lightning's Trainer that a run takes in a narrower range than Lightning's.

With the rule in words, and as a function of a value of the type that Lightning's signature has.
"""


@dataclass(frozen=True)
class Devices:
    """The devices that train a run, by the names of Trainer's arguments; none is `auto` any more.

    A run on one device has the strategy that its config says, which is `auto` by default.
    """

    accelerator: str
    """Lightning's name of it, as cpu or cuda."""
    devices: int
    """How many each node has."""
    num_nodes: int
    strategy: str

    @property
    def processes(self) -> int:
        """Number of processes that train the run, each on its device."""
        return self.devices * self.num_nodes

    def __str__(self) -> str:
        nodes = f" on {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        how = f" ({self.strategy})" if self.strategy != "auto" else ""
        return f"{self.processes} × {self.accelerator}{nodes}{how}"


def check_trainer(cfg: Config) -> Devices:
    """The devices that the Trainer trains on. Raises ConfigError."""
    arguments = cfg.trainer.model_dump()
    if reserved := [name for name in arguments if name in RESERVED_TRAINER_ARGUMENTS]:
        raise ConfigError(f"trainer.{reserved[0]}: a run sets this itself")
    _check_gpus(cfg.trainer.accelerator, cfg.trainer.devices)
    check_arguments("trainer", pl.Trainer, arguments)
    _check_ranges(arguments)
    if arguments["max_epochs"] == arguments.get("max_steps", -1) == -1:
        raise ConfigError("trainer.max_epochs=-1: has no end without trainer.max_steps")
    nodes, devices = arguments.get("num_nodes", 1), cfg.trainer.devices
    if nodes != 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: is started on each node, by `torchrun --nnodes={nodes} "
            f"--nproc-per-node={devices} … -m lora_lab.train …`"
        )
    strategy = arguments.get("strategy", "auto")
    if strategy == "fsdp":
        _check_fsdp(cfg)
        arguments["strategy"] = "ddp"  # asks for as many processes
    trainer = _build(trainer_arguments(arguments))
    if strategy == "auto" and trainer.world_size > 1:
        strategy = "ddp"  # what Lightning takes
    name = trainer.accelerator.name()
    return Devices(name, trainer.num_devices, trainer.num_nodes, strategy)


def _check_ranges(arguments: dict[str, Any]) -> None:
    """Raises ConfigError for a value that RULES leave out."""
    for name, value in arguments.items():
        rule, is_right = RULES.get(name, ("", lambda _: True))
        if value is not None and not is_right(value):
            raise ConfigError(f"trainer.{name}={value}: must be {rule}")


def _build(arguments: dict[str, Any]) -> pl.Trainer:
    """Lightning's Trainer with these arguments. Raises ConfigError where Lightning refuses."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    try:
        return pl.Trainer(**arguments, **quiet)
    except Exception as error:  # of many types: its own, import errors, any of Python's
        message = " ".join(str(error).split())
    for name, value in arguments.items():  # the argument that it refuses by itself, for the message
        try:
            pl.Trainer(**{name: value}, **quiet)
        except Exception as error:
            if " ".join(str(error).split()) == message:
                raise ConfigError(f"trainer.{name}={value}: {message}") from None
    raise ConfigError(f"trainer: {message}")


def _check_gpus(accelerator: str, devices: int | str | list[int]) -> None:
    """Raises ConfigError where more GPUs are wanted than the machine has."""
    wanted = len(devices) if isinstance(devices, list) else devices
    available = torch.cuda.device_count()
    is_too_many = isinstance(wanted, int) and wanted > available
    if accelerator in ("gpu", "cuda") and (available == 0 or is_too_many):
        raise ConfigError(
            f"trainer.accelerator={accelerator} trainer.devices={devices}: this machine has "
            f"{available} CUDA GPUs; trainer=cpu or trainer=auto runs without one"
        )


def _check_fsdp(cfg: Config) -> None:
    """Raises ConfigError for settings that need a weight as one tensor in each process."""
    if isinstance(cfg.adapter, Lora) and cfg.adapter.dora:
        raise ConfigError("adapter.dora=true: not with trainer=fsdp")
    if isinstance(cfg.adapter, Lora) and cfg.adapter.heal:
        raise ConfigError(
            f"adapter.heal={cfg.adapter.heal}: not with trainer=fsdp, as what follows the training "
            "runs on one device, which need not hold the model; adapter.heal=0 cuts alone"
        )
    if cfg.spectra.first_step:
        raise ConfigError("spectra.first_step=true: not with trainer=fsdp")
    if cfg.trainer.model_dump()["precision"] == "64-true":
        raise ConfigError("trainer.precision=64-true: not with trainer=fsdp")


def on_one_device(cfg: Config) -> Config:
    """The config with a trainer on one device; the number of devices does not change a result."""
    configured = cfg.trainer.model_dump()
    change = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    change = {key: value for key, value in change.items() if key in configured}
    return cfg.model_copy(update={"trainer": cfg.trainer.model_copy(update=change)})
