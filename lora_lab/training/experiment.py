"""One run from start to end: base, adapter, training, spectra, merge check, files."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lora_lab import adapters, report
from lora_lab.adapters import AdapterError
from lora_lab.analysis import findings
from lora_lab.analysis.updates import Updates, full_tensor
from lora_lab.config.schema import Lora, TrainedBase
from lora_lab.data import Data
from lora_lab.runs import CHECKPOINTS, Run, process_rank
from lora_lab.seeding import generator
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import bases, precision
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.first_step import FirstStep
from lora_lab.training.callbacks.progress import ProgressBar
from lora_lab.training.callbacks.spectra import SpectraCallback
from lora_lab.training.cuts import cut_losses
from lora_lab.training.modules import BaseModule, LoRAModule
from lora_lab.training.plan import Plan
from lora_lab.training.run_record import record_run


@dataclass
class Trial:
    """A run from its base to its end: the model that adapts, and what measures and keeps it."""

    plan: Plan
    data: Data
    run: Run
    tracking: Tracking
    module: BaseModule
    base: dict[str, Tensor]
    spectra_callback: SpectraCallback
    checkpoint: Checkpoint


def run(plan: Plan, console: Console) -> Run:
    """Runs what was planned and returns its finished directory. The run fails by raising.

    Of a run's several processes the first does all but training alone, and has its files.
    """
    cfg = plan.cfg
    with (
        nullcontext(Run(plan.path)) if process_rank() else open_run(plan) as run,
        Tracking(cfg, run, plan.path) as tracking,
    ):
        base = obtain_base(plan, tracking, console)
        data = plan.data("adapt")
        model = plan.model()
        model.load_state_dict(base.state)
        # From here on dropout is the only thing that draws from the global stream.
        process = process_rank()
        own = generator(cfg.seed, "dropout", process).initial_seed() if process else cfg.seed
        pl.seed_everything(own % 2**32, verbose=False)
        if isinstance(cfg.adapter, Lora):
            plan.attach(model)
            console.print(report.site_table(plan.sites))
        trial = build_trial(plan, model, data, run, tracking, None)
        adapt_model(trial, console)
        finish_run(trial, console)
    return run


def open_run(plan: Plan) -> AbstractContextManager[Run]:
    """Within it the run is running; see `record_run`."""
    cfg = plan.cfg
    # Sums in another order are other bits.
    about = {"cell": cfg.cell(), "seed": cfg.seed, "threads": torch.get_num_threads()}
    return record_run(plan.path, cfg.to_dict(), overwrite=cfg.overwrite, **about)


def obtain_base(plan: Plan, tracking: Tracking, console: Console) -> bases.Base:
    """The frozen base of a run: found, or trained here, its rows logged either way."""
    cfg = plan.cfg
    if process_rank():
        return bases.wait(cfg)

    def train_base(checkpoints: Path) -> tuple[nn.Module, list[dict[str, Any]]]:
        assert isinstance(cfg.base, TrainedBase)
        pl.seed_everything(cfg.base.seed, verbose=False)
        data, model = plan.data("base"), plan.model()
        outputs = data.sizes["out_features"]
        module = BaseModule(model, data.task, outputs, cfg.base.optimizer, prefix="base/")
        first = len(tracking.rows)
        checkpoint = Checkpoint(checkpoints, bases.key(cfg), cfg.checkpoint_every, tracking)
        callbacks = [ProgressBar("base", console), checkpoint]
        trainer = plan.single_device_trainer(tracking, callbacks, max_epochs=cfg.base.epochs)
        fit(trainer, module, data, checkpoint.resume_path())
        return model, tracking.rows[first:]

    return bases.obtain(cfg, train_base, tracking.replay)


def fit(trainer: pl.Trainer, module: BaseModule, data: Data, kept: Path | None) -> None:
    """Trains, from a checkpoint if one is kept; the last epoch is validated whatever its number."""
    trainer.fit(module, data, ckpt_path=kept, weights_only=True)
    if trainer.current_epoch % (trainer.check_val_every_n_epoch or 1):
        trainer.validate(module, data, verbose=False)


def build_trial(
    plan: Plan,
    model: nn.Module,
    data: Data,
    run: Run,
    tracking: Tracking,
    base: dict[str, Tensor] | None,
) -> Trial:
    """The run of an adapted model. `base`: its weights, where another run has copied them."""
    cfg, outputs = plan.cfg, data.sizes["out_features"]
    if isinstance(cfg.adapter, Lora):
        ratio = cfg.adapter.lr_ratio
        module = LoRAModule(model, data.task, outputs, cfg.optimizer, lr_ratio=ratio)
    else:
        module = BaseModule(model, data.task, outputs, cfg.optimizer)
    # Cast before the base is copied: its file may have other dtypes than training.
    precision.cast(module, cfg.trainer)
    if base is None:
        base = {key: value.clone() for key, value in adapters.base_state_dict(model).items()}
    spectra_callback = SpectraCallback(Updates(model, base, plan.sites), cfg.spectra, tracking)
    folder = run.path / CHECKPOINTS
    checkpoint = Checkpoint(folder, cfg.identity(), cfg.checkpoint_every, tracking, base)
    return Trial(plan, data, run, tracking, module, base, spectra_callback, checkpoint)


def adapt_model(trial: Trial, console: Console) -> None:
    """Trains one run."""
    plan, module, data, tracking = trial.plan, trial.module, trial.data, trial.tracking
    cfg = plan.cfg
    callbacks = [ProgressBar(cfg.adapter.method, console), trial.spectra_callback]
    if cfg.spectra.first_step and isinstance(cfg.adapter, Lora):
        callbacks.append(FirstStep(trial.spectra_callback.updates, tracking))
    trainer = plan.trainer(tracking, [*callbacks, trial.checkpoint])
    if (kept := trial.checkpoint.resume_path()) is None:
        if cfg.adapter.method != "none":
            log_theory(data, module.model, tracking)
        trainer.validate(module, data, verbose=False)
    if cfg.adapter.method != "none":
        fit(trainer, module, data, kept)
        module.final_step = {
            "step": float(trainer.global_step),
            "epoch": float(trainer.current_epoch),
        }


def finish_run(trial: Trial, console: Console) -> None:
    """What follows the last step: files, the check of the merge, what ΔW is worth."""
    plan, module, data, tracking = trial.plan, trial.module, trial.data, trial.tracking
    cfg, base, spectra_callback, run = plan.cfg, trial.base, trial.spectra_callback, trial.run
    if cfg.adapter.method == "none":
        whole = adapters.count(module.model).frozen
        tracking.log({"parameters/trainable": 0, "parameters/base": whole}, 0)
        return
    updates, change = spectra_callback.updates, {}
    if isinstance(module.model, FSDPModule):
        spectra_callback.updates = updates = Updates(_gather(plan, module), base, plan.sites)
        change = {"accelerator": "cpu"}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if process_rank():
        return
    quiet = plan.single_device_trainer(None, [], **change)
    _save_trained(
        plan.single_device_trainer(tracking, [], **change), module, data, base, run, tracking
    )
    arrays = spectra_callback.arrays()
    findings.write(run.path, arrays, None)  # whatever comes of the rest
    module.prefix = ""
    losses = partial(cut_losses, quiet, module, data, updates)
    learned = findings.analyze(updates, losses, cfg.spectra, cfg.bases_dir, console)
    findings.write(run.path, {**arrays, **learned.arrays}, learned.advice)
    assert module.final_step is not None
    tracking.log_findings(learned.metrics, learned.arrays, int(module.final_step["step"]))


def _gather(plan: Plan, module: BaseModule) -> nn.Module:
    """The model whose weights are spread over the processes, whole and in CPU memory again."""
    state = {key: full_tensor(value).cpu() for key, value in module.model.state_dict().items()}
    model = plan.model()
    if isinstance(plan.cfg.adapter, Lora):
        plan.attach(model)
    module.model = model
    precision.cast(module, plan.cfg.trainer)
    model.load_state_dict(state)
    return model


def _save_trained(
    trainer: pl.Trainer,
    module: BaseModule,
    data: Data,
    base: dict[str, Tensor],
    run: Run,
    tracking: Tracking,
) -> None:
    """Writes what was trained, adapter or model, and logs what it costs."""
    model, cost = module.model, adapters.count(module.model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    costs: dict[str, float] = {"parameters/trainable": trainable, "parameters/base": cost.frozen}
    if adapters.names(model):
        _check_merge(trainer, module, data, base)
        adapters.save(model, run.path / "adapter")
        tracking.log_artifact(run.path / "adapter", "adapter")
        costs |= {
            "bytes/adapter": cost.adapter_bytes,
            "bytes/optimizer": cost.optimizer_bytes,
            "bytes/full_optimizer": cost.full_optimizer_bytes,
        }
    else:
        (run.path / "model").mkdir()
        # Copies: safetensors does not write one memory under two names, as tied weights have.
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, run.path / "model" / "model.safetensors")
        tracking.log_artifact(run.path / "model", "model")
    tracking.log(costs, int(module.step_and_epoch()["step"]))


def log_theory(data: Data, model: nn.Module, tracking: Tracking) -> None:
    """One row of what the run's metrics should be at its end, where theory says so."""
    data.setup("fit")
    row: dict[str, float] = {}
    for metric, expected in data.predicted_metrics(model).items():
        row |= {
            f"theory/{metric}": expected.value,
            f"theory_error/{metric}": expected.standard_error,
        }
    if row:
        tracking.log(row, 0)


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
