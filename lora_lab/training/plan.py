"""Checks that a run is possible before any data is drawn, and builds its parts from its config."""

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError, RankError, Recipe, Site, Target, TargetError
from lora_lab.config.checks import check_arguments, import_target, resolve_component
from lora_lab.config.schema import CheckpointBase, Config, ConfigError, Lora, Optimizer, TrainedBase
from lora_lab.data import Data, Phase
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import bases, pretrained_base

RESERVED_TRAINER_ARGUMENTS = (
    *("logger", "callbacks", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps", "use_distributed_sampler"),
)
"""Arguments of Lightning's Trainer that each run sets, so that a config must not."""

NO_OPERATION = nullcontext()


class Unprofiled(PassThroughProfiler):
    """Lightning's default of no profiler, without its cost.

    Lightning wraps some 35 hooks a step in `profile`, by default a generator of 0.9 µs each. One
    context that does nothing takes 0.2 µs, which saves 7% of Lightning's overhead.
    """

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # pyright: ignore
        """A context that does nothing."""
        return NO_OPERATION


@dataclass(frozen=True)
class Plan:
    """A run whose settings have all been checked; builds its data, model, adapters and Trainers."""

    cfg: Config
    sites: list[Site]
    processes: int = 1
    """Number of processes that train the run, each on its device."""
    new_parameters: tuple[str, ...] = ()
    """Names of the parameters that the pretrained base's files do not hold, as a new head's."""

    @property
    def path(self) -> Path:
        """The run directory, named by main settings, the seed and the config's hash."""
        name = f"{self.cfg.readable_name()}-seed{self.cfg.seed}-{self.cfg.identity()[:10]}"
        return Path(self.cfg.runs_dir) / self.cfg.name / name

    def data(self, phase: Phase) -> Data:
        """The data module of one phase (`base` or `adapt`). It draws its data in `setup`."""
        return self.cfg.data.callee(phase=phase, **self.cfg.data.arguments)

    def model(self) -> nn.Module:
        """A new model. Sizes that the config leaves open, as `out_features`, are the data's."""
        sizes = _sizes(self.cfg, self.data("adapt"))
        return self.cfg.model.callee(**sizes, **self.cfg.model.arguments)

    def pretrained_model(self) -> nn.Module:
        """The model with its pretrained weights, read once, and new parameters drawn."""
        sizes = _sizes(self.cfg, self.data("adapt"))
        return pretrained_base.load(self.cfg, sizes, self.new_parameters, self.base_seed)

    @property
    def base_seed(self) -> int | None:
        """The seed that the base's new parameters are drawn from; None: one base for all seeds."""
        return self.cfg.seed if self.new_parameters else None

    def attach(self, model: nn.Module) -> None:
        """Puts the configured adapter on the model."""
        assert isinstance(self.cfg.adapter, Lora)
        recipe, patterns = _recipe(self.cfg.adapter)
        settings = {**asdict(recipe), **patterns, "seed": self.cfg.seed}
        adapters.attach(model, _targets(self.cfg), **settings)

    def single_device_trainer(
        self, tracking: Tracking | None, callbacks: list[pl.Callback], **change: Any
    ) -> pl.Trainer:
        """A Trainer on one device, for training a base and for what follows the last step.

        Arguments as `trainer`'s.
        """
        return replace(self, cfg=on_one_device(self.cfg)).trainer(tracking, callbacks, **change)

    def trainer(
        self, tracking: Tracking | None, callbacks: list[pl.Callback], **change: Any
    ) -> pl.Trainer:
        """Lightning's Trainer as configured.

        It logs to `tracking`'s loggers, or nowhere with None. `change`: other values of its
        arguments.
        """
        arguments = {**self.cfg.trainer.model_dump(), **change}
        if arguments.get("strategy") == "fsdp":
            arguments["strategy"] = ModelParallelStrategy(self.processes, 1, False)
        arguments["profiler"] = arguments.get("profiler") or Unprofiled()
        return pl.Trainer(
            **arguments,
            logger=tracking.loggers if tracking else False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # a data module shares out its rows itself
        )


def on_one_device(cfg: Config) -> Config:
    """The config with a trainer on one device; the number of devices does not change a result."""
    configured = cfg.trainer.model_dump()
    change = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    change = {key: value for key, value in change.items() if key in configured}
    return cfg.model_copy(update={"trainer": cfg.trainer.model_copy(update=change)})


def plan(cfg: Config) -> Plan:
    """Checks, before data is drawn or a directory created, that the run of a config is possible.

    For this the model is built on the meta device, where its weights have shapes but no memory.
    Raises ConfigError with the key that is wrong.
    """
    for key in ("runs_dir", "bases_dir"):
        _check_directory(key, Path(getattr(cfg, key)))
    resolve_component("data", cfg.data, ["phase"])
    _call("data", cfg, phase="base")
    data = _call("data", cfg, phase="adapt")
    import_target("model", cfg.model)
    cfg = pretrained_base.with_content(cfg)
    sizes = _sizes(cfg, data)
    resolve_component("model", cfg.model, list(sizes))
    _check_optimizer("optimizer", cfg.optimizer)
    processes = _check_trainer(cfg)
    if processes > 1 and (data.batch_size or 0) % processes:
        raise ConfigError(
            f"data.batch_size={data.batch_size}: must be a multiple of the {processes} processes "
            f"that share each batch (trainer.devices={cfg.trainer.devices})"
        )
    model = _meta_model(cfg, sizes)
    sites = _find_sites(cfg, model) if cfg.adapter.method != "none" else []
    new_parameters = []
    if isinstance(cfg.base, TrainedBase):
        _check_optimizer("base.optimizer", cfg.base.optimizer)
    else:
        if isinstance(cfg.base, CheckpointBase):
            sha256 = bases.check_checkpoint(cfg.base, model)
        else:
            new_parameters, sha256 = pretrained_base.check(cfg, model)
        cfg = cfg.model_copy(update={"base": cfg.base.model_copy(update={"sha256": sha256})})
    return Plan(cfg, sites, processes, tuple(new_parameters))


def _find_sites(cfg: Config, model: nn.Module) -> list[Site]:
    """The places in the model where adapters will sit, their ranks checked."""
    try:
        if isinstance(cfg.adapter, Lora):
            recipe, patterns = _recipe(cfg.adapter)
            return adapters.find_sites(model, _targets(cfg), recipe, **patterns)
        return adapters.find_sites(model, _targets(cfg))
    except RankError as error:
        is_default = isinstance(cfg.adapter, Lora) and f"r={cfg.adapter.r} " in str(error)
        where = "adapter." if is_default else "by a target or adapter.rank_pattern, "
        raise ConfigError(f"{where}{error}") from None
    except TargetError as error:
        raise ConfigError(f"target={','.join(cfg.target)}: {error}") from None
    except AdapterError as error:
        raise ConfigError(f"adapter.{error}") from None


_last_meta_model: tuple[Any, nn.Module] | None = None
"""The model of the previous plan, and what it was built from."""


def _meta_model(cfg: Config, sizes: dict[str, int]) -> nn.Module:
    """The model on the meta device.

    The model of the previous plan is used again if it was built from the same settings: building a
    large one takes a second, and a multirun plans each of its points.
    """
    global _last_meta_model
    built_from = cfg.model.callee, repr((cfg.model.arguments, sizes))
    if _last_meta_model is None or _last_meta_model[0] != built_from:
        with torch.device("meta"):
            _last_meta_model = built_from, _call("model", cfg, **sizes)
    return _last_meta_model[1]


def _targets(cfg: Config) -> dict[str, Target]:
    return {label: Target(**rule.model_dump()) for label, rule in cfg.target.items()}


def _recipe(adapter: Lora) -> tuple[Recipe, dict[str, Any]]:
    """The settings of all sites' adapters, and the patterns of sites with another r or alpha."""
    patterns = {"rank_pattern": adapter.rank_pattern, "alpha_pattern": adapter.alpha_pattern}
    return Recipe(**adapter.model_dump(exclude={"method", "lr_ratio", *patterns})), patterns


def _check_directory(key: str, path: Path) -> None:
    """Raises ConfigError unless `path`, or the nearest parent that exists, can be written to."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"{key}={path}: {existing} is no directory that can be written to")


def _call(key: str, cfg: Config, **arguments: Any) -> Any:
    """Builds the data (key `data`) or the model (`model`); its errors become ConfigErrors."""
    component = getattr(cfg, key)
    try:
        return component.callee(**arguments, **component.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}.{error}") from None


def _sizes(cfg: Config, data: Data) -> dict[str, int]:
    """The data's sizes that the model takes as arguments and the config does not set."""
    parameters = inspect.signature(import_target("model", cfg.model)).parameters
    return {
        name: size
        for name, size in data.sizes.items()
        if name in parameters and name not in cfg.model.arguments
    }


def _check_optimizer(key: str, optimizer: Optimizer) -> None:
    """Raises ConfigError unless the optimizer can be built, here over one number."""
    build = resolve_component(key, optimizer, ["params"])
    try:
        build([nn.Parameter(torch.zeros(1))], **optimizer.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_trainer(cfg: Config) -> int:
    """The number of processes that the Trainer starts. Raises ConfigError."""
    arguments = cfg.trainer.model_dump()
    if reserved := [name for name in arguments if name in RESERVED_TRAINER_ARGUMENTS]:
        raise ConfigError(f"trainer.{reserved[0]}: a run sets this itself")
    _check_gpus(cfg.trainer.accelerator, cfg.trainer.devices)
    check_arguments("trainer", pl.Trainer, arguments)
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
