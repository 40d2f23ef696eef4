"""One run from start to end: base, adapter, training, spectra, merge check, files."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lora_lab import adapters, report
from lora_lab.adapters import AdapterError
from lora_lab.adapters.slots import merged_adapters
from lora_lab.analysis import findings
from lora_lab.analysis.updates import Updates, full_tensor
from lora_lab.config.components import PretrainedBase
from lora_lab.config.schema import Lora, TrainedBase
from lora_lab.data import Data
from lora_lab.runs import CHECKPOINTS, Run, process_rank
from lora_lab.seeding import generator
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import bases, precision
from lora_lab.training.base_weights import BaseWeights
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.first_step import FirstStep
from lora_lab.training.callbacks.progress import ProgressBar
from lora_lab.training.callbacks.selection import Selection
from lora_lab.training.callbacks.spectra import SpectraCallback
from lora_lab.training.callbacks.step_log import StepLog
from lora_lab.training.cuts import cut_losses
from lora_lab.training.modules import BaseModule, LoRAModule
from lora_lab.training.plan import Plan
from lora_lab.training.result_files import save_weights
from lora_lab.training.run_record import record_run


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
    checkpoint: Checkpoint


def run(plan: Plan, console: Console) -> Run:
    """Trains and measures a planned run and gives its finished run directory.

    Where several processes train one run, each calls this. The first alone writes the run
    directory and does what follows the last step. An exception leaves the run's status `failed`,
    Ctrl-C and SIGTERM leave it `interrupted`.
    """
    cfg = plan.cfg
    with (
        nullcontext(Run(plan.path)) if process_rank() else open_run(plan) as run,
        Tracking(cfg, run, plan.path) as tracking,
    ):
        model, _ = obtain_model(plan, tracking, console)
        data = plan.data("adapt")
        # From here on only dropout draws from torch's global random stream: adapters and data have
        # their generators. Each further process draws other dropout masks than the first.
        process = process_rank()
        seed = generator(cfg.seed, "dropout", process).initial_seed() if process else cfg.seed
        pl.seed_everything(seed % 2**32, verbose=False)
        if cfg.freezes_base:
            plan.attach(model)
        if isinstance(cfg.adapter, Lora):
            console.print(report.site_table(plan.sites))
        trial = build_trial(plan, model, data, run, tracking, None)
        adapt_model(trial, console)
        finish_run(trial, console)
    return run


def open_run(plan: Plan) -> AbstractContextManager[Run]:
    """A context in which the run directory is locked and its status is `running`: `record_run`."""
    cfg = plan.cfg
    # The thread count is recorded because it changes the order of floating-point sums.
    about = {"cell": cfg.cell(), "seed": cfg.seed, "threads": torch.get_num_threads()}
    return record_run(plan.path, cfg.to_dict(), overwrite=cfg.overwrite, **about)


def obtain_model(
    plan: Plan, tracking: Tracking, console: Console
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model with the base's weights, and the rows that were logged while the base trained."""
    if isinstance(plan.cfg.base, PretrainedBase):
        return plan.pretrained_model(), []
    base = obtain_base(plan, tracking, console)
    model = plan.model()
    model.load_state_dict(base.state)
    return model, base.rows


def obtain_base(plan: Plan, tracking: Tracking, console: Console) -> bases.Base:
    """The frozen base of a run: loaded, or trained here. Its rows are logged in both cases."""
    cfg = plan.cfg
    if process_rank():
        return bases.wait(cfg)

    def train_base(checkpoints: Path) -> tuple[nn.Module, list[dict[str, Any]]]:
        assert isinstance(cfg.base, TrainedBase)
        pl.seed_everything(cfg.base.seed, verbose=False)
        data, model = plan.data("base"), plan.model()
        outputs = data.sizes["out_features"]
        optimizer = cfg.base.optimizer
        module = BaseModule(model, data.task, outputs, optimizer, "base/", data.metrics)
        first = len(tracking.rows)
        checkpoint = Checkpoint(checkpoints, bases.key(cfg), cfg.checkpoint_every, tracking)
        callbacks = [ProgressBar("base", console), checkpoint]
        length = {**bases.NOT_FOR_BASES, "max_epochs": cfg.base.epochs}
        trainer = plan.single_device_trainer(tracking, callbacks, **length)
        fit(trainer, module, data, checkpoint.resume_path())
        return model, tracking.rows[first:]

    return bases.obtain(cfg, train_base, tracking.replay)


def fit(trainer: pl.Trainer, module: BaseModule, data: Data, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if one is given."""
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


def build_trial(
    plan: Plan,
    model: nn.Module,
    data: Data,
    run: Run,
    tracking: Tracking,
    base: Mapping[str, Tensor] | None,
) -> Trial:
    """Puts together what a run is trained with: its module, spectra callback and checkpoint.

    `model` has its adapters already, if the run has any. `base` is that of another run of a pack,
    whose model shares its weights with this one.
    """
    cfg, outputs = plan.cfg, data.sizes["out_features"]
    arguments = model, data.task, outputs, cfg.optimizer, "", data.metrics, cfg.label_smoothing
    if cfg.freezes_base:
        ratio = cfg.adapter.lr_ratio if isinstance(cfg.adapter, Lora) else 1.0
        module = LoRAModule(*arguments, lr_ratio=ratio)
    else:
        module = BaseModule(*arguments)
    # Cast before the base is looked at: its file may have other dtypes than training.
    precision.cast(module, cfg.trainer)
    if cfg.freezes_base:
        base = BaseWeights(model, base.digests if isinstance(base, BaseWeights) else None)
    else:
        base = {key: value.clone() for key, value in model.state_dict().items()}
    spectra_callback = SpectraCallback(Updates(model, base, plan.sites), cfg.spectra, tracking)
    selection = Selection(cfg.select, cfg.early_stopping)
    folder = run.path / CHECKPOINTS
    checkpoint = Checkpoint(folder, cfg.identity(), cfg.checkpoint_every, tracking, base)
    return Trial(plan, data, run, tracking, module, base, spectra_callback, selection, checkpoint)


def adapt_model(trial: Trial, console: Console) -> None:
    """Trains the adapters, or with adapter=full the model; with adapter=none only validates.

    An interrupted training goes on from its checkpoint; a new one is validated before its first
    step. Sets the module's `final_step`.
    """
    plan, module, data, tracking = trial.plan, trial.module, trial.data, trial.tracking
    cfg = plan.cfg
    callbacks: list[pl.Callback] = [ProgressBar(cfg.adapter.method, console)]
    callbacks += [trial.spectra_callback, trial.selection]
    if cfg.spectra.first_step and isinstance(cfg.adapter, Lora):
        callbacks.append(FirstStep(trial.spectra_callback.updates, tracking))
    if interval := cfg.trainer.model_dump().get("log_every_n_steps"):
        callbacks.append(StepLog(interval, tracking))
    trainer = plan.trainer(tracking, [*callbacks, trial.checkpoint])
    if (checkpoint := trial.checkpoint.resume_path()) is None:
        if cfg.trains:
            log_theory(data, module.model, tracking)
        trainer.validate(module, data, verbose=False)
    if cfg.trains:
        fit(trainer, module, data, checkpoint)
        module.final_step = module.step_and_epoch()


def finish_run(trial: Trial, console: Console) -> None:
    """What follows the last step: saves the result, checks that ΔW merges, and analyzes ΔW.

    Where several processes trained the run, the first does this on one device.
    """
    plan, module, tracking = trial.plan, trial.module, trial.tracking
    cfg, spectra_callback = plan.cfg, trial.spectra_callback
    if not cfg.trains:
        base_size = adapters.count(module.model).frozen
        tracking.log({"parameters/trainable": 0, "parameters/base": base_size}, 0)
        return
    change = {}
    if isinstance(module.model, FSDPModule):
        model = _gather(plan, module)
        if isinstance(trial.base, BaseWeights):
            trial.base = BaseWeights(model, trial.base.digests)
        spectra_callback.updates = Updates(model, trial.base, plan.sites)
        change = {"accelerator": "cpu"}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if process_rank():
        return
    _select(trial)
    unlogged_trainer = plan.single_device_trainer(None, [], **change)
    _save_trained(plan.single_device_trainer(tracking, [], **change), trial)
    updates, arrays = spectra_callback.updates, spectra_callback.arrays()
    # Written now too, so that the spectra are stored even if the analysis fails.
    findings.write(trial.run.path, arrays, None)
    if not plan.sites:
        return  # nothing but parameters of also_train, which have no ΔW to analyze
    module.prefix = ""
    losses = partial(cut_losses, unlogged_trainer, module, trial.data, updates)
    learned = findings.analyze(updates, losses, cfg.spectra, cfg.bases_dir, console)
    findings.write(trial.run.path, {**arrays, **learned.arrays}, learned.advice)
    assert module.final_step is not None
    tracking.log_findings(learned.metrics, learned.arrays, int(module.final_step["step"]))


def _gather(plan: Plan, module: BaseModule) -> nn.Module:
    """A new model in CPU memory with the weights that FSDP split over the processes.

    It takes the place of the module's model. All processes must call this.
    """
    state = {key: full_tensor(value).cpu() for key, value in module.model.state_dict().items()}
    model = plan.model()
    if plan.cfg.freezes_base:
        plan.attach(model)
    module.model = model
    precision.cast(module, plan.cfg.trainer)
    model.load_state_dict(state)
    return model


def _save_trained(trainer: pl.Trainer, trial: Trial) -> None:
    """Saves the adapters or the model that was trained, and logs parameter and memory counts."""
    model = trial.module.model
    cost = adapters.count(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    costs: dict[str, float] = {"parameters/trainable": trainable, "parameters/base": cost.frozen}
    if adapters.names(model):
        _check_merge(trainer, trial)
        costs["bytes/adapter"] = cost.adapter_bytes
        costs["bytes/optimizer"] = cost.optimizer_bytes
        costs["bytes/full_optimizer"] = cost.full_optimizer_bytes
    saved = save_weights(model, trial.run.path)
    trial.tracking.log_artifact(saved, saved.name)
    trial.tracking.log(costs, int(trial.module.step_and_epoch()["step"]))


def _select(trial: Trial) -> None:
    """Logs the best validation. With select=best its weights become the run's result.

    The last weights are kept in adapter_last/ (or model_last/) then. The best validation's row is
    logged again: the last row of a metric is the result's, for all who read it.
    """
    selection, module, tracking = trial.selection, trial.module, trial.tracking
    assert module.final_step is not None
    if best := selection.best_row():
        tracking.log(best, int(module.final_step["step"]))
    if not selection.weights:
        return
    assert selection.best is not None
    step, epoch = (selection.best.row[name] for name in ("step", "epoch"))
    if step != module.final_step["step"]:
        save_weights(module.model, trial.run.path, "_last")
        module.model.load_state_dict(selection.weights, strict=False)
        module.final_step = {"step": step, "epoch": epoch}
        trial.spectra_callback.end_at(epoch, int(step))
        row = {key: value for key, value in selection.best.row.items() if key != "step"}
        tracking.log(row, int(step))


def log_theory(data: Data, model: nn.Module, tracking: Tracking) -> None:
    """Logs what theory predicts of the run's metrics at its end, if the data set knows any."""
    data.setup("fit")
    row: dict[str, float] = {}
    for metric, expected in data.predicted_metrics(model).items():
        row[f"theory/{metric}"] = expected.value
        row[f"theory_error/{metric}"] = expected.standard_error
    if row:
        tracking.log(row, 0)


def _check_merge(trainer: pl.Trainer, trial: Trial) -> None:
    """Logs the merged model's validation metrics, and checks that unmerging restores the base.

    Raises AdapterError unless each weight of the base is again what it was, bit for bit.
    """
    module = trial.module
    adapters.merge(module.model)
    module.prefix = "merged/"
    trainer.validate(module, trial.data, verbose=False)
    adapters.unmerge(module.model)
    assert isinstance(trial.base, BaseWeights)
    if changed := [*merged_adapters(module.model), *trial.base.changed()]:
        raise AdapterError(f"'{changed[0]}' is not the base's any more after merge and unmerge")
