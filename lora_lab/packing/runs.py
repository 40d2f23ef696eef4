"""Runs trained together from start to end: each has its own directory, and fails by itself."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import lightning.pytorch as pl
from rich.console import Console
from torch import Tensor, nn

from lora_lab.adapters.pack import copy_sharing_weights
from lora_lab.data import Data
from lora_lab.packing.callbacks import EachRun, PackedCheckpoint
from lora_lab.packing.check import UnpackableError, runs_per_pass
from lora_lab.packing.cost import PackCost
from lora_lab.packing.member import Member
from lora_lab.packing.module import PackedModule
from lora_lab.seeding import generator
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import experiment
from lora_lab.training.callbacks.checkpoint import Place
from lora_lab.training.callbacks.progress import ProgressBar
from lora_lab.training.finish import finish_run
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.modules import DivergedError
from lora_lab.training.plan import Plan
from lora_lab.training.precision import device_type, precision_plugin
from lora_lab.training.run_record import log_only_to
from lora_lab.training.trial import Trial, build_trial

log = logging.getLogger(__name__)


def run_pack(plans: Sequence[Plan], console: Console) -> list[Exception | None]:
    """Trains runs over one base together; each writes to its directory what it would by itself.

    The plans may differ in their adapters' and optimizers' settings and in seeds (see
    `sweeps.packs`). Returns for each plan the error that its run failed with, or None. A run that
    fails leaves the others alone.
    """
    pack_runs = PackRuns(len(plans))
    try:
        for i, plan in enumerate(plans):
            pack_runs.begin(i, plan)
        if pack_runs.open_runs:
            model, trials = _build_trials(plans, pack_runs.open_runs, console)
            for group in _groups_by_place(trials):
                _train(model, group, pack_runs, console)
                for i in [i for i in group if i in pack_runs.open_runs]:
                    pack_runs.finish(i, trials[i], console)
    except BaseException as error:  # Ctrl-C, or what is wrong with all of the runs
        for i in list(pack_runs.open_runs):
            pack_runs.fail(i, error)
        if not isinstance(error, Exception):
            raise
    return pack_runs.errors


class PackRuns:
    """The runs of a pack from begin to end, by the index of their plan."""

    def __init__(self, count: int):
        self.open_runs: dict[int, Tracking] = {}
        """The runs whose status is `running`, each as what logs its numbers."""
        self.errors: list[Exception | None] = [None] * count
        """What each run failed with; None for one that runs or is finished."""
        self._exits: dict[int, ExitStack] = {}
        """Closing one writes how its run ended."""

    def begin(self, i: int, plan: Plan) -> None:
        """Opens the directory and the loggers of the pack's run `i`.

        A run that is finished, that another process runs, or whose files cannot be opened is left
        out: its error says which.
        """
        try:
            with ExitStack() as exits:
                self.open_runs[i] = exits.enter_context(experiment.open_run(plan))
                self._exits[i] = exits.pop_all()
        except Exception as error:
            self.errors[i] = error

    def finish(self, i: int, trial: Trial, console: Console) -> None:
        """Does what follows a run's last step, and closes it as finished."""
        with log_only_to(trial.run.path):
            try:
                finish_run(trial, console)
                self._exits[i].close()
                del self.open_runs[i]
            except Exception as error:
                self.fail(i, error)

    def fail(self, i: int, error: BaseException) -> None:
        """Closes a run as failed, or as interrupted where it was stopped."""
        self.errors[i] = error if isinstance(error, Exception) else None
        del self.open_runs[i]
        # What the run's context managers see where an error leaves their `with` block.
        try:
            self._exits[i].__exit__(type(error), error, error.__traceback__)
        except Exception as cause:  # as the run's directory, where that was removed
            self.errors[i] = cause


def _build_trials(
    plans: Sequence[Plan], open_runs: Mapping[int, Tracking], console: Console
) -> tuple[nn.Module, dict[int, Trial]]:
    """The base that the runs share, and each run's model, adapters and callbacks over it.

    The first run trains the base, unless it is cached; the others log the same rows of it.
    """
    (first, first_tracking), *others = open_runs.items()
    model, base_rows = experiment.obtain_model(plans[first], first_tracking, console)
    for _, tracking in others:
        tracking.replay(base_rows)
    models = {i: copy_sharing_weights(model) for i in open_runs}
    # All of them before the weights get another dtype.
    attached_plans = {i: plans[i].attach(run_model) for i, run_model in models.items()}
    base_weights: Mapping[str, Tensor] | None = None  # of the first run, which all share
    trials: dict[int, Trial] = {}
    data = plans[first].training_data()  # in memory once: runs of a pack have the same data.seed
    for i, tracking in open_runs.items():
        plan, run = attached_plans[i], tracking.run
        trials[i] = build_trial(plan, models[i], data, run, tracking, base_weights)
        base_weights = trials[i].base
    return model, trials


def _groups_by_place(trials: Mapping[int, Trial]) -> list[dict[int, Trial]]:
    """The runs in groups that resume from the same batch, as only such can train together."""
    groups: dict[Place, dict[int, Trial]] = {}
    for i, trial in trials.items():
        groups.setdefault(trial.checkpoint.resume_place(), {})[i] = trial
    return list(groups.values())


def _train(model: nn.Module, trials: Mapping[int, Trial], runs: PackRuns, console: Console) -> None:
    """Trains runs that begin at one batch: together, or one after another where that cannot be."""
    members: list[Member] = []
    for i, trial in trials.items():
        assert isinstance(trial.module, LoRAModule)
        members.append(Member(trial, trial.module, partial(runs.fail, i)))
    first = members[0].trial
    # Dropout masks of all runs are drawn from one stream, so its seed is made of all their configs.
    identities = [trial.plan.cfg.identity() for trial in trials.values()]
    pl.seed_everything(generator("pack", *identities).initial_seed() % 2**32, verbose=False)
    module = PackedModule(model, first.data, members)
    try:
        module.runs_per_pass = _runs_per_pass(module, first.plan, first.data)
    except UnpackableError as error:
        log.warning("not packed: %s", error)
        _train_one_by_one(members, console)
    else:
        _train_together(module, members, console)


def _runs_per_pass(module: PackedModule, plan: Plan, data: Data) -> int:
    """How many runs one pass takes, tried on the first batch at the run's precision."""
    data.setup("fit")
    plugin = precision_plugin(plan.cfg.trainer)
    batch = plugin.convert_input(next(iter(data.train_dataloader())))
    with plugin.forward_context():
        return runs_per_pass(module, batch, device_type(plan.cfg.trainer) == "cuda")


def _train_one_by_one(members: Sequence[Member], console: Console) -> None:
    """Trains each run as if it were in no pack."""
    for member in members:
        pl.seed_everything(member.trial.plan.cfg.seed, verbose=False)
        try:
            experiment.adapt_model(member.trial, console)
        except Exception as error:
            member.fail(error)


def _train_together(module: PackedModule, members: Sequence[Member], console: Console) -> None:
    """Trains all runs in one Trainer. A pack whose last run has diverged ends without an error."""
    first = members[0].trial
    arguments = first.plan.cfg.trainer.model_dump()
    # The Trainer would clip the gradients of all runs by their common norm.
    if limit := arguments.get("gradient_clip_val"):
        module.clipping = limit, arguments.get("gradient_clip_algorithm") or "norm"
    module.batches_per_step = arguments.get("accumulate_grad_batches", 1)
    log.info("packed: %d runs, %d at once", len(members), module.runs_per_pass)
    checkpoint = PackedCheckpoint(members)
    cost = PackCost(members, checkpoint)
    callbacks = [ProgressBar(f"{len(members)} runs", console), EachRun(), cost, checkpoint]
    trainer = first.plan.trainer(None, callbacks, gradient_clip_val=None, accumulate_grad_batches=1)
    try:
        if not checkpoint.contents:  # what is logged before the first step of a fresh training
            for member in members:
                experiment.log_theory(first.data, member.module.model, member.trial.tracking)
            trainer.validate(module, first.data, verbose=False)
        trainer.fit(module, first.data)
    except DivergedError:
        if module.members:
            raise
    for member in module.members:
        member.module.final_step = module.step_and_epoch()
    for member in members:
        if member.module.final_step:  # else it failed
            try:
                member.trial.run.update_status(packed=len(members))
            except OSError as error:  # its directory was removed
                member.fail(error)
