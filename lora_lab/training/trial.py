"""The parts that one run is trained with, put together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Lora
from lora_lab.data import Data
from lora_lab.data.language import Language
from lora_lab.runs import CHECKPOINTS, Run
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import precision
from lora_lab.training.base_weights import BaseWeights
from lora_lab.training.callbacks.allocation import RankAllocation
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.cost import Cost
from lora_lab.training.callbacks.generation import GenerationCallback
from lora_lab.training.callbacks.restarts import MergeAndRestart
from lora_lab.training.callbacks.selection import Selection
from lora_lab.training.callbacks.spectra import SpectraCallback
from lora_lab.training.callbacks.step_log import StepLog
from lora_lab.training.forgetting import Forgetting
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.modules import BaseModule
from lora_lab.training.plan import Plan


@dataclass
class Trial:
    """The parts of one run that is being trained.

    `module` holds the model with its adapters, `base` the base's weights before the first step,
    which ΔW is measured from.
    """

    plan: Plan
    data: Data
    run: Run
    tracking: Tracking
    module: BaseModule
    base: Mapping[str, Tensor]
    spectra_callback: SpectraCallback
    selection: Selection
    step_log: StepLog | None
    checkpoint: Checkpoint
    adaptation: RankAllocation | MergeAndRestart | None
    """What changes the adapters between steps: of AdaLoRA and ReLoRA; None of others."""
    cost: Cost
    generation: GenerationCallback | None
    """None where no texts are generated during training."""


def build_trial(
    plan: Plan,
    model: nn.Module,
    data: Data,
    run: Run,
    tracking: Tracking,
    base: Mapping[str, Tensor] | None,
) -> Trial:
    """Puts together what a run is trained with: its module and its callbacks.

    `model` has its adapters already, if the run has any. `base` is that of another run of a pack,
    whose model shares its weights with this one.
    """
    cfg, outputs = plan.cfg, data.sizes["out_features"]
    arguments = model, data.task, outputs, cfg.optimizer, "", data.metrics, cfg.label_smoothing
    lora = cfg.adapter if isinstance(cfg.adapter, Lora) else None
    schedule = lora.allocation if lora else None
    if cfg.freezes_base:
        settings: dict[str, Any] = {}
        if lora:
            settings = {"lr_ratio": lora.lr_ratio, "restarts": lora.restarts}
        settings |= {"orthogonality": schedule.orthogonality} if schedule else {}
        module = LoRAModule(*arguments, **settings)
    else:
        module = BaseModule(*arguments)
    if data.known is not None:
        module.forgetting = Forgetting(data.known)
    # Cast before the base is looked at: its file may have other dtypes than training.
    precision.cast(module, cfg.trainer)
    if cfg.freezes_base:
        base = BaseWeights(model, base.digests if isinstance(base, BaseWeights) else None)
    else:
        base = {key: value.clone() for key, value in model.state_dict().items()}
    spectra_callback = SpectraCallback(Updates(model, base, plan.sites), cfg.spectra, tracking)
    selection = Selection(cfg.select, cfg.early_stopping)
    log_interval = cfg.trainer.model_dump().get("log_every_n_steps")
    step_log = StepLog(log_interval, tracking) if log_interval else None
    folder = run.path / CHECKPOINTS
    checkpoint = Checkpoint(folder, cfg.identity(), cfg.checkpoint_every, tracking, base)
    adaptation = None
    if lora and schedule:
        adaptation = RankAllocation(adapters.attached(model), lora.budget, schedule, tracking)
    if lora and lora.restarts:
        adaptation = MergeAndRestart(adapters.attached(model), lora.restarts, cfg.seed)
    cost = Cost()
    cost.pause_for(spectra_callback, checkpoint)
    generation = None
    if cfg.generate and cfg.generate.every_n_steps:
        assert isinstance(data, Language)
        generation = GenerationCallback(cfg.generate, data, tracking, cost.pause)
    callbacks = spectra_callback, selection, step_log, checkpoint, adaptation, cost, generation
    return Trial(plan, data, run, tracking, module, base, *callbacks)
