"""Which weights get an adapter: targets pick sites, and each site gets its recipe."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_lab.adapters.init import INITS
from lora_lab.adapters.memory import Span, memory_span, overlaps, parameters_in_memory
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.scaling import SCALINGS
from lora_lab.adapters.sites import ADAPTERS, Site, adapter_class, candidate_sites
from lora_lab.adapters.target import (
    GROUPS,
    PatternError,
    RankError,
    Target,
    TargetError,
    as_list,
    fits,
)
from lora_lab.adapters.target_messages import (
    in_one,
    nearest,
    reason_none_picked,
    reason_tied,
)

OVER_RANK = ("error", "clip", "allow")
"""What becomes of a rank over that of the weight: refused, the weight's rank at the same scale, or
taken as it is (which trains more numbers than ΔW can use)."""

AT_MOST_FULL_RANK = ("orthogonal", *(name for name, init in INITS.items() if not init.is_random))
"""Inits that draw no more directions than the weight has."""

Patterns = Mapping[str, Mapping[str, float]]
"""Values for single sites: {"r" or "alpha": {glob on names: value}}."""


def find_sites(
    model: nn.Module,
    targets: Mapping[str, Target],
    recipe: Recipe | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    trained_in_full: Collection[str] = (),
    over_rank: str = "error",
    note: Callable[[str], object] = lambda text: None,
) -> list[Site]:
    """The sites that `targets` pick in `model`, in the model's order.

    Works on a model on the meta device: no weight is read. With `recipe` each site gets a recipe:
    what its target sets goes before `recipe`, and the patterns ({glob: value}, the first that fits)
    go before both. Sites whose parameter's key is in `trained_in_full` are left out, and weights
    that are tied to others, unless their target names them or has `tied`. `over_rank` is one of
    OVER_RANK. `note` is called with a text on the tied weights that are left out, and with one on
    the ranks that are clipped.

    Raises TargetError when a target or a pattern picks nothing, when two targets pick one site,
    when a picked weight is named and tied to another layer's, or is no parameter; RankError when r
    exceeds a site's rank; AdapterError for an invalid recipe. The error names all such sites.
    """
    if over_rank not in OVER_RANK:
        raise AdapterError(f"over_rank={over_rank!r}: must be one of {', '.join(OVER_RANK)}")
    _check_targets(targets)
    candidates = list(candidate_sites(model))
    label_by_site = _pick(model, targets, candidates, trained_in_full)
    picked = [site for site in candidates if site.name in label_by_site]
    patterns = {"r": rank_pattern or {}, "alpha": alpha_pattern or {}}
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        _check_globs([*(pattern or {})], picked, f"{name}:", PatternError)
    names_by_span = parameters_in_memory(model)
    sites: list[Site] = []
    clipped: list[tuple[Site, str]] = []
    errors: list[tuple[Site, AdapterError]] = []
    tied: list[tuple[Site, list[str]]] = []
    taken: set[object] = set()
    for site in picked:
        layer, target = model.get_submodule(site.layer), targets[label_by_site[site.name]]
        try:
            span, tied_to = _check_weight(site, layer, names_by_span)
            if tied_to and not target.tied:
                tied.append((site, names_by_span[span]))
                continue
            if (span, site.rows) in taken:
                continue  # tied on purpose, and adapted with the first layer that has it
            taken.add((span, site.rows))
            site = replace(site, tied_to=tied_to)
            if recipe is not None:
                site = replace(site, recipe=_site_recipe(site, target.recipe(recipe), patterns))
                site, clipping = _with_possible_recipe(site, layer, over_rank)
                clipped += [(site, clipping)] if clipping else []
            sites.append(site)
        except AdapterError as error:
            errors.append((site, error))
    named = [(site, names) for site, names in tied if targets[label_by_site[site.name]].names(site)]
    if named or (tied and not sites and not errors):
        raise TargetError(reason_tied(named or tied, targets, label_by_site))
    if errors:
        raise type(errors[0][1])(in_one([(site, str(error)) for site, error in errors]))
    if tied:
        note(f"left out: {reason_tied(tied, targets, label_by_site, is_left_out=True)}")
    if clipped:
        note(in_one(clipped))
    return sites


def _check_targets(targets: Mapping[str, Target]) -> None:
    is_mapping = isinstance(targets, Mapping)
    if not is_mapping or not all(isinstance(target, Target) for target in targets.values()):
        raise TargetError(
            f"targets={targets!r}: must be one of {', '.join(GROUPS)}, or "
            "{label: Target(match=…)} with a glob on names"
        )


def _pick(
    model: nn.Module,
    targets: Mapping[str, Target],
    sites: Sequence[Site],
    trained_in_full: Collection[str],
) -> dict[str, str]:
    """The names of the sites that the targets pick, each with the label of its target."""
    label_by_site: dict[str, str] = {}
    for label, target in targets.items():
        if target.kind not in GROUPS:
            raise TargetError(
                f"target '{label}': kind={target.kind!r} must be one of {', '.join(GROUPS)}"
            )
        picked = [site for site in sites if target.picks(site)]
        if not picked:
            raise TargetError(reason_none_picked(label, target, model, sites))
        names = [site.name for site in picked if site.key not in trained_in_full]
        if not names:
            shown = ", ".join(site.name for site in picked[:3])
            raise TargetError(
                f"target '{label}' picks only what trains in full (also_train): {shown}; "
                "leave the target out, or take this from also_train"
            )
        _check_globs(
            [*as_list(target.match), *as_list(target.exclude)], sites, f"target '{label}':"
        )
        for name in names:
            if name in label_by_site:
                raise TargetError(
                    f"targets '{label_by_site[name]}' and '{label}' both pick '{name}': "
                    "a weight takes one adapter; leave one of the two out, or narrow its match"
                )
            label_by_site[name] = label
    return label_by_site


def _check_globs(
    globs: Sequence[str], sites: Sequence[Site], where: str, error: type[TargetError] = TargetError
) -> None:
    for glob in globs:
        if not any(fits(site, glob) for site in sites):
            raise error(f"{where} '{glob}' fits no site; nearest: {nearest(glob, sites)}")


def _check_weight(
    site: Site, layer: nn.Module, names_by_span: Mapping[Span, list[str]]
) -> tuple[Span, tuple[str, ...]]:
    """Where the site's weight is in memory, and the names of parameters tied to it.

    Raises TargetError where it cannot be adapted.
    """
    weight = layer._parameters.get(site.parameter)
    if weight is None:
        raise TargetError(
            f"the weight of '{site.name}' is no parameter but computed from others (a norm or "
            "another parametrization): exclude it by a glob"
        )
    if reason := adapter_class(layer, site.parameter).reason_not_adaptable(layer):
        raise TargetError(f"'{site.name}' cannot be adapted: {reason}, or exclude it by a glob")
    span = memory_span(weight)
    names = names_by_span[span]
    parts = [n for other in names_by_span if overlaps(span, other) for n in names_by_span[other]]
    if parts:
        raise TargetError(
            f"the weight of '{site.name}' shares some of its memory with {', '.join(parts)}: an "
            "adapter would change one and not the other; exclude it by a glob"
        )
    return span, tuple(name for name in names if name != site.key)


def _site_recipe(site: Site, recipe: Recipe, patterns: Patterns) -> Recipe:
    """`recipe` with r and alpha of the first patterns that fit the site."""
    for key, globs in patterns.items():
        values = [value for glob, value in globs.items() if fits(site, glob)]
        recipe = replace(recipe, **{key: values[0]}) if values else recipe
    return recipe


def _with_possible_recipe(site: Site, layer: nn.Module, over_rank: str) -> tuple[Site, str]:
    """The site with a recipe that its weight can have; and a text on r, where it is clipped.

    Raises AdapterError where no such recipe is meant.
    """
    recipe, most, clipping = site.recipe, min(site.shape), ""
    assert recipe is not None
    recipe.check()
    if site.tied_to:
        recipe.check_shared(site.name)
    if recipe.dora and not adapter_class(layer, site.parameter).takes_dora:
        able = ", ".join(dict.fromkeys(A.kind for A in ADAPTERS if A.takes_dora))
        raise AdapterError(
            f"dora=true: '{site.name}' is of kind {site.kind}, DoRA is for {able}; "
            "leave it out of the target, or by its exclude"
        )
    if recipe.r > most:
        where = f"r={recipe.r} exceeds the rank of '{site.name}' (weight {_times(site.shape)})"
        if over_rank == "error":
            raise RankError(f"{where}: at most {most}; over_rank=clip takes that")
        if over_rank == "allow" and recipe.init in AT_MOST_FULL_RANK:
            raise RankError(f"{where}: init={recipe.init} has at most {most} directions")
        if over_rank == "clip":
            scale = SCALINGS[recipe.scaling]
            alpha = recipe.alpha * scale(1, recipe.r) / scale(1, most)  # the same scale
            site = replace(site, recipe=replace(recipe, r=most, alpha=alpha))
            clipping = f"{where}, where r is {most}"
    return site, clipping


def _times(shape: tuple[int, int]) -> str:
    return " × ".join(map(str, shape))
