"""Checks that a run is possible before any data is drawn, and builds its parts from its config."""

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import (
    AdapterError,
    PatternError,
    RankError,
    Recipe,
    Site,
    Target,
    TargetError,
)
from lora_lab.config.checks import check_kind, import_target, parameters_of, resolve_component
from lora_lab.config.schema import (
    CheckpointBase,
    Config,
    ConfigError,
    Full,
    Lora,
    TrainedBase,
)
from lora_lab.data import Data, Phase
from lora_lab.models.pretrained_head import PretrainedHead
from lora_lab.runs import Run
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import (
    bases,
    data_contract,
    fit_checks,
    part_checks,
    pretrained_base,
    start_from,
)
from lora_lab.training.calibration import calibration_of, with_values
from lora_lab.training.generate_checks import check_generate
from lora_lab.training.known_data import known_data, with_checked
from lora_lab.training.loop import TrainingLoop, Unprofiled, trainer_arguments
from lora_lab.training.metric_checks import check_metrics
from lora_lab.training.precision import HalfPrecisionBase, precision_plugin
from lora_lab.training.source_code import check_same_code
from lora_lab.training.trainer_checks import Devices, check_trainer, on_one_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run whose settings have all been checked; builds its data, model, adapters and Trainers."""

    cfg: Config
    sites: list[Site]
    devices: Devices
    new_parameters: tuple[str, ...] = ()
    """Names of the parameters that the pretrained base's files do not hold, as a new head's."""
    also_trained: tuple[str, ...] = ()
    """Names of the parameters that train in full beside the adapters."""
    is_reproduction: bool = False
    """Whether `lora-lab reproduce` trains it, which alone may overwrite it then."""

    @property
    def processes(self) -> int:
        """Number of processes that train the run, each on its device."""
        return self.devices.processes

    @property
    def path(self) -> Path:
        """The run directory, named by main settings, the seed and the config's hash.

        One of an earlier version may have its targets in another order in its name.
        """
        folder, end = Path(self.cfg.runs_dir) / self.cfg.name, f"-seed{self.cfg.seed}"
        end += f"-{self.cfg.identity()[:10]}"
        path = folder / f"{self.cfg.readable_name()}{end}"
        has_other_names = len(self.cfg.target) > 1 and not path.exists()
        return next(folder.glob(f"*{end}"), path) if has_other_names else path

    def data(self, phase: Phase) -> Data:
        """The data module of one phase (`base` or `adapt`). It draws its data in `setup`."""
        return self.cfg.data.callee(phase=phase, **self.cfg.data.arguments)

    def training_data(self) -> Data:
        """The data module that the run trains on; it validates on what the base knew, too."""
        data = self.data("adapt")
        data.known = known_data(self.cfg, self.data("base"))
        if data.known is not None and isinstance(head := data.known.outputs_of, PretrainedHead):
            head.load()
        return data

    def model(self) -> nn.Module:
        """A new model. Sizes that the config leaves open, as `out_features`, are the data's."""
        sizes = _sizes(self.cfg, self.data("adapt"))
        return self.cfg.model.callee(**sizes, **self.cfg.model.arguments)

    def pretrained_model(self) -> nn.Module:
        """The model with its pretrained weights, read once, and new parameters drawn."""
        sizes = _sizes(self.cfg, self.data("adapt"))
        frozen = sorted({*self.new_parameters} - {*self.also_trained})
        if frozen and not isinstance(self.cfg.adapter, Full):
            modules = ",".join(sorted({name.rpartition(".")[0] for name in frozen}))
            log.warning("not in the files, drawn from the seed and frozen: %s", ", ".join(frozen))
            log.warning("also_train=[%s] trains them", modules)
        return pretrained_base.load(self.cfg, sizes, self.new_parameters, self.base_seed)

    @property
    def base_seed(self) -> int | None:
        """The seed that the base's new parameters are drawn from; None: one base for all seeds.

        Where `also_train` covers all of them, each run trains its copies from its seed's draw.
        """
        return self.cfg.seed if {*self.new_parameters} - {*self.also_trained} else None

    def attach(self, model: nn.Module) -> "Plan":
        """Puts on the model what the config trains beside its base: adapters, also_train.

        Gives the plan with the sites as they are on the model: EVA may move ranks between them.
        """
        cfg = self.cfg
        settings: dict[str, Any] = {"r": 1, "alpha": 1}
        if isinstance(cfg.adapter, Lora):
            recipe, patterns = _recipe(cfg.adapter)
            settings = {**asdict(recipe), **patterns, "rho": cfg.adapter.rho}
        targets = _targets(cfg) if isinstance(cfg.adapter, Lora) else {}
        new = [name for name in self.new_parameters if name in self.also_trained]
        first_values = pretrained_base.draw_new(model, new, cfg.seed)
        settings["calibration"] = calibration_of(cfg, self.sites)
        with with_values(model, first_values):  # what is read of the data is of this seed's head
            settings |= {"also_train": cfg.also_train, "seed": cfg.seed}
            sites = adapters.attach(model, targets, **settings)
        if isinstance(cfg.adapter, Lora) and cfg.adapter.start_from is not None:
            start_from.fill(model, cfg.adapter.start_from)
        in_full = adapters.also_trained(model)
        with torch.no_grad():
            for name, value in first_values.items():
                in_full[name].value.copy_(value)
        return replace(self, sites=sites)

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
        settings = {**self.cfg.trainer.model_dump(), **change}
        arguments = trainer_arguments(settings)
        plugin = precision_plugin(self.cfg.trainer)
        if isinstance(plugin, HalfPrecisionBase):
            arguments = {**arguments, "precision": None, "plugins": [plugin]}
        if arguments.get("strategy") == "fsdp":
            arguments["strategy"] = ModelParallelStrategy(self.processes, 1, False)
        arguments["profiler"] = arguments.get("profiler") or Unprofiled()
        trainer = pl.Trainer(
            **arguments,
            logger=tracking.loggers if tracking else False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # a data module shares out its rows itself
        )
        trainer.fit_loop.epoch_loop = TrainingLoop(trainer, settings.get("val_check_interval"))
        return trainer


def plan(cfg: Config, is_stored: bool = False) -> Plan:
    """Checks, before data is drawn or a directory created, that the run of a config is possible.

    For this the model is built on the meta device, where its weights have shapes but no memory.
    `is_stored`: the config is that of a finished run, whose data has been seen to fit its model,
    and nothing is written to its directories.
    Raises ConfigError with the key that is wrong.
    """
    for key in () if is_stored else ("runs_dir", "bases_dir"):
        part_checks.check_directory(key, Path(getattr(cfg, key)))
    import_target("data", cfg.data, Data)
    if cfg.forget is not None:
        import_target("forget", cfg.forget, Data)
    data_contract.check_class(cfg.data)
    resolve_component("data", cfg.data, Data, ["phase"])
    import_target("model", cfg.model, nn.Module)
    pretrained_base.check_path(cfg.model)
    _call("data", cfg, Data, phase="base")
    data = _call("data", cfg, Data, phase="adapt")
    data_contract.check_object(cfg, data)
    if not is_stored:
        fit_checks.check_head(cfg, data)
    check_metrics(cfg, data)
    cfg = pretrained_base.with_content(cfg)
    sizes = _sizes(cfg, data)
    resolve_component("model", cfg.model, nn.Module, list(sizes), data.sizes)
    part_checks.check_optimizer("optimizer", cfg.optimizer)
    part_checks.check_galore(cfg)
    devices = check_trainer(cfg)
    processes = devices.processes
    if processes > 1 and (data.batch_size or 0) % processes:
        raise ConfigError(
            f"data.batch_size={data.batch_size}: must be a multiple of the {processes} processes "
            f"that share each batch (trainer.devices={cfg.trainer.devices})"
        )
    model = _meta_model(cfg, sizes)
    if not is_stored:
        cfg = fit_checks.with_max_length(cfg, data, model)
        fit_checks.check_vocabulary(cfg, data, model)
        fit_checks.check_reading_direction(cfg, model)
        fit_checks.check_images(cfg, data, model)
        check_generate(cfg, data, model, processes)
        cfg = with_checked(cfg, data, model)
    also_trained = _also_trained(cfg, model)
    sites = _find_sites(cfg, model, also_trained) if cfg.adapter.method != "none" else []
    part_checks.check_allocation(cfg, sites)
    part_checks.check_redistribution(cfg, sites)
    part_checks.check_restarts(cfg)
    if not is_stored:
        part_checks.check_cuts(cfg, sites)
        cfg = start_from.checked(cfg, sites)
    new_parameters = []
    if isinstance(cfg.base, TrainedBase):
        part_checks.check_memory(cfg, data, model)
        part_checks.check_optimizer("base.optimizer", cfg.base.optimizer)
        try:
            data.check_base()
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
    else:
        if isinstance(cfg.base, CheckpointBase):
            sha256 = bases.check_checkpoint(cfg.base, model)
        else:
            new_parameters, sha256 = pretrained_base.check(cfg, model)
            if not is_stored:
                fit_checks.check_class_order(cfg, data, model, new_parameters)
        cfg = cfg.model_copy(update={"base": cfg.base.model_copy(update={"sha256": sha256})})
    pretrained_base.check_quantized(cfg, model, new_parameters, also_trained)
    if not is_stored:
        data_contract.check_rows(cfg)
    run_plan = Plan(cfg, sites, devices, tuple(new_parameters), tuple(also_trained))
    if not is_stored:
        check_same_code(cfg, Run(run_plan.path))
    return run_plan


def _also_trained(cfg: Config, model: nn.Module) -> list[str]:
    """The names of the parameters that `also_train` picks. Raises ConfigError."""
    if not cfg.freezes_base:
        return []
    try:
        return adapters.select(model, cfg.also_train)
    except AdapterError as error:
        raise ConfigError(str(error)) from None


def _find_sites(cfg: Config, model: nn.Module, also_trained: list[str]) -> list[Site]:
    """The places in the model where adapters will sit, their ranks checked."""
    try:
        if isinstance(cfg.adapter, Lora):
            recipe, patterns = _recipe(cfg.adapter)
            settings = {**patterns, "trained_in_full": also_trained}
            return adapters.find_sites(model, _targets(cfg), recipe, **settings)
        # ΔW of a tied weight is measured once, under the first of its names.
        targets = {label: replace(target, tied=True) for label, target in _targets(cfg).items()}
        return adapters.find_sites(model, targets)
    except RankError as error:
        is_default = isinstance(cfg.adapter, Lora) and f"r={cfg.adapter.r} " in str(error)
        where = "adapter." if is_default else "by a target or adapter.rank_pattern, "
        raise ConfigError(f"{where}{error}") from None
    except PatternError as error:
        raise ConfigError(f"adapter.{error}") from None
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
    # `content` too: another folder may lie at the same path by now.
    built_from = cfg.model.callee, repr((cfg.model.arguments, cfg.model.content, sizes))
    if _last_meta_model is None or _last_meta_model[0] != built_from:
        with torch.device("meta"):
            _last_meta_model = built_from, _call("model", cfg, nn.Module, **sizes)
    return _last_meta_model[1]


def _targets(cfg: Config) -> dict[str, Target]:
    return {label: Target(**rule.model_dump()) for label, rule in cfg.target.items()}


def _recipe(adapter: Lora) -> tuple[Recipe, dict[str, Any]]:
    """The settings of all sites' adapters, and how those of single sites differ."""
    names = ("rank_pattern", "alpha_pattern", "over_rank")
    of_sites = {name: getattr(adapter, name) for name in names}
    settings = {field.name: getattr(adapter, field.name) for field in fields(Recipe)}
    return Recipe(**settings), of_sites


def _call(key: str, cfg: Config, kind: type, **arguments: Any) -> Any:
    """Builds the data (key `data`) or the model (`model`); its errors become ConfigErrors."""
    component = getattr(cfg, key)
    try:
        built = component.callee(**arguments, **component.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}.{error}") from None
    check_kind(key, component, built, kind)
    return built


def _sizes(cfg: Config, data: Data) -> dict[str, int]:
    """The data's sizes that the model takes as arguments and the config does not set."""
    parameters = parameters_of(import_target("model", cfg.model, nn.Module))[0]
    return {
        name: size
        for name, size in data.sizes.items()
        if name in parameters and name not in cfg.model.arguments
    }
