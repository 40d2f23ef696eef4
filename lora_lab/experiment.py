"""One run from start to end: base, adapter, training, spectra, merge check, files."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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

from lora_lab import adapters, analysis, bases, packing, report
from lora_lab.adapters import AdapterError
from lora_lab.adapters.packed import sharing
from lora_lab.callbacks.checkpoint import Checkpoint
from lora_lab.callbacks.first_step import FirstStep
from lora_lab.callbacks.progress import ProgressBar
from lora_lab.callbacks.spectra import SpectraCallback
from lora_lab.config import Lora, TrainedBase
from lora_lab.data import Data
from lora_lab.modules import BaseModule, DivergedError, LoRAModule
from lora_lab.packing import Cuts, EachRun, Member, PackedCheckpoint, PackedModule, UnpackableError
from lora_lab.plan import Plan
from lora_lab.runs import (
    CHECKPOINTS,
    Run,
    RunBusyError,
    RunFinishedError,
    logged_alone,
    rank,
    record,
)
from lora_lab.seeding import generator
from lora_lab.spectra import SVD
from lora_lab.tracking import Tracking
from lora_lab.updates import Updates, whole

log = logging.getLogger(__name__)


@dataclass
class Trial:
    """A run from its base to its end: the model that adapts, and what measures and keeps it."""

    plan: Plan
    data: Data
    run: Run
    tracking: Tracking
    module: BaseModule
    base: dict[str, Tensor]
    spectral: SpectraCallback
    checkpoint: Checkpoint


def run(plan: Plan, console: Console) -> Run:
    """Runs what was planned and returns its finished directory. The run fails by raising.

    Of a run's several processes the first does all but training alone, and has its files.
    """
    cfg = plan.cfg
    with (
        nullcontext(Run(plan.path)) if rank() else _recorded(plan) as run,
        Tracking(cfg, run, plan.path) as tracking,
    ):
        base = _base(plan, tracking, console)
        data = plan.data("adapt")
        model = plan.model()
        model.load_state_dict(base.state)
        # From here on dropout is the only thing that draws from the global stream.
        own = generator(cfg.seed, "dropout", rank()).initial_seed() if rank() else cfg.seed
        pl.seed_everything(own % 2**32, verbose=False)
        if isinstance(cfg.adapter, Lora):
            plan.attach(model)
            console.print(report.sites(plan.sites))
        trial = _trial(plan, model, data, run, tracking, None)
        _train(trial, console)
        _conclude(trial, console)
    return run


def run_pack(plans: Sequence[Plan], console: Console) -> list[Exception | None]:
    """Runs plans that differ in their adapters' settings, optimizers' and seeds alone, in one pass.

    Each has its own directory and W&B run, and fails alone: what it raised is given, by place.
    """
    errors: list[Exception | None] = [None] * len(plans)
    live: dict[int, tuple[ExitStack, Run, Tracking]] = {}

    def fail(i: int, error: BaseException) -> None:
        errors[i] = error if isinstance(error, Exception) else None
        live.pop(i)[0].__exit__(type(error), error, error.__traceback__)

    try:
        for i, plan in enumerate(plans):
            stack = ExitStack()
            try:
                own = stack.enter_context(_recorded(plan))
                live[i] = stack, own, stack.enter_context(Tracking(plan.cfg, own, plan.path))
            except (RunBusyError, RunFinishedError) as error:
                errors[i] = error
        if not live:
            return errors
        first = plans[next(iter(live))]
        base = _base(first, next(iter(live.values()))[2], console)
        for _, _, tracking in [*live.values()][1:]:
            tracking.replay(base.rows)
        model = first.model()
        model.load_state_dict(base.state)
        models = {i: sharing(model) for i in live}
        for i, own in models.items():  # all of them before the weights get another dtype
            plans[i].attach(own)
        state: dict[str, Tensor] | None = None
        trials: dict[int, Trial] = {}
        for i, (_, own, tracking) in live.items():
            data = plans[i].data("adapt")
            trials[i] = _trial(plans[i], models[i], data, own, tracking, state)
            state = trials[i].base
        by_epoch: dict[int, list[int]] = {}
        for i, trial in trials.items():
            by_epoch.setdefault(trial.checkpoint.kept_epochs(), []).append(i)
        for group in by_epoch.values():
            own = {i: partial(fail, i) for i in group}
            for i in _train_packed(model, {i: trials[i] for i in group}, own, console):
                with logged_alone(trials[i].run.path):
                    try:
                        _conclude(trials[i], console)
                        live[i][0].close()
                        del live[i]
                    except Exception as error:
                        fail(i, error)
    except BaseException as error:
        for i in list(live):
            fail(i, error)
        if not isinstance(error, Exception):
            raise
    return errors


def _recorded(plan: Plan) -> AbstractContextManager[Run]:
    cfg = plan.cfg
    # Sums in another order are other bits.
    about = {"cell": cfg.cell(), "seed": cfg.seed, "threads": torch.get_num_threads()}
    return record(plan.path, cfg.plain(), overwrite=cfg.overwrite, **about)


def _base(plan: Plan, tracking: Tracking, console: Console) -> bases.Base:
    cfg = plan.cfg
    if rank():
        return bases.wait(cfg)

    def train(checkpoints: Path) -> tuple[nn.Module, list[dict[str, Any]]]:
        assert isinstance(cfg.base, TrainedBase)
        pl.seed_everything(cfg.base.seed, verbose=False)
        data, model = plan.data("base"), plan.model()
        outputs = data.sizes["out_features"]
        module = BaseModule(model, data.task, outputs, cfg.base.optimizer, prefix="base/")
        first = len(tracking.rows)
        checkpoint = Checkpoint(checkpoints, bases.key(cfg), cfg.checkpoint_every, tracking)
        callbacks = [ProgressBar("base", console), checkpoint]
        trainer = plan.alone(tracking, callbacks, max_epochs=cfg.base.epochs)
        _fit(trainer, module, data, checkpoint.kept())
        return model, tracking.rows[first:]

    return bases.obtain(cfg, train, tracking.replay)


def _fit(trainer: pl.Trainer, module: BaseModule, data: Data, kept: Path | None) -> None:
    """Trains, from a checkpoint if one is kept; the last epoch is validated whatever its number."""
    trainer.fit(module, data, ckpt_path=kept, weights_only=True)
    if trainer.current_epoch % (trainer.check_val_every_n_epoch or 1):
        trainer.validate(module, data, verbose=False)


def _trial(
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
    # In the dtypes it is trained in, which need not be the file's.
    plan.alone(None, []).precision_plugin.convert_module(module)
    if base is None:
        base = {key: value.clone() for key, value in adapters.base_state_dict(model).items()}
    spectral = SpectraCallback(Updates(model, base, plan.sites), cfg.spectra, tracking)
    folder = run.path / CHECKPOINTS
    checkpoint = Checkpoint(folder, cfg.identity(), cfg.checkpoint_every, tracking, base)
    return Trial(plan, data, run, tracking, module, base, spectral, checkpoint)


def _train(trial: Trial, console: Console) -> None:
    """Trains one run."""
    plan, module, data, tracking = trial.plan, trial.module, trial.data, trial.tracking
    cfg = plan.cfg
    callbacks = [ProgressBar(cfg.adapter.method, console), trial.spectral]
    if cfg.spectra.first_step and isinstance(cfg.adapter, Lora):
        callbacks.append(FirstStep(trial.spectral.updates, tracking))
    trainer = plan.trainer(tracking, [*callbacks, trial.checkpoint])
    if (kept := trial.checkpoint.kept()) is None:
        if cfg.adapter.method != "none":
            _log_theory(data, module.model, tracking)
        trainer.validate(module, data, verbose=False)
    if cfg.adapter.method != "none":
        _fit(trainer, module, data, kept)
        module.end = {"step": float(trainer.global_step), "epoch": float(trainer.current_epoch)}


def _train_packed(
    model: nn.Module,
    trials: dict[int, Trial],
    fail: Mapping[int, Callable[[Exception], None]],
    console: Console,
) -> list[int]:
    """Trains runs that begin at the same epoch together; gives those that did not fail.

    Where the model cannot be computed for many runs at once, each is trained alone.
    """
    members = {
        i: Member(t.module, t.tracking, t.spectral, t.checkpoint, fail[i], t.checkpoint.kept())
        for i, t in trials.items()
        if isinstance(t.module, LoRAModule)
    }
    left = list(trials)

    def ends(i: int) -> Callable[[Exception], None]:
        def end(error: Exception) -> None:
            left.remove(i)
            fail[i](error)

        return end

    first = next(iter(trials.values()))
    plan, data = first.plan, first.data
    seeds = [t.plan.cfg.identity() for t in trials.values()]
    pl.seed_everything(generator("pack", *seeds).initial_seed() % 2**32, verbose=False)
    for i, member in members.items():
        member.fail = ends(i)
    try:
        if len(members) == 1:
            raise UnpackableError("there is one run")
        module = PackedModule(model, data, list(members.values()))
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        precision = plan.alone(None, []).precision_plugin
        with precision.forward_context():
            module.check(precision.convert_input(batch), packing.room())
    except UnpackableError as error:
        if len(members) > 1:
            log.warning("not packed: %s", error)
        for i, trial in trials.items():
            pl.seed_everything(trial.plan.cfg.seed, verbose=False)
            try:
                _train(trial, console)
            except Exception as alone:
                ends(i)(alone)
        return left
    arguments = plan.cfg.trainer.model_dump()
    if most := arguments.get("gradient_clip_val"):
        module.clip = most, arguments.get("gradient_clip_algorithm") or "norm"
    log.info("packed: %d runs, %d at once", len(members), module.at_once)
    checkpoint = PackedCheckpoint(list(members.values()))
    bar = ProgressBar(f"{len(members)} runs", console)
    trainer = plan.trainer(None, [bar, EachRun(), checkpoint], gradient_clip_val=None)
    try:
        if not checkpoint.contents:
            for trial in trials.values():
                _log_theory(data, trial.module.model, trial.tracking)
            trainer.validate(module, data, verbose=False)
        _fit(trainer, module, data, None)
    except DivergedError:
        if left:
            raise
    for i in left:
        date = {"step": float(trainer.global_step), "epoch": float(trainer.current_epoch)}
        trials[i].module.end = date
        trials[i].run.update(packed=len(trials))
    return left


def _conclude(trial: Trial, console: Console) -> None:
    """What follows the last step: files, the check of the merge, what ΔW is worth."""
    plan, module, data, tracking = trial.plan, trial.module, trial.data, trial.tracking
    cfg, base, spectral, run = plan.cfg, trial.base, trial.spectral, trial.run
    if cfg.adapter.method == "none":
        whole = adapters.count(module.model).frozen
        tracking.log({"parameters/trainable": 0, "parameters/base": whole}, 0)
        return
    updates, change = spectral.updates, {}
    if isinstance(module.model, FSDPModule):
        spectral.updates = updates = Updates(_gather(plan, module), base, plan.sites)
        change = {"accelerator": "cpu"}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if rank():
        return
    quiet = plan.alone(None, [], **change)
    _keep(plan.alone(tracking, [], **change), module, data, base, run, tracking)
    arrays = spectral.arrays()
    analysis.write(run.path, arrays, None)  # whatever comes of the rest
    module.prefix = ""
    losses = partial(cut_losses, quiet, module, data, updates)
    said = analysis.analyze(updates, losses, cfg.spectra, cfg.bases_dir, console)
    analysis.write(run.path, {**arrays, **said.arrays}, said.advice)
    assert module.end is not None
    tracking.log_findings(said.metrics, said.arrays, int(module.end["step"]))


def _gather(plan: Plan, module: BaseModule) -> nn.Module:
    """The model whose weights are spread over the processes, whole and in CPU memory again."""
    state = {key: whole(value).cpu() for key, value in module.model.state_dict().items()}
    model = plan.model()
    if isinstance(plan.cfg.adapter, Lora):
        plan.attach(model)
    module.model = model
    plan.alone(None, []).precision_plugin.convert_module(module)
    model.load_state_dict(state)
    return model


def _keep(
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
        tracking.artifact(run.path / "adapter", "adapter")
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
        tracking.artifact(run.path / "model", "model")
    tracking.log(costs, int(module.now()["step"]))


def _log_theory(data: Data, model: nn.Module, tracking: Tracking) -> None:
    """One row of what the run's metrics should be at its end, where theory says so."""
    data.setup("fit")
    row: dict[str, float] = {}
    for metric, expected in data.expected(model).items():
        row |= {f"theory/{metric}": expected.value, f"theory_error/{metric}": expected.error}
    if row:
        tracking.log(row, 0)


def val_loss(quiet: pl.Trainer, module: BaseModule, data: Data) -> float:
    """The validation loss of the model as it is now, by a Trainer that logs nothing."""
    (result,) = quiet.validate(module, data, verbose=False)
    return result[f"{module.prefix}val/loss"]


def cut_losses(
    quiet: pl.Trainer,
    module: BaseModule,
    data: Data,
    updates: Updates,
    found: Mapping[str, SVD],
    every: Sequence[Mapping[str, int]],
) -> Iterator[float]:
    """The validation losses of the model with ΔW cut to each of `every` ranks by site.

    Of adapters whose ΔW is a product all in one pass, as the runs of a pack are; of others, and
    where the model cannot be computed so, with each cut written into the weights.
    """
    if all(map(updates.is_product, updates.sites)):
        try:
            bare = sharing(module.model)
            adapters.detach(bare)
            cuts = Cuts(bare, data, module.optimizer, list(updates.sites.values()), found, every)
            quiet.validate(cuts, data, verbose=False)
            yield from cuts.means().tolist()
            return
        except (AdapterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            log.debug("cut one by one: %s", error)
    with updates.cutting(found) as cut:
        for ranks in every:
            cut(ranks)
            yield val_loss(quiet, module, data)


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
