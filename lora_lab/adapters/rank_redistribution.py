"""EVA's redistribution: sites share their ranks by the variance of the inputs of their layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lab.adapters.calibration import Calibration, adapter_without_values, statistics
from lora_lab.adapters.data_inits import DataError, principal_directions
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.sites import Site
from lora_lab.adapters.target_messages import in_one
from lora_lab.seeding import generator


def check_rho(rho: float, sites: Sequence[Site]) -> None:
    """Raises AdapterError unless ranks can be moved between these sites, up to rho · r at each."""
    if type(rho) not in (int, float) or not 1 <= rho < math.inf:
        raise AdapterError(f"rho={rho!r}: must be a number of at least 1")
    if rho != 1 and not any(map(_is_eva, sites)):
        raise AdapterError(f"rho={rho:g} moves ranks between sites with init=eva: there is none")


def redistributed(
    model: nn.Module,
    sites: Sequence[Site],
    calibration: Calibration | None,
    rho: float,
    note: Callable[[str], object] = lambda text: None,
) -> list[Site]:
    """The sites with the ranks that EVA gives them (Paischer et al. 2024, section 3.2).

    A direction's share is λᵢ / Σ λ: that part of the variance of its layer's inputs which lies
    along the i-th principal direction. Of each site with init eva the first round(rho · r) shares
    count, or as many as its weight has rank. Of all these sites together as many of the largest are
    taken as their ranks r add up to, and a site's rank is how many of its own are among them. Of
    equal shares, as of q, k and v, those of the first site are taken first. Each site keeps its
    scale. Ranks are those of PEFT's EvaConfig(rho).

    Sites of rank 0 are left out, and `note` is called with a text on them. Raises AdapterError
    where the batches have too few rows for rho · r directions, and what `statistics` raises.
    """
    shares = _shares(model, [site for site in sites if _is_eva(site)], calibration, rho)
    owners = [site for site, of_site in shares.items() for _ in of_site]
    order = torch.cat([*shares.values()]).argsort(descending=True, stable=True)
    budget = sum(_rank(site) for site in shares)
    taken = [owners[i] for i in order[:budget].tolist()]
    ranks = {site: taken.count(site) if site in shares else _rank(site) for site in sites}
    if without := [site for site in sites if not ranks[site]]:
        reason = "'{}' gets no rank by init=eva with rho={:g}, and no adapter"
        note(in_one([(site, reason.format(site.name, rho)) for site in without]))
    return [replace(site, recipe=_recipe(site).with_rank(r)) for site, r in ranks.items() if r]


def _shares(
    model: nn.Module, sites: Sequence[Site], calibration: Calibration | None, rho: float
) -> dict[Site, Tensor]:
    """The shares of the first k directions of each site (k,), in the order of `sites`."""
    adapters = {site: adapter_without_values(model, site) for site in sites}
    shares: dict[Site, Tensor] = {}
    errors: list[tuple[Site, str]] = []
    for site, inputs in statistics(model, adapters, calibration, "inputs"):
        k = min(round(rho * _rank(site)), *site.shape)
        try:
            # One stream for all: layers with the same inputs have the same shares, to the last bit.
            shares[site] = principal_directions(inputs, k, generator("eva", k))[0]
        except DataError as error:
            errors.append((site, f"'{site.name}': {error}"))
    if errors:
        raise AdapterError(in_one(errors))
    return shares


def _is_eva(site: Site) -> bool:
    return _recipe(site).init == "eva"


def _rank(site: Site) -> int:
    return _recipe(site).r


def _recipe(site: Site) -> Recipe:
    assert site.recipe is not None
    return site.recipe
