"""Which sites can have an adapter: where their weights are in memory, and what they are tied to."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from lora_lab.adapters.memory import (
    Parameters,
    Span,
    memory_span,
    names_at,
    names_of_parts,
    parameters_in_memory,
)
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.sites import Site, adapter_class, candidate_sites
from lora_lab.adapters.target import TargetError
from lora_lab.adapters.weight import WeightAdapter


def adaptable_sites(model: nn.Module) -> dict[str, Site | TargetError]:
    """All sites of a model, in one walk: by name, and by the key of a parameter that is one site.

    Each says which parameters it is tied to. A site that can have no adapter is the error that says
    why.
    """
    parameters = parameters_in_memory(model)
    candidates = [*candidate_sites(model, with_blocks=True)]
    sites: dict[str, Site | TargetError] = {}
    for site in candidates:
        try:
            sites[site.name] = with_ties(site, check_weight(site, model, parameters)[1])
        except TargetError as error:
            sites[site.name] = error
    return {site.key: sites[site.name] for site in candidates if site.rows is None} | sites


def placed_site(sites: Mapping[str, Site | TargetError], name: str, kind: str) -> Site:
    """The site, of `adaptable_sites`, on which an adapter of this kind sits under this name.

    Raises AdapterError where there is none.
    """
    if not isinstance(site := sites.get(name), Site):
        near = difflib.get_close_matches(name, sites, n=3, cutoff=0.0)
        raise site or TargetError(f"there is no such site; nearest: {', '.join(near)}")
    if kind == WeightAdapter.kind:
        # So it is stored of a subclass of nn.Linear by a version that took no subclass for linear,
        # and of experts by one that took all of their matrices for one of E rows.
        return replace(site, kind=kind, name=name, experts=1)
    if kind != site.kind:
        raise TargetError(f"is of kind {site.kind}, the adapter's was {kind}")
    return site


def require_one_adapter_each(sites: Iterable[Site]) -> None:
    """Raises AdapterError where two of the sites are one weight, by two of its names."""
    name_by_weight: dict[object, str] = {}
    for site in sites:
        for key in (site.key, *site.tied_to):
            if (other := name_by_weight.setdefault((key, site.rows), site.name)) != site.name:
                raise AdapterError(
                    f"'{other}' and '{site.name}' are one weight by its different names, and a "
                    "weight takes one adapter: untie it, or attach under one of them alone"
                )


def check_weight(site: Site, model: nn.Module, parameters: Parameters) -> tuple[Span, list[str]]:
    """Where the site's weight is in memory, and its names: several where it is tied.

    Raises TargetError where it cannot be adapted.
    """
    layer = model.get_submodule(site.layer)
    weight = layer._parameters.get(site.parameter)
    if weight is None:
        raise TargetError(
            f"the weight of '{site.name}' is no parameter but computed from others (a norm or "
            "another parametrization): exclude it by a glob"
        )
    if reason := adapter_class(layer, site.parameter).reason_not_adaptable(layer):
        raise TargetError(f"'{site.name}' cannot be adapted: {reason}, or exclude it by a glob")
    span = memory_span(weight)
    if parts := names_of_parts(span, parameters):
        raise TargetError(
            f"the weight of '{site.name}' shares some of its memory with {', '.join(parts)}: an "
            "adapter would change one and not the other; exclude it by a glob"
        )
    return span, names_at(span, parameters)


def with_ties(site: Site, names: Iterable[str]) -> Site:
    """The site of a weight that has these names."""
    return replace(site, tied_to=tuple(name for name in names if name != site.key))
