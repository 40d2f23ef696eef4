"""One run from start to end: base, adapter, training, and what follows the last step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn

from lora_lab import report
from lora_lab.config.components import PretrainedBase
from lora_lab.config.schema import Full, Lora, TrainedBase
from lora_lab.config.stored_config import checked_config
from lora_lab.config.trust import components_of
from lora_lab.data import Data
from lora_lab.runs import Run, process_rank
from lora_lab.seeding import generator
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import bases
from lora_lab.training.callbacks.checkpoint import Checkpoint
from lora_lab.training.callbacks.first_step import FirstStep
from lora_lab.training.callbacks.progress import ProgressBar
from lora_lab.training.finish import finish_run
from lora_lab.training.galore import state_bytes
from lora_lab.training.modules import BaseModule
from lora_lab.training.plan import Plan
from lora_lab.training.run_record import record_run
from lora_lab.training.source_code import code_of
from lora_lab.training.trial import Trial, build_trial


def run(plan: Plan, console: Console) -> Run:
    """Trains and measures a planned run and gives its finished run directory.

    Where several processes train one run, each calls this. The first alone writes the run
    directory and does what follows the last step. An exception leaves the run's status `failed`,
    Ctrl-C and SIGTERM leave it `interrupted`.
    """
    cfg = plan.cfg
    with open_run(plan) as tracking:
        run = tracking.run
        model, _ = obtain_model(plan, tracking, console)
        data = plan.training_data()
        # From here on only dropout draws from torch's global random stream: adapters and data have
        # their generators. Each further process draws other dropout masks than the first.
        process = process_rank()
        seed = generator(cfg.seed, "dropout", process).initial_seed() if process else cfg.seed
        pl.seed_everything(seed % 2**32, verbose=False)
        if cfg.freezes_base:
            plan = plan.attach(model)
        if isinstance(cfg.adapter, Lora):
            console.print(report.site_table(plan.sites))
        trial = build_trial(plan, model, data, run, tracking, None)
        adapt_model(trial, console)
        finish_run(trial, console)
    return run


@contextmanager
def open_run(plan: Plan) -> Iterator[Tracking]:
    """A context in which the run directory is locked, its status is `running`, and it is tracked.

    W&B may raise or take minutes, so its part comes last, when all that is the run's own is on disk
    and status.json says how the run ended.
    """
    last = ExitStack()
    with (
        nullcontext(Run(plan.path)) if process_rank() else _record(plan, last) as run,
        Tracking(plan.cfg, run, plan.path) as tracking,
    ):
        last.push(tracking.finish_wandb)
        yield tracking


def _record(plan: Plan, last: ExitStack) -> AbstractContextManager[Run]:
    """`record_run` for a plan."""
    cfg = plan.cfg
    # Threads and devices are recorded because they change the order of floating-point sums.
    about = {"cell": cfg.cell(), "seed": cfg.seed, "threads": torch.get_num_threads()}
    about["code"] = code_of(components_of(cfg).values())
    about["devices"] = asdict(plan.devices)
    about |= {"is_reproduction": True} if plan.is_reproduction else {}
    run = checked_config(Run(plan.path))
    return record_run(run, cfg.to_dict(), overwrite=cfg.overwrite, last=last, **about)


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
        trainer.fit(module, data, ckpt_path=checkpoint.resume_path(), weights_only=True)
        return model, tracking.rows[first:]

    return bases.obtain(cfg, train_base, tracking.replay)


def adapt_model(trial: Trial, console: Console) -> None:
    """Trains the adapters, or with adapter=full the model; with adapter=none only validates.

    An interrupted training goes on from its checkpoint; a new one is validated before its first
    step. Sets the module's `final_step`.
    """
    plan, module, data, tracking = trial.plan, trial.module, trial.data, trial.tracking
    cfg = plan.cfg
    callbacks: list[pl.Callback] = [ProgressBar(cfg.adapter.method, console)]
    # What is measured after a step is what the allocation leaves of it.
    callbacks += [trial.adaptation] if trial.adaptation else []
    callbacks += [trial.spectra_callback, trial.selection]
    if cfg.spectra.first_step and isinstance(cfg.adapter, Lora):
        callbacks.append(FirstStep(trial.spectra_callback.updates, tracking))
    if trial.generation:
        callbacks.append(trial.generation)
    if trial.step_log:
        callbacks.append(trial.step_log)
    trainer = plan.trainer(tracking, [*callbacks, trial.cost, trial.checkpoint])
    if (checkpoint := trial.checkpoint.resume_path()) is None:
        if cfg.trains:
            log_theory(data, module.model, tracking)
        trainer.validate(module, data, verbose=False)
    if cfg.trains:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        module.final_step = module.step_and_epoch()
        if isinstance(cfg.adapter, Full):
            size = state_bytes(trainer.optimizers[0])
            tracking.log({"bytes/optimizer": size}, int(module.final_step["step"]))


def log_theory(data: Data, model: nn.Module, tracking: Tracking) -> None:
    """Logs what theory predicts of the run's metrics at its end, if the data set knows any."""
    data.setup("fit")
    row: dict[str, float] = {}
    for metric, expected in data.predicted_metrics(model).items():
        row[f"theory/{metric}"] = expected.value
        row[f"theory_error/{metric}"] = expected.standard_error
    if row:
        tracking.log(row, 0)
