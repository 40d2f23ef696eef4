"""Checks of a run's parts: directories, memory, optimizers, AdaLoRA's budget."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lora_lab.adapters import AdapterError, Site
from lora_lab.adapters.rank_redistribution import check_rho
from lora_lab.config.checks import check_kind, resolve_component
from lora_lab.config.schema import Config, ConfigError, Lora, Optimizer
from lora_lab.data import Data
from lora_lab.training.callbacks.allocation import final_triplets
from lora_lab.training.galore import GaLore


def check_directory(key: str, path: Path) -> None:
    """Raises ConfigError unless `path`, or the nearest parent that exists, can be written to."""
    try:
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:  # a name that is too long, or a loop of links
        raise ConfigError(f"{key}={path}: {error.strerror}") from None
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"{key}={path}: {existing} is no directory that can be written to")


def check_cuts(cfg: Config, sites: Sequence[Site]) -> None:
    """Raises ConfigError for a rank of adapter.cut to which no site's ΔW would be cut."""
    if not (isinstance(cfg.adapter, Lora) and cfg.adapter.cut and sites):
        return
    has_rounds = cfg.adapter.restarts is not None  # of which each adds to the rank
    ranks = {s.name: min(s.shape) if has_rounds else s.rank_of_update for s in sites}
    site = max(ranks, key=lambda name: ranks[name])
    if cfg.adapter.cut[0] >= (most := ranks[site]):
        nearest = f"; nearest: {most - 1}" if most > 1 else ", so that nothing can be cut"
        raise ConfigError(
            f"adapter.cut={cfg.adapter.cut}: each must be below {most}, the highest rank that ΔW "
            f"has at a site ('{site}'){nearest}"
        )


def check_restarts(cfg: Config) -> None:
    """Raises ConfigError where ReLoRA cannot begin anew."""
    is_relora = isinstance(cfg.adapter, Lora) and cfg.adapter.restarts is not None
    if is_relora and cfg.trainer.model_dump().get("strategy") == "fsdp":
        raise ConfigError(
            "trainer=fsdp: not with adapter=relora, whose factors grow, where each process would "
            "hold a part of them; trainer=ddp trains it on several devices"
        )


def check_redistribution(cfg: Config, sites: Sequence[Site]) -> None:
    """Raises ConfigError where adapter.rho is to move ranks and no site's init is EVA's."""
    if isinstance(cfg.adapter, Lora):
        try:
            check_rho(cfg.adapter.rho, sites)
        except AdapterError as error:
            raise ConfigError(f"adapter.{error}") from None


def check_memory(cfg: Config, data: Data, model: nn.Module) -> None:
    """Raises ConfigError where a model that is trained from scratch, or drawn rows, take too much.

    Of data sets of one's own only the model is known.
    """
    sizes = {"model": sum(p.numel() * p.element_size() for p in model.parameters())}
    samples = cfg.data.arguments.get("samples", 0)
    if cfg.data.target.startswith("lora_lab."):
        sizes[f"data.samples={samples}"] = 4 * samples * sum(data.sizes.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for setting, size in sizes.items():
        if size > memory:
            raise ConfigError(
                f"{setting}: takes {size / 2**30:.3g} GiB, and this machine has "
                f"{memory / 2**30:.3g}"
            )


def check_optimizer(key: str, optimizer: Optimizer) -> None:
    """Raises ConfigError unless the optimizer can be built, here over one number."""
    build = resolve_component(key, optimizer, torch.optim.Optimizer, ["params"])
    try:
        built = build([nn.Parameter(torch.zeros(1))], **optimizer.arguments)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"{key}: {error}") from None
    check_kind(key, optimizer, built, torch.optim.Optimizer)


def check_galore(cfg: Config) -> None:
    """Raises ConfigError where GaLore would not have the gradients of all weights."""
    callee = cfg.optimizer.callee
    if not (isinstance(callee, type) and issubclass(callee, GaLore)):
        return
    if cfg.freezes_base:
        raise ConfigError(
            f"optimizer=galore: projects the gradients of full weights, and adapter="
            f"{cfg.adapter.method} trains others; take adapter=full, or optimizer=adam"
        )
    if cfg.trainer.model_dump().get("strategy") == "fsdp":
        raise ConfigError(
            "trainer=fsdp: not with optimizer=galore, whose SVD is of a full gradient, where each "
            "process would have a part; trainer=ddp trains it on several devices"
        )


def check_allocation(cfg: Config, sites: Sequence[Site]) -> None:
    """Raises ConfigError where AdaLoRA's budget is none, or its run may not come to it."""
    if not isinstance(cfg.adapter, Lora) or cfg.adapter.allocation is None:
        return
    budget, trainer = cfg.adapter.budget, cfg.trainer.model_dump()
    ranks = [site.recipe.r for site in sites if site.recipe is not None]
    if not 1 <= final_triplets(budget, ranks) <= sum(ranks):
        raise ConfigError(
            f"adapter.budget={budget:g}: must be at least {1 / len(ranks):.3g}, a rank of 1 at one "
            f"of the {len(ranks)} sites, and at most {sum(ranks) / len(ranks):g}, the mean of the "
            "ranks at the start (adapter.r)"
        )
    if cfg.select != "last" or cfg.early_stopping is not None:
        key = f"select={cfg.select}" if cfg.select != "last" else "early_stopping"
        raise ConfigError(
            f"{key}: not with adapter=adalora, whose ranks are above the budget until "
            "adapter.allocation.final, so that an earlier result would have more of them"
        )
    if trainer.get("strategy") == "fsdp":
        raise ConfigError(
            "trainer=fsdp: not with adapter=adalora, which compares all numbers of all sites, and "
            "each process would have a part of them; trainer=ddp trains it on several devices"
        )
    if str(trainer.get("precision")) in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer.precision={trainer['precision']}: not with adapter=adalora, whose scores are "
            "running means of gradients, which are scaled by a changing factor here; bf16-mixed "
            "has none"
        )
