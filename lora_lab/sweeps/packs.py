"""Which jobs of a multirun are trained together, in one pass over their base, and which are not."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from lora_lab.adapters import INITS
from lora_lab.config.schema import Config, Lora, content_hash
from lora_lab.runs import NOT_IN_IDENTITY
from lora_lab.sweeps.multirun import Job
from lora_lab.training.plan import Plan

ELEMENTWISE_OPTIMIZERS = (
    *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
)
"""Optimizers of torch that move every number by its own gradient alone."""

OWN = ("r", "alpha", "dropout", "init")
"""What of a target's sites may be different in each run of a pack."""


def reason_to_run_alone(plan: Plan) -> str | None:
    """Why a run cannot share a pass with any other; None where it can."""
    cfg, trainer = plan.cfg, plan.cfg.trainer.model_dump()
    where, _, name = cfg.optimizer.target.rpartition(".")
    if not isinstance(cfg.adapter, Lora):
        return f"adapter={cfg.adapter.method} trains no adapter"
    if cfg.spectra.first_step:
        return "spectra.first_step asks for the dense gradients"
    if any(site.tied_to for site in plan.sites):
        return "its adapters are tied"
    if not (where.startswith("torch.optim") and name in ELEMENTWISE_OPTIMIZERS):
        return f"optimizer {cfg.optimizer.target} is not known to be elementwise"
    if plan.processes > 1:
        return f"it takes {plan.processes} devices"
    if str(trainer["precision"]).startswith("16"):
        return "trainer.precision=16-mixed scales the gradients of all runs by one number"
    if trainer.get("accumulate_grad_batches", 1) != 1:
        return "trainer.accumulate_grad_batches is more than 1"
    return None


def pack_key(cfg: Config) -> str:
    """The hash of what the runs of a pack have in common: all but adapters' numbers and draws."""
    assert isinstance(cfg.adapter, Lora)
    content = cfg.model_dump(by_alias=True, exclude={*NOT_IN_IDENTITY, "seed", "optimizer"})
    adapter, targets = content.pop("adapter"), content["target"]
    inits = [adapter["init"], *(rule["init"] or adapter["init"] for rule in targets.values())]
    for rule in targets.values():
        for name in OWN:
            del rule[name]
    kinds: list[Any] = [[INITS[init].from_weight for init in inits], adapter["trains"]]
    return content_hash([content, *kinds, adapter["dora"], cfg.optimizer.target])


def group_into_packs(
    jobs: Sequence[Job], wanted: Sequence[int], at_once: int, most: int | None
) -> list[list[int]]:
    """The places of `wanted` jobs in packs of at most `most` runs, `at_once` of them if it can be.

    Says in a line what they are, and why others are alone.
    """
    reasons, groups = Counter[str](), dict[str, list[int]]()
    for i in wanted:
        plan = jobs[i].plan
        assert plan is not None
        if reason := reason_to_run_alone(plan):
            reasons[reason] += 1
        groups.setdefault(f"alone {i}" if reason else pack_key(plan.cfg), []).append(i)
    found = []
    for group in groups.values():
        # Each pack has its share of every rank, so that they end together.
        group.sort(key=lambda i: _ranks(jobs[i]))
        parts = max(1, min(len(group), round(at_once * len(group) / len(wanted))))
        parts = max(parts, -(-len(group) // (most or len(group))))
        found += [group[part::parts] for part in range(parts)]
    console = Console(width=200, highlight=False)
    sizes = ", ".join(str(len(pack)) for pack in found if len(pack) > 1)
    if sizes:
        console.print(f"[bold]packed:[/] {sum(map(len, found))} runs, together {sizes}")
    for reason, n in reasons.items():
        console.print(f"[bold]alone:[/] {n} of the runs: {reason}")
    if others := sum(len(pack) == 1 for pack in found) - reasons.total():
        console.print(f"[bold]alone:[/] {others} of the runs: no other has base, data and targets")
    return found


def pack_task(launcher: Any, jobs: Sequence[Job], pack: list[int], elsewhere: bool = False) -> Any:
    """What the process of a pack does: the launcher's own job, or all the jobs of the pack.

    `elsewhere`, on another machine, each is planned anew.
    """
    if len(pack) == 1:
        return launcher.task_function
    every = [jobs[i].overrides if elsewhere else jobs[i].plan for i in pack]
    return partial(launcher.task_function, pack=every)


def _ranks(job: Job) -> list[int]:
    assert job.plan is not None
    return [site.recipe.r for site in job.plan.sites if site.recipe is not None]
