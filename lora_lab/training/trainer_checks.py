"""Checks of `trainer`: its arguments, the devices that it wants, and what FSDP cannot do."""

import os

import lightning.pytorch as pl
import torch

from lora_lab.config.checks import check_arguments
from lora_lab.config.schema import Config, ConfigError, Lora
from lora_lab.training.loop import check_length, trainer_arguments

RESERVED_TRAINER_ARGUMENTS = (
    *("logger", "callbacks", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps", "use_distributed_sampler"),
)
"""Arguments of Lightning's Trainer that each run sets, so that a config must not."""


def check_trainer(cfg: Config) -> int:
    """The number of processes that the Trainer starts. Raises ConfigError."""
    arguments = cfg.trainer.model_dump()
    if reserved := [name for name in arguments if name in RESERVED_TRAINER_ARGUMENTS]:
        raise ConfigError(f"trainer.{reserved[0]}: a run sets this itself")
    _check_gpus(cfg.trainer.accelerator, cfg.trainer.devices)
    check_arguments("trainer", pl.Trainer, arguments)
    check_length(arguments)
    nodes, devices = arguments.get("num_nodes", 1), cfg.trainer.devices
    if nodes != 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: is started on each node, by `torchrun --nnodes={nodes} "
            f"--nproc-per-node={devices} … -m lora_lab.train …`"
        )
    if arguments.get("strategy") == "fsdp":
        _check_fsdp(cfg)
        arguments["strategy"] = "ddp"  # asks for as many processes
    try:
        arguments = trainer_arguments(arguments)
        trainer = pl.Trainer(**arguments, logger=False, enable_checkpointing=False)
    except (TypeError, ValueError, RuntimeError) as error:  # Lightning's errors are RuntimeErrors
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
    return trainer.world_size


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
    if cfg.spectra.first_step:
        raise ConfigError("spectra.first_step=true: not with trainer=fsdp")
    if cfg.trainer.model_dump()["precision"] == "64-true":
        raise ConfigError("trainer.precision=64-true: not with trainer=fsdp")
