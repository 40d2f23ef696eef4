"""Whether a run can be, before anything is drawn or made; and what it will be made of."""

import hashlib
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
from safetensors import SafetensorError, safe_open
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError, RankError, Recipe, Site, Target, TargetError
from lora_lab.config.checks import check_arguments, import_target, resolve_component
from lora_lab.config.schema import CheckpointBase, Config, ConfigError, Lora, Optimizer, TrainedBase
from lora_lab.data import Data, Phase
from lora_lab.tracking.tracking import Tracking

RESERVED_TRAINER_ARGUMENTS = (
    *("logger", "callbacks", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "num_sanity_val_steps", "use_distributed_sampler"),
)
"""Arguments of Lightning's Trainer that a run sets itself."""

NOTHING = nullcontext()


class Unprofiled(PassThroughProfiler):
    """No profiler, as Lightning's default, without the generator that stands around every hook.

    Of some 35 hooks a step each costs 0.2 µs in place of 0.9: 7% of Lightning's own cost.
    """

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # pyright: ignore
        """Nothing."""
        return NOTHING


@dataclass(frozen=True)
class Plan:
    """A run whose every setting has been found possible, and where it will be."""

    cfg: Config
    sites: list[Site]
    processes: int = 1
    """How many train it, each on a device of its own."""

    @property
    def path(self) -> Path:
        """The run's directory: a readable cell, its seed, and a hash of all that matters."""
        name = f"{self.cfg.readable_name()}-seed{self.cfg.seed}-{self.cfg.identity()[:10]}"
        return Path(self.cfg.runs_dir) / self.cfg.name / name

    def data(self, phase: Phase) -> Data:
        """The data module of one phase; nothing is drawn yet."""
        return self.cfg.data.callee(phase=phase, **self.cfg.data.arguments)

    def model(self) -> nn.Module:
        """The model, sized to the data where the config leaves its sizes open."""
        sizes = _sizes(self.cfg, self.data("adapt"))
        return self.cfg.model.callee(**sizes, **self.cfg.model.arguments)

    def attach(self, model: nn.Module) -> None:
        """Puts the configured adapter on the model."""
        assert isinstance(self.cfg.adapter, Lora)
        recipe, patterns = _recipe(self.cfg.adapter)
        how = {**asdict(recipe), **patterns, "seed": self.cfg.seed}
        adapters.attach(model, _targets(self.cfg), **how)

    def single_device_trainer(
        self, tracking: Tracking | None, callbacks: list[pl.Callback], **change: Any
    ) -> pl.Trainer:
        """The Trainer of what one process does: a base, and whatever comes after the last step."""
        return replace(self, cfg=on_one_device(self.cfg)).trainer(tracking, callbacks, **change)

    def trainer(
        self, tracking: Tracking | None, callbacks: list[pl.Callback], **change: Any
    ) -> pl.Trainer:
        """Lightning's Trainer as configured, with this run's loggers, or none."""
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
    """The same run on one device: how many it was trained on is no part of what it is."""
    there = cfg.trainer.model_dump()
    change = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    change = {key: value for key, value in change.items() if key in there}
    return cfg.model_copy(update={"trainer": cfg.trainer.model_copy(update=change)})


def plan(cfg: Config) -> Plan:
    """Finds out, before any data is drawn or directory made, whether the run can be.

    The model is built on the meta device for it. Raises ConfigError.
    """
    for key in ("runs_dir", "bases_dir"):
        _check_directory(key, Path(getattr(cfg, key)))
    resolve_component("data", cfg.data, ["phase"])
    _call("data", cfg, phase="base")
    data = _call("data", cfg, phase="adapt")
    sizes = _sizes(cfg, data)
    resolve_component("model", cfg.model, list(sizes))
    _check_optimizer("optimizer", cfg.optimizer)
    processes = _check_trainer(cfg)
    if processes > 1 and (data.batch_size or 0) % processes:
        raise ConfigError(
            f"data.batch_size={data.batch_size}: must be a multiple of the {processes} processes "
            f"that share every batch (trainer.devices={cfg.trainer.devices})"
        )
    model = _skeleton(cfg, sizes)
    sites = []
    if cfg.adapter.method != "none":
        try:
            if isinstance(cfg.adapter, Lora):
                recipe, patterns = _recipe(cfg.adapter)
                sites = adapters.find_sites(model, _targets(cfg), recipe, **patterns)
            else:
                sites = adapters.find_sites(model, _targets(cfg))
        except RankError as error:
            own = isinstance(cfg.adapter, Lora) and f"r={cfg.adapter.r} " in str(error)
            where = "adapter." if own else "by a target or adapter.rank_pattern, "
            raise ConfigError(f"{where}{error}") from None
        except TargetError as error:
            raise ConfigError(f"target={','.join(cfg.target)}: {error}") from None
        except AdapterError as error:
            raise ConfigError(f"adapter.{error}") from None
    if isinstance(cfg.base, TrainedBase):
        _check_optimizer("base.optimizer", cfg.base.optimizer)
    else:
        found = _check_checkpoint(cfg.base, model)
        cfg = cfg.model_copy(update={"base": cfg.base.model_copy(update={"sha256": found})})
    return Plan(cfg, sites, processes)


_last: tuple[Any, nn.Module] | None = None


def _skeleton(cfg: Config, sizes: dict[str, int]) -> nn.Module:
    """The model on the meta device: that of the plan before, where it is made of the same.

    A large one takes a second, and a multirun plans each of its points.
    """
    global _last
    made_of = cfg.model.callee, repr((cfg.model.arguments, sizes))
    if _last is None or _last[0] != made_of:
        with torch.device("meta"):
            _last = made_of, _call("model", cfg, **sizes)
    return _last[1]


def _targets(cfg: Config) -> dict[str, Target]:
    return {label: Target(**rule.model_dump()) for label, rule in cfg.target.items()}


def _recipe(adapter: Lora) -> tuple[Recipe, dict[str, Any]]:
    """How every site's adapter is made, and the patterns over it."""
    patterns = {"rank_pattern": adapter.rank_pattern, "alpha_pattern": adapter.alpha_pattern}
    return Recipe(**adapter.model_dump(exclude={"method", "lr_ratio", *patterns})), patterns


def _check_directory(key: str, path: Path) -> None:
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(f"{key}={path}: {there} is no directory that can be written to")


def _call(key: str, cfg: Config, **given: Any) -> Any:
    component = getattr(cfg, key)
    try:
        return component.callee(**given, **component.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}.{error}") from None


def _sizes(cfg: Config, data: Data) -> dict[str, int]:
    takes = inspect.signature(import_target("model", cfg.model)).parameters
    return {n: v for n, v in data.sizes.items() if n in takes and n not in cfg.model.arguments}


def _check_optimizer(key: str, optimizer: Optimizer) -> None:
    make = resolve_component(key, optimizer, ["params"])
    try:
        make([nn.Parameter(torch.zeros(1))], **optimizer.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_trainer(cfg: Config) -> int:
    """The number of processes that the Trainer wants."""
    arguments = cfg.trainer.model_dump()
    if reserved := [name for name in arguments if name in RESERVED_TRAINER_ARGUMENTS]:
        raise ConfigError(f"trainer.{reserved[0]}: a run sets this itself")
    accelerator, devices = cfg.trainer.accelerator, cfg.trainer.devices
    asked = len(devices) if isinstance(devices, list) else devices
    there = torch.cuda.device_count()
    too_many = isinstance(asked, int) and asked > there
    if accelerator in ("gpu", "cuda") and (there == 0 or too_many):
        raise ConfigError(
            f"trainer.accelerator={accelerator} trainer.devices={devices}: this machine has "
            f"{there} CUDA GPUs; trainer=cpu or trainer=auto runs without one"
        )
    check_arguments("trainer", pl.Trainer, arguments)
    nodes = arguments.get("num_nodes", 1)
    if nodes != 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: is started on every node, by `torchrun --nnodes={nodes} "
            f"--nproc-per-node={devices} … -m lora_lab.train …`"
        )
    if arguments.get("strategy") == "fsdp":
        if isinstance(cfg.adapter, Lora) and cfg.adapter.dora:
            raise ConfigError("adapter.dora=true: not with trainer=fsdp")
        if cfg.spectra.first_step:
            raise ConfigError("spectra.first_step=true: not with trainer=fsdp")
        if cfg.trainer.model_dump()["precision"] == "64-true":
            raise ConfigError("trainer.precision=64-true: not with trainer=fsdp")
        arguments["strategy"] = "ddp"  # as many processes
    try:
        trainer = pl.Trainer(**arguments, logger=False, enable_checkpointing=False)
    except (TypeError, ValueError, RuntimeError) as error:  # Lightning's own are RuntimeErrors
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
    return trainer.world_size


def _check_checkpoint(base: CheckpointBase, model: nn.Module) -> str:
    """The file's SHA-256, once it is found to hold the model's weights."""
    try:
        with safe_open(base.path, "pt") as file:
            found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"base.path={base.path}: no safetensors file to be read: {error}"
        ) from None
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    if found != wanted:
        differ = sorted(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))
        shown = "; ".join(f"{k}: file {found.get(k)}, model {wanted.get(k)}" for k in differ[:4])
        raise ConfigError(
            f"base.path={base.path}: does not hold this model's weights "
            f"({len(differ)} tensors differ: {shown})"
        )
    with open(base.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
