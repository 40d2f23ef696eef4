"""Adapters whose first values are those of a stored adapter (adapter.start_from).

The LoRA paper starts the adapters of MRPC, RTE and STS-B from that of MNLI.
"""

from pathlib import Path

import torch
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Site
from lora_lab.adapters.init import INITS
from lora_lab.adapters.stored import StoredUpdate, read_updates
from lora_lab.config.schema import Config, ConfigError, Lora
from lora_lab.data.content import content_hash


def checked(cfg: Config, sites: list[Site]) -> Config:
    """The config with the hash of the stored adapter, whose values each site can start from.

    Raises ConfigError where it is none, does not fit, or is another than the config's hash says.
    """
    if not isinstance(cfg.adapter, Lora) or (path := cfg.adapter.start_from) is None:
        return cfg
    where = f"adapter.start_from={path}"
    try:
        updates = read_updates(Path(path))
        sha256 = content_hash(path)
    except (AdapterError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if cfg.adapter.start_sha256 not in (None, sha256):
        raise ConfigError(
            f"{where}: it is another now than in the config, whose adapter.start_sha256 is "
            f"{cfg.adapter.start_sha256[:12]}"
        )
    reasons = [f"'{site.name}' {reason}" for site in sites if (reason := _reason(site, updates))]
    if reasons:
        more = f", and {len(reasons) - 3} sites more" if len(reasons) > 3 else ""
        raise ConfigError(f"{where}: {'; '.join(reasons[:3])}{more}")
    adapter = cfg.adapter.model_copy(update={"start_sha256": sha256})
    return cfg.model_copy(update={"adapter": adapter})


def _reason(site: Site, updates: dict[str, StoredUpdate]) -> str | None:
    """Why the adapter of a site cannot start from the stored ones; None where it can."""
    recipe = site.recipe
    assert recipe is not None
    if recipe.form != "lora" or recipe.dora or recipe.trains == "core" or site.kind == "experts":
        return "is no plain A and B (adapter=lora), which alone can start from stored ones"
    if INITS[recipe.init].starts_nonzero or INITS[recipe.init].reads:
        return f"has init={recipe.init}, which draws its own first values"
    update = updates.get(site.name)
    if update is None:
        return "has no adapter there"
    if update.magnitude is not None or update.outer is not None:
        return "has there a DoRA or a LoKr, and no product of A and B"
    shape = site.shape[::-1] if site.kind == "embedding" else site.shape
    if (update.r, update.shape) != (recipe.r, shape):
        out, rest = update.shape
        return f"has there r={update.r} on a weight {out} × {rest}, and here r={recipe.r}"
    return None


@torch.no_grad()
def fill(model: nn.Module, path: str) -> None:
    """Gives each adapter of a model A and B of the stored one of its site, with the same ΔW."""
    updates = read_updates(Path(path))
    for site, adapter in adapters.attached(model).items():
        update = updates[site]
        adapter.A.copy_(update.A)
        adapter.B.copy_(update.B * (update.scale / adapter.scale))
