"""Which jobs of a multirun are trained together as a pack, and why the others are not."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig

from lora_lab.adapters import INITS
from lora_lab.config.schema import Config, Lora, content_hash
from lora_lab.console import print_labelled
from lora_lab.runs import NOT_IN_IDENTITY, Run
from lora_lab.sweeps.multirun import Job
from lora_lab.training.plan import Plan

ELEMENTWISE_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam")
ELEMENTWISE_OPTIMIZERS += ("RAdam", "RMSprop", "Rprop", "SGD")
"""torch's optimizers that move each number by its own gradient alone, as a pack needs it.

Adafactor, Muon and LBFGS do not: they would mix the runs that lie in one stacked parameter.
"""

Pack = list[int]
"""Jobs that are trained together, or one alone, as indices of a launcher's list of jobs."""

RUNS_PER_PROCESS = 4
"""The fewest runs for which another process is started, where they can share one.

Each process starts up, reads the base and computes it for its runs, which fewer do not make up for.
"""

VARIES_IN_PACK = ("r", "alpha", "dropout", "init")
"""Settings of a target that may differ between the runs of a pack."""


def reason_to_run_alone(plan: Plan) -> str | None:
    """Why a run cannot be in a pack with any other; None where it can."""
    cfg, trainer = plan.cfg, plan.cfg.trainer.model_dump()
    module, _, optimizer = cfg.optimizer.target.rpartition(".")
    if not isinstance(cfg.adapter, Lora):
        return f"adapter={cfg.adapter.method} trains no adapter"
    if cfg.adapter.allocation is not None:
        return "adapter=adalora prunes triplets by the numbers and gradients of one run"
    if cfg.adapter.restarts is not None:
        return "adapter=relora has factors that grow, which a pack does not stack"
    if cfg.spectra.first_step:
        return "spectra.first_step asks for the dense gradients"
    if cfg.generate and cfg.generate.every_n_steps:
        return "generate.every_n_steps asks for the texts of one model during training"
    if any(site.tied_to for site in plan.sites):
        return "its adapters are tied"
    if not (module.startswith("torch.optim") and optimizer in ELEMENTWISE_OPTIMIZERS):
        return f"optimizer {cfg.optimizer.target} is not known to be elementwise"
    if plan.processes > 1:
        return f"it takes {plan.processes} devices"
    if str(trainer["precision"]).startswith("16"):
        return "trainer.precision=16-mixed scales the gradients of all runs by one number"
    return None


def pack_key(cfg: Config) -> str:
    """A hash of all that runs of one pack must have in common; equal for runs that may be packed.

    In common: the base, the data and their order, the targets, the length and precision of the
    training, when ΔW is measured, an adapter's form, which of its tensors train, whether it is
    DoRA, which factor its init leaves at zero (none, with PiSSA), and the optimizer's class. Left
    out, and so free to differ: r, alpha, scaling, init, dropout, LoRA+'s ratio, the optimizer's
    settings, `seed`, and what cannot change a result.
    """
    assert isinstance(cfg.adapter, Lora)
    content = cfg.model_dump(by_alias=True, exclude={*NOT_IN_IDENTITY, "seed", "optimizer"})
    adapter, targets = content.pop("adapter"), content["target"]
    inits = [adapter["init"], *(rule["init"] or adapter["init"] for rule in targets.values())]
    for rule in targets.values():
        for name in VARIES_IN_PACK:
            del rule[name]
    starts = [(INITS[init].starts_nonzero, INITS[init].zero_factor) for init in inits]
    kinds: list[Any] = [starts, adapter["trains"]]
    return content_hash([content, *kinds, adapter["dora"], adapter["form"], cfg.optimizer.target])


def packs_to_run(jobs: Sequence[Job], config: DictConfig, processes: int) -> list[Pack]:
    """The jobs that a launcher has to run: in packs where it has pack=true, else one by one.

    Not run are those with an invalid config and, unless overwrite=true, those that are finished and
    have their report. `processes` is how many packs can be trained side by side.
    """
    wanted = [i for i, job in enumerate(jobs) if _needs_process(job, config.overwrite)]
    launcher = config.hydra.launcher
    if launcher.pack and wanted:
        return group_into_packs(jobs, wanted, processes, launcher.max_runs)
    return [[i] for i in wanted]


def _needs_process(job: Job, overwrite: bool) -> bool:
    if job.path is None:
        return False
    return overwrite or job.state != "finished" or not Run(job.path).has_report


def group_into_packs(
    jobs: Sequence[Job], wanted: Sequence[int], processes: int, max_runs: int | None
) -> list[Pack]:
    """Sorts the `wanted` jobs, indices of `jobs`, into packs; a job by itself is a pack of one.

    Prints the sizes of the packs, and why other jobs run alone.

    Args:
        processes: how many packs can be trained side by side. There will be about as many, but
            not more than leave RUNS_PER_PROCESS runs to each.
        max_runs: the most runs in a pack; None for no limit.
    """
    reasons, jobs_by_key = Counter[str](), dict[str, list[int]]()
    for i in wanted:
        plan = jobs[i].plan
        assert plan is not None
        if reason := reason_to_run_alone(plan):
            reasons[reason] += 1
        tensors = [site.form_tensors for site in plan.sites if site.recipe is not None]
        key = f"alone {i}" if reason else f"{pack_key(plan.cfg)} {plan.base_seed} {tensors}"
        jobs_by_key.setdefault(key, []).append(i)
    packs: list[Pack] = []
    for group in jobs_by_key.values():
        share = min(round(processes * len(group) / len(wanted)), len(group) // RUNS_PER_PROCESS)
        packs += _split(group, jobs, max(1, min(len(group), share)), max_runs or len(group))
    unlike = sum(len(group) == 1 for group in jobs_by_key.values()) - reasons.total()
    reasons["no other has the same base, data, targets and training"] += unlike
    split = sum(len(pack) == 1 for pack in packs) - reasons.total()
    reasons["hydra.launcher.max_runs leaves no other for its pack"] += split
    _print_packs(packs, reasons)
    return packs


def _split(group: list[int], jobs: Sequence[Job], parts: int, max_runs: int) -> list[Pack]:
    """Jobs that may be one pack in `parts` packs, or in more where `max_runs` asks for it.

    Sorted by rank and dealt out in turn, so that packs cost the same and end together: of ranks
    1, 1, 2, 2, 4, 4 two packs get 1, 2, 4 each.
    """
    group.sort(key=lambda i: _ranks(jobs[i]))
    parts = max(parts, -(-len(group) // max_runs))
    return [group[part::parts] for part in range(parts)]


def _print_packs(packs: list[Pack], reasons: Counter[str]) -> None:
    sizes = ", ".join(str(len(pack)) for pack in packs if len(pack) > 1)
    if sizes:
        print_labelled("packed", f"{sum(map(len, packs))} runs, together {sizes}")
    for reason, n in (+reasons).items():  # those that are not 0
        print_labelled("alone", f"{n} of the runs: {reason}")


def pack_task(launcher: Any, jobs: Sequence[Job], pack: Pack, elsewhere: bool = False) -> Any:
    """The function that a pack's process calls: `train.job` for one job, or for the full pack.

    Plans are sent with it. Where the process is `elsewhere`, on another machine, it gets overrides
    in their place, and plans anew: devices and files can be others.
    """
    if len(pack) == 1:
        return launcher.task_function
    pack_jobs = [jobs[i].overrides if elsewhere else jobs[i].plan for i in pack]
    return partial(launcher.task_function, pack=pack_jobs)


def _ranks(job: Job) -> list[int]:
    """The ranks of a job's adapters, site by site."""
    assert job.plan is not None
    return [site.recipe.r for site in job.plan.sites if site.recipe is not None]
