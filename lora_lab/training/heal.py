"""The trained adapter cut to lower ranks, and each of the smaller adapters trained some more steps.

ΔW of each site is cut to its best approximation of rank k (Eckart & Young 1936), exactly, from its
factors; the training after it is called healing.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from torch import nn

from lora_lab import adapters
from lora_lab.adapters.stored import StoredUpdate, read_adapter
from lora_lab.analysis.cut import CutSite, cut_adapter, cut_update
from lora_lab.config.schema import Lora
from lora_lab.run_files import CUTS, HEALED
from lora_lab.seeding import generator
from lora_lab.training.callbacks.progress import ProgressBar
from lora_lab.training.loop import TrainingLoop
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.modules import BaseModule, DivergedError
from lora_lab.training.trial import Trial

log = logging.getLogger(__name__)


class HealingModule(LoRAModule):
    """Trains a cut adapter from where the run's training ended, on the batches that come next.

    `start` are the step and the epoch of the run's result. Steps and epochs are counted on from
    there. The optimizer is a new one: moments of the old factors say nothing of the new ones. Its
    learning rate begins at `optimizer.lr` again (or with `optimizer.warmup`), and its schedule
    spans the steps of healing.
    """

    def __init__(self, *arguments: Any, start: dict[str, float], **settings: Any):
        """`arguments` and `settings` are LoRAModule's."""
        super().__init__(*arguments, **settings)
        self.start = start

    def on_train_start(self) -> None:
        """Sets Lightning's loops to the first batch that the run's result has not been trained on.

        `start` of epoch 2.25, at 8 batches an epoch: 2 epochs are done, and 2 batches of the next.
        """
        loop = self.trainer.fit_loop
        assert isinstance(loop.epoch_loop, TrainingLoop)
        batches = int(self.trainer.num_training_batches)
        done = round(self.start["epoch"] * batches)
        epochs, loop.epoch_loop.batches_to_skip = divmod(done, batches)
        loop.epoch_progress.increment_by(epochs)
        loop.epoch_loop.batch_progress.total.increment_by(done)

    def step_and_epoch(self) -> dict[str, float]:
        """The steps and epochs so far, those of the run's training included."""
        if self.final_step is not None:
            return self.final_step
        return {"step": self.start["step"] + self.global_step, "epoch": float(self.epochs_done)}


def cut_and_heal(make_trainer: Callable[..., pl.Trainer], trial: Trial, console: Console) -> None:
    """Cuts the run's result to each rank of `adapter.cut`, and trains it `adapter.heal` steps more.

    For each rank K it logs the metrics of the cut model as `cut/K/val/loss` and so on, those after
    healing as `healed/K/…`, and stores the adapters in cut/K/ and healed/K/. A site whose ΔW has no
    higher rank stays as it is. Both factors of a site that is cut are trained, whatever
    `adapter.trains` says. Dropout masks are drawn from (seed, K). A model whose loss is infinite or
    NaN is an error in the log, and has no numbers. The run's adapter and metrics stay.

    `make_trainer(tracking, **arguments)` gives a Trainer on one device. A run that is interrupted
    here begins here again, from the checkpoint of the end of its training.
    """
    adapter = trial.plan.cfg.adapter
    for k in adapter.cut if isinstance(adapter, Lora) else ():
        write_cut(trial.run.path / "adapter", folder := trial.run.path / CUTS / str(k), k)
        with _in_place(trial.module.model, folder):
            try:
                _measure(make_trainer, trial, trial.module, f"{CUTS}/{k}/")
                if isinstance(adapter, Lora) and adapter.heal:
                    _heal(make_trainer, trial, k, adapter.heal, console)
            except DivergedError as error:
                log.error("%s: cut to rank %d, the adapter has no such numbers", error, k)


def write_cut(adapter: Path, to: Path, k: int) -> None:
    """Writes the adapter of a folder, cut to rank k, to the folder `to`."""

    def cut(site: str, update: StoredUpdate) -> CutSite:
        return cut_update(site, update, lambda *_: k)

    cut_adapter(read_adapter(adapter), to, cut)


@contextmanager
def _in_place(model: nn.Module, folder: Path) -> Iterator[None]:
    """A context in which the adapter of `folder` is on the model in the place of its own."""
    (trained,) = adapters.names(model)
    adapters.load(model, folder, name="smaller")
    try:
        yield
    finally:
        adapters.detach(model, "smaller")
        adapters.switch(model, trained)


def _measure(
    make_trainer: Callable[..., pl.Trainer], trial: Trial, module: BaseModule, prefix: str
) -> None:
    """Validates and, where the data has one, tests the model; logs this and the adapter's size."""
    module.prefix = prefix
    make_trainer(trial.tracking).validate(module, trial.data, verbose=False)
    if trial.data.has_test:
        make_trainer(trial.tracking).test(module, trial.data, verbose=False)
    cost = adapters.count(module.model)
    sizes = {"parameters/trainable": cost.trainable + cost.also_trained}
    sizes["bytes/adapter"] = cost.adapter_bytes
    row = {f"{prefix}{key}": value for key, value in sizes.items()}
    trial.tracking.log(row, int(module.step_and_epoch()["step"]))


def _heal(
    make_trainer: Callable[..., pl.Trainer], trial: Trial, k: int, steps: int, console: Console
) -> None:
    """Trains the model, whose adapter is cut to rank k, and measures and stores the result."""
    cfg, data, trained = trial.plan.cfg, trial.data, trial.module
    assert isinstance(trained, LoRAModule)
    assert trained.final_step is not None
    prefix, outputs = f"{HEALED}/{k}/", data.sizes["out_features"]
    arguments = data.task, outputs, cfg.optimizer, prefix, data.metrics, cfg.label_smoothing
    settings: dict[str, Any] = {"lr_ratio": trained.lr_ratio, "start": trained.final_step}
    module = HealingModule(trained.model, *arguments, **settings)
    module.forgetting = trained.forgetting
    pl.seed_everything(generator(cfg.seed, HEALED, k).initial_seed() % 2**32, verbose=False)
    bar = ProgressBar(f"rank {k}", console)
    length = {"max_steps": steps, "limit_val_batches": 0}
    make_trainer(trial.tracking, callbacks=[bar], **length).fit(module, data)
    module.final_step = module.step_and_epoch()
    _measure(make_trainer, trial, module, prefix)
    adapters.save(module.model, trial.run.path / HEALED / str(k))
