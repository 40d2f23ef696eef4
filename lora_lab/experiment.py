"""One run from start to end: base, adapter, training, spectra, merge check, files, report."""

import hashlib
import inspect
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab import adapters, bases, report, spectra
from lora_lab.adapters import AdapterError, RankError, Recipe, Site, Target, TargetError
from lora_lab.binding import bind, fits, imported
from lora_lab.callbacks.progress import ProgressBar
from lora_lab.callbacks.spectra import SpectraCallback
from lora_lab.config import CheckpointBase, Config, ConfigError, Lora, Optimizer, TrainedBase
from lora_lab.data import Data, Phase
from lora_lab.modules import BaseModule, LoRAModule
from lora_lab.runs import Run, record
from lora_lab.tracking import Tracking

log = logging.getLogger(__name__)

OURS = ("logger", "callbacks", "enable_progress_bar", "enable_model_summary")
OURS += ("enable_checkpointing", "num_sanity_val_steps")
"""Arguments of Lightning's Trainer that a run sets itself."""


@dataclass(frozen=True)
class Plan:
    """A run whose every setting has been found possible, and where it will be."""

    cfg: Config
    sites: list[Site]

    @property
    def path(self) -> Path:
        """The run's directory: a readable cell, its seed, and a hash of all that matters."""
        name = f"{self.cfg.words()}-seed{self.cfg.seed}-{self.cfg.identity()[:10]}"
        return Path(self.cfg.runs_dir) / self.cfg.name / name

    def data(self, phase: Phase) -> Data:
        """The data module of one phase; nothing is drawn yet."""
        return self.cfg.data.callee(phase=phase, **self.cfg.data.arguments)

    def model(self) -> nn.Module:
        """The model, sized to the data where the config leaves its sizes open."""
        sizes = _sizes(self.cfg, self.data("adapt"))
        return self.cfg.model.callee(**sizes, **self.cfg.model.arguments)

    def trainer(
        self, tracking: Tracking, callbacks: list[pl.Callback], **change: Any
    ) -> pl.Trainer:
        """Lightning's Trainer as configured, with this run's loggers."""
        return pl.Trainer(
            **{**self.cfg.trainer.model_dump(), **change},
            logger=tracking.loggers,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        )


def plan(cfg: Config) -> Plan:
    """Finds out, before any data is drawn or directory made, whether the run can be.

    The model is built on the meta device for it. Raises ConfigError.
    """
    for key in ("runs_dir", "bases_dir"):
        _check_directory(key, Path(getattr(cfg, key)))
    bind("data", cfg.data, ["phase"])
    _call("data", cfg, phase="base")
    data = _call("data", cfg, phase="adapt")
    sizes = _sizes(cfg, data)
    bind("model", cfg.model, list(sizes))
    _check_optimizer("optimizer", cfg.optimizer)
    _check_trainer(cfg)
    with torch.device("meta"):
        model = _call("model", cfg, **sizes)
    sites = []
    if cfg.adapter.method != "none":
        try:
            if isinstance(cfg.adapter, Lora):
                own, pattern = _recipe(cfg.adapter)
                sites = adapters.find(model, _targets(cfg), own, **pattern)
            else:
                sites = adapters.find(model, _targets(cfg))
        except RankError as error:
            raise ConfigError(f"adapter.{error}") from None
        except TargetError as error:
            raise ConfigError(f"target={','.join(cfg.target)}: {error}") from None
        except AdapterError as error:
            raise ConfigError(f"adapter.{error}") from None
    if isinstance(cfg.base, TrainedBase):
        _check_optimizer("base.optimizer", cfg.base.optimizer)
    else:
        found = _check_checkpoint(cfg.base, model)
        cfg = cfg.model_copy(update={"base": cfg.base.model_copy(update={"sha256": found})})
    return Plan(cfg, sites)


def _targets(cfg: Config) -> dict[str, Target]:
    return {label: Target(**rule.model_dump()) for label, rule in cfg.target.items()}


def _recipe(adapter: Lora) -> tuple[Recipe, dict[str, Any]]:
    """How every site's adapter is made, and the patterns over it."""
    pattern = {"rank_pattern": adapter.rank_pattern, "alpha_pattern": adapter.alpha_pattern}
    return Recipe(**adapter.model_dump(exclude={"method", "lr_ratio", *pattern})), pattern


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
    takes = inspect.signature(imported("model", cfg.model)).parameters
    return {n: v for n, v in data.sizes.items() if n in takes and n not in cfg.model.arguments}


def _check_optimizer(key: str, optimizer: Optimizer) -> None:
    make = bind(key, optimizer, ["params"])
    try:
        make([nn.Parameter(torch.zeros(1))], **optimizer.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_trainer(cfg: Config) -> None:
    arguments = cfg.trainer.model_dump()
    if ours := [name for name in arguments if name in OURS]:
        raise ConfigError(f"trainer.{ours[0]}: a run sets this itself")
    accelerator, devices = cfg.trainer.accelerator, cfg.trainer.devices
    asked = len(devices) if isinstance(devices, list) else devices
    there = torch.cuda.device_count()
    too_many = isinstance(asked, int) and asked > there
    if accelerator in ("gpu", "cuda") and (there == 0 or too_many):
        raise ConfigError(
            f"trainer.accelerator={accelerator} trainer.devices={devices}: this machine has "
            f"{there} CUDA GPUs; trainer=cpu or trainer=auto runs without one"
        )
    fits("trainer", pl.Trainer, arguments)
    try:
        trainer = pl.Trainer(**arguments, logger=False, enable_checkpointing=False)
    except (TypeError, ValueError, RuntimeError) as error:  # Lightning's own are RuntimeErrors
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
    if trainer.world_size > 1:
        raise ConfigError(f"trainer.devices={devices}: a run takes one device, so far")


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


def run(plan: Plan, console: Console) -> Run:
    """Runs what was planned and returns its finished directory. The run fails by raising."""
    cfg = plan.cfg
    about = {"cell": cfg.cell(), "seed": cfg.seed}
    recorded = record(plan.path, cfg.plain(), overwrite=cfg.overwrite, **about)
    with recorded as run, Tracking(cfg, run, plan.path) as tracking:
        base = _base(plan, tracking, console)
        data = plan.data("adapt")
        model = plan.model()
        model.load_state_dict(base.state)
        # In the model's dtypes, which need not be the file's.
        loaded = {key: value.clone() for key, value in model.state_dict().items()}
        # From here on dropout is the only thing that draws from the global stream.
        pl.seed_everything(cfg.seed, verbose=False)
        _adapt(plan, model, data, loaded, run, tracking, console)
    return run


def _base(plan: Plan, tracking: Tracking, console: Console) -> bases.Base:
    cfg = plan.cfg

    def train() -> tuple[nn.Module, list[dict[str, Any]]]:
        assert isinstance(cfg.base, TrainedBase)
        pl.seed_everything(cfg.base.seed, verbose=False)
        data, model = plan.data("base"), plan.model()
        outputs = data.sizes["out_features"]
        module = BaseModule(model, data.task, outputs, cfg.base.optimizer, prefix="base/")
        first = len(tracking.rows)
        trainer = plan.trainer(tracking, [ProgressBar("base", console)], max_epochs=cfg.base.epochs)
        _fit(trainer, module, data)
        return model, tracking.rows[first:]

    return bases.obtain(cfg, train, tracking.replay)


def _fit(trainer: pl.Trainer, module: BaseModule, data: Data) -> None:
    """Trains, with the last epoch validated whatever its number."""
    trainer.fit(module, data)
    if trainer.current_epoch % (trainer.check_val_every_n_epoch or 1):
        trainer.validate(module, data, verbose=False)


def _adapt(
    plan: Plan,
    model: nn.Module,
    data: Data,
    base: dict[str, Tensor],
    run: Run,
    tracking: Tracking,
    console: Console,
) -> None:
    cfg, outputs = plan.cfg, data.sizes["out_features"]
    total = sum(p.numel() for p in model.parameters())
    if isinstance(cfg.adapter, Lora):
        own, pattern = _recipe(cfg.adapter)
        adapters.attach(model, _targets(cfg), **asdict(own), **pattern, seed=cfg.seed)
        ratio = cfg.adapter.lr_ratio
        module = LoRAModule(model, data.task, outputs, cfg.optimizer, lr_ratio=ratio)
        console.print(report.sites(plan.sites))
    else:
        module = BaseModule(model, data.task, outputs, cfg.optimizer)

    def delta(site: Site) -> Tensor:
        """ΔW of a site as a matrix."""
        if isinstance(cfg.adapter, Lora):
            return adapters.deltas(model)[site.name].flatten(1)
        weight = model.get_submodule(site.layer).get_parameter(site.parameter)
        key = f"{site.layer}.{site.parameter}" if site.layer else site.parameter
        changed = weight.detach() - base[key].to(weight.device)
        return (changed if site.rows is None else changed[slice(*site.rows)]).flatten(1)

    def measure() -> dict[str, spectra.Spectrum]:
        made = adapters.attached(model)
        return {
            site.name: spectra.from_factors(*made[site.name].factors(), made[site.name].scale)
            if site.name in made and made[site.name].magnitude is None
            else spectra.from_matrix(delta(site))
            for site in plan.sites
        }

    by_name = {site.name: site for site in plan.sites}
    spectral = SpectraCallback(
        measure, lambda name: delta(by_name[name]), cfg.spectra.every_n_epochs, tracking
    )
    trainer = plan.trainer(tracking, [ProgressBar(cfg.adapter.method, console), spectral])
    trainer.validate(module, data, verbose=False)
    if cfg.adapter.method == "none":
        tracking.log({"parameters/trainable": 0, "parameters/base": total}, 0)
        return
    _fit(trainer, module, data)
    spectral.write(run.path / "spectra.npz")
    trainable = sum(p.numel() for p in module.trained())
    if isinstance(cfg.adapter, Lora):
        _check_merge(trainer, module, data, base)
        adapters.save(model, run.path / "adapter")
        tracking.artifact(run.path / "adapter", "adapter")
    else:
        (run.path / "model").mkdir()
        # Copies: safetensors does not write one memory under two names, as tied weights have.
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, run.path / "model" / "model.safetensors")
        tracking.artifact(run.path / "model", "model")
    costs: dict[str, float] = {"parameters/trainable": trainable, "parameters/base": total}
    if isinstance(cfg.adapter, Lora):
        cost = adapters.count(model)
        costs |= {
            "bytes/adapter": cost.adapter_bytes,
            "bytes/optimizer": cost.optimizer_bytes,
            "bytes/full_optimizer": cost.full_optimizer_bytes,
        }
    tracking.log(costs, trainer.global_step)


def _check_merge(
    trainer: pl.Trainer, module: BaseModule, data: Data, base: dict[str, Tensor]
) -> None:
    """Logs the merged model's loss; raises unless unmerging gives the base bit for bit."""
    adapters.merge(module.model)
    module.prefix = "merged/"
    trainer.validate(module, data, verbose=False)
    adapters.unmerge(module.model)
    now = module.model.state_dict()
    for key, value in base.items():
        if not torch.equal(now[key].cpu(), value.to(now[key].dtype)):
            raise AdapterError(f"'{key}' is not the base's any more after merge and unmerge")
