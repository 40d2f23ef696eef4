"""Many runs from start to end, trained together: each has its own directory, and fails alone."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import lightning.pytorch as pl
from rich.console import Console
from torch import Tensor, nn

from lora_lab.adapters.pack import copy_sharing_weights
from lora_lab.packing.callbacks import EachRun, PackedCheckpoint
from lora_lab.packing.module import Member, PackedModule, UnpackableError
from lora_lab.runs import Run, RunBusyError, RunFinishedError, log_only_to
from lora_lab.seeding import generator
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import experiment
from lora_lab.training.callbacks.progress import ProgressBar
from lora_lab.training.experiment import Trial
from lora_lab.training.modules import DivergedError, LoRAModule
from lora_lab.training.plan import Plan

log = logging.getLogger(__name__)


def run_pack(plans: Sequence[Plan], console: Console) -> list[Exception | None]:
    """Runs plans that differ in their adapters' settings, optimizers' and seeds alone, in one pass.

    Gives what each raised, by place: a run that fails leaves the others alone.
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
                own = stack.enter_context(experiment.open_run(plan))
                live[i] = stack, own, stack.enter_context(Tracking(plan.cfg, own, plan.path))
            except (RunBusyError, RunFinishedError) as error:
                errors[i] = error
        if live:
            by_epoch: dict[int, dict[int, Trial]] = {}
            model, trials = _trials(plans, {i: rest for i, (_, *rest) in live.items()}, console)
            for i, trial in trials.items():
                by_epoch.setdefault(trial.checkpoint.resume_epoch(), {})[i] = trial
            for group in by_epoch.values():
                _train(model, group, {i: partial(fail, i) for i in group}, console)
                for i in [i for i in group if i in live]:
                    with log_only_to(trials[i].run.path):
                        try:
                            experiment.finish_run(trials[i], console)
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


def _trials(
    plans: Sequence[Plan], live: Mapping[int, Sequence], console: Console
) -> tuple[nn.Module, dict[int, Trial]]:
    """The base that the runs share, trained or found, and each run with its own adapters on it."""
    (first, (_, tracking)), *others = live.items()
    base = experiment.obtain_base(plans[first], tracking, console)
    for _, (_, tracking) in others:
        tracking.replay(base.rows)
    model = plans[first].model()
    model.load_state_dict(base.state)
    models = {i: copy_sharing_weights(model) for i in live}
    for i, own in models.items():  # all of them before the weights get another dtype
        plans[i].attach(own)
    state: dict[str, Tensor] | None = None
    trials: dict[int, Trial] = {}
    data = plans[first].data("adapt")  # in the memory once: its order is by its own seed
    for i, (run, tracking) in live.items():
        trials[i] = experiment.build_trial(plans[i], models[i], data, run, tracking, state)
        state = trials[i].base
    return model, trials


def _train(
    model: nn.Module,
    trials: Mapping[int, Trial],
    fail: Mapping[int, Callable[[Exception], None]],
    console: Console,
) -> None:
    """Trains runs that begin at the same epoch together; those that fail are told to `fail`.

    Where the model cannot be computed for many runs at once, each is trained alone.
    """
    plan, data = (first := next(iter(trials.values()))).plan, first.data
    members: dict[Member, Trial] = {}
    for i, trial in trials.items():
        assert isinstance(trial.module, LoRAModule)
        members[Member(trial.module, trial.tracking, fail[i])] = trial
    seeds = [trial.plan.cfg.identity() for trial in trials.values()]
    pl.seed_everything(generator("pack", *seeds).initial_seed() % 2**32, verbose=False)
    module = PackedModule(model, data, list(members))
    try:
        data.setup("fit")
        quiet = plan.single_device_trainer(None, [])
        batch = quiet.precision_plugin.convert_input(next(iter(data.train_dataloader())))
        with quiet.precision_plugin.forward_context():
            module.check(batch, quiet.strategy.root_device.type == "cuda")
    except UnpackableError as error:
        log.warning("not packed: %s", error)
        for i, trial in trials.items():
            pl.seed_everything(trial.plan.cfg.seed, verbose=False)
            try:
                experiment.adapt_model(trial, console)
            except Exception as alone:
                fail[i](alone)
        return
    arguments = plan.cfg.trainer.model_dump()
    if most := arguments.get("gradient_clip_val"):
        module.clip = most, arguments.get("gradient_clip_algorithm") or "norm"
    log.info("packed: %d runs, %d at once", len(members), module.at_once)
    spectral = {member: trial.spectra_callback for member, trial in members.items()}
    checkpoint = PackedCheckpoint({m: (t.checkpoint, spectral[m]) for m, t in members.items()})
    callbacks = [ProgressBar(f"{len(members)} runs", console), EachRun(spectral), checkpoint]
    trainer = plan.trainer(None, callbacks, gradient_clip_val=None)
    try:
        if not checkpoint.contents:
            for trial in trials.values():
                experiment.log_theory(data, trial.module.model, trial.tracking)
            trainer.validate(module, data, verbose=False)
        experiment.fit(trainer, module, data, None)
    except DivergedError:
        if module.members:
            raise
    for member in module.members:
        date = {"step": float(trainer.global_step), "epoch": float(trainer.current_epoch)}
        member.module.final_step = date
        members[member].run.update_status(packed=len(members))
