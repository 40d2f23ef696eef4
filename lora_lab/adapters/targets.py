"""Which weights get an adapter: targets pick sites, and each site gets its recipe."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lora_lab.adapters.adaptable import check_weight, with_ties
from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.globs import as_list, check_pattern
from lora_lab.adapters.init import INITS
from lora_lab.adapters.memory import parameters_in_memory
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.sites import Site, adapter_class, candidate_sites
from lora_lab.adapters.target import (
    GROUPS,
    PatternError,
    RankError,
    SitesByName,
    Target,
    TargetError,
)
from lora_lab.adapters.target_messages import (
    in_one,
    nearest,
    reason_no_dora,
    reason_none_picked,
    reason_tied,
)

OVER_RANK = ("error", "clip", "allow")
"""What becomes of a rank over that of the weight: refused, the weight's rank at the same scale, or
taken as it is (which trains more numbers than ΔW can use)."""

AT_MOST_FULL_RANK = ("orthogonal", *(name for name, init in INITS.items() if not init.is_random))
"""Inits that draw no more directions than the weight has."""


def find_sites(
    model: nn.Module,
    targets: Mapping[str, Target] | str,
    recipe: Recipe | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    trained_in_full: Collection[str] = (),
    over_rank: str = "error",
    note: Callable[[str], object] = lambda text: None,
) -> list[Site]:
    """The sites that `targets` pick in `model`, in the model's order.

    Works on a model on the meta device: no weight is read. `targets` are {label: Target}, or one of
    GROUPS. With `recipe` each site gets a recipe: what its target sets goes before `recipe`, and
    the patterns ({glob: value}, the first that fits) go before both. Sites whose parameter's key is
    in `trained_in_full` are left out, and weights that are tied to others, unless their target
    names them or has `tied`. `over_rank` is one of OVER_RANK. `note` is called with a text on the
    tied weights that are left out, and with one on the ranks that are clipped.

    Raises TargetError when a target or a pattern picks nothing, when two targets pick one site,
    when a picked weight is named and tied to another layer's, or is no parameter; RankError when r
    exceeds a site's rank; AdapterError for an invalid recipe. The error names all such sites.
    """
    if over_rank not in OVER_RANK:
        raise AdapterError(f"over_rank={over_rank!r}: must be one of {', '.join(OVER_RANK)}")
    targets = {targets: Target(kind=targets)} if isinstance(targets, str) else targets
    _check_targets(targets)
    candidates = SitesByName([*candidate_sites(model, with_blocks=True)])
    label_by_site = _pick(model, targets, candidates, trained_in_full)
    patterns = {"r": rank_pattern, "alpha": alpha_pattern}
    settings_by_site = _settings_by_patterns(patterns, candidates, label_by_site)
    parameters = parameters_in_memory(model)
    outcome = _Outcome()
    taken: set[object] = set()
    for site in candidates.sites:
        if site.name not in label_by_site:
            continue
        target = targets[label_by_site[site.name]]
        try:
            span, names = check_weight(site, model, parameters)
            if len(names) > 1 and not target.tied:
                outcome.tied.append((site, names))
            elif (span, site.rows) not in taken:  # else adapted with the first layer that has it
                taken.add((span, site.rows))
                site = with_ties(site, names)
                if recipe is not None:
                    settings = settings_by_site.get(site.name, {})
                    site = replace(site, recipe=replace(target.recipe(recipe), **settings))
                    site, clipping = _with_possible_recipe(site, over_rank)
                    outcome.clipped += [(site, clipping)] if clipping else []
                outcome.sites.append(site)
        except AdapterError as error:
            outcome.errors.append((site, error))
    _report(outcome, model, targets, label_by_site, note)
    return outcome.sites


@dataclass
class _Outcome:
    """What becomes of the sites that targets pick. All are looked at before any error is raised."""

    sites: list[Site] = field(default_factory=list)
    """Those that get an adapter."""
    clipped: list[tuple[Site, str]] = field(default_factory=list)
    """Of `sites`, those that get a lower rank than was asked for, each with a text on it."""
    tied: list[tuple[Site, list[str]]] = field(default_factory=list)
    """Those left out since their weight is tied, each with all names of the weight."""
    errors: list[tuple[Site, AdapterError]] = field(default_factory=list)
    """Those that can have no adapter, or not this one."""


def _report(
    outcome: _Outcome,
    model: nn.Module,
    targets: Mapping[str, Target],
    label_by_site: Mapping[str, str],
    note: Callable[[str], object],
) -> None:
    """Raises one error for all sites that have one; calls `note` on what is left out or clipped."""
    tied, errors = outcome.tied, [*outcome.errors]
    if without_dora := [site for site in outcome.sites if _lacks_dora(site, model)]:
        reason = reason_no_dora(without_dora, targets, label_by_site)
        errors.append((without_dora[0], AdapterError(reason)))
    named = [(s, names) for s, names in tied if targets[label_by_site[s.name]].names_exactly(s)]
    if named or (tied and not outcome.sites and not errors):
        raise TargetError(reason_tied(named or tied, targets, label_by_site))
    if errors:
        raise type(errors[0][1])(in_one([(site, str(error)) for site, error in errors]))
    if tied:
        note(f"left out: {reason_tied(tied, targets, label_by_site, is_left_out=True)}")
    if outcome.clipped:
        note(in_one(outcome.clipped))


def _lacks_dora(site: Site, model: nn.Module) -> bool:
    """Whether the site is to have DoRA and its kind has none."""
    wants = site.recipe is not None and site.recipe.dora
    layer = model.get_submodule(site.layer)
    takes_dora = adapter_class(layer, site.parameter).takes_dora and not site.is_block_of_layer
    return wants and not takes_dora


def _check_targets(targets: Mapping[str, Target]) -> None:
    """Raises TargetError for what are no targets, and for a value that no target can have."""
    is_mapping = isinstance(targets, Mapping)
    if not is_mapping or not all(
        isinstance(label, str) and isinstance(target, Target) for label, target in targets.items()
    ):
        raise TargetError(
            f"targets={targets!r}: must be one of {', '.join(GROUPS)}, or "
            "{'label': Target(match=…)} with a glob on names"
        )
    for label, target in targets.items():
        target.check(label)


def _pick(
    model: nn.Module,
    targets: Mapping[str, Target],
    sites: SitesByName,
    trained_in_full: Collection[str],
) -> dict[str, str]:
    """The names of the sites that the targets pick, each with the label of its target."""
    label_by_site: dict[str, str] = {}
    for label, target in targets.items():
        picked = target.pick(sites)
        if not picked:
            raise TargetError(reason_none_picked(label, target, model, sites))
        names = [site.name for site in picked if site.key not in trained_in_full]
        if not names:
            shown = ", ".join(site.name for site in picked[:3])
            raise TargetError(
                f"target '{label}' picks only what trains in full (also_train): {shown}; "
                "leave the target out, or take this from also_train"
            )
        for glob in (*as_list(target.match), *as_list(target.exclude)):
            if not sites.fitting(glob):
                near = nearest(glob, sites.sites)
                raise TargetError(f"target '{label}': '{glob}' fits no site; nearest: {near}")
        for name in names:
            if name in label_by_site:
                raise TargetError(
                    f"targets '{label_by_site[name]}' and '{label}' both pick '{name}': "
                    "a weight takes one adapter; leave one of the two out, or narrow its match"
                )
            label_by_site[name] = label
    for site in sites.sites:
        if site.is_block_of_layer and {site.name, site.layer} <= label_by_site.keys():
            raise TargetError(
                f"'{site.layer}' is picked by the target '{label_by_site[site.layer]}', and its "
                f"block '{site.name}' by '{label_by_site[site.name]}': a weight takes one adapter; "
                f"target.{label_by_site[site.layer]}.exclude='{site.layer}' leaves the layer out"
            )
    return label_by_site


def _settings_by_patterns(
    patterns: Mapping[str, Mapping[str, float] | None],
    sites: SitesByName,
    picked: Collection[str],
) -> dict[str, dict[str, float]]:
    """What `patterns`, of "r" and of "alpha", set for single sites: {site's name: {key: value}}.

    Of several globs that fit a site the first decides. Raises AdapterError.
    """
    settings_by_site: dict[str, dict[str, float]] = {}
    for key, pattern in patterns.items():
        where = {"r": "rank_pattern", "alpha": "alpha_pattern"}[key]
        check_pattern(where, {} if pattern is None else pattern)
        for glob, value in (pattern or {}).items():
            try:
                replace(Recipe(r=1, alpha=1.0), **{key: value}).check()
            except AdapterError as error:
                raise PatternError(f"{where}={{{glob!r}: {value!r}}}: {error}") from None
            names = [name for i in sites.fitting(glob) if (name := sites.sites[i].name) in picked]
            if not names:
                near = nearest(glob, [site for site in sites.sites if site.name in picked])
                raise PatternError(f"{where}: '{glob}' fits no site; nearest: {near}")
            for name in names:
                settings_by_site.setdefault(name, {}).setdefault(key, value)
    return settings_by_site


def _with_possible_recipe(site: Site, over_rank: str) -> tuple[Site, str]:
    """The site with a recipe that its weight can have; and a text on r, where it is clipped.

    Raises AdapterError where no such recipe is meant.
    """
    recipe, clipping = site.recipe, ""
    assert recipe is not None
    recipe.check()
    init, form = INITS[recipe.init], FORMS[recipe.form]
    if init.kinds is not None and site.kind not in init.kinds:
        raise AdapterError(
            f"init={recipe.init}: '{site.name}' is of kind {site.kind}, it is for "
            f"{', '.join(init.kinds)}; give its target another init, or leave it out"
        )
    if form is not None and site.kind not in form.kinds:
        raise AdapterError(
            f"form={recipe.form}: '{site.name}' is of kind {site.kind}, it is for "
            f"{', '.join(form.kinds)}; leave it out of the targets, or take form=lora "
            "(in a run adapter=lora)"
        )
    if site.tied_to:
        recipe.check_shared(site.name)
    most = min(site.shape) // init.directions
    if recipe.r > most:
        share = "the rank" if init.directions == 1 else f"1/{init.directions} of the rank"
        where = f"r={recipe.r} exceeds {share} of '{site.name}' (weight {_times(site.shape)})"
        if most == 0:
            raise RankError(f"{where}: init={recipe.init} cannot start there")
        if over_rank == "error":
            raise RankError(f"{where}: at most {most}; over_rank=clip takes that")
        if over_rank == "allow" and recipe.init in AT_MOST_FULL_RANK:
            raise RankError(f"{where}: init={recipe.init} has at most {most} directions")
        if over_rank == "clip":
            site = replace(site, recipe=recipe.with_rank(most))
            clipping = f"{where}, where r is {most}"
    return site, clipping


def _times(shape: tuple[int, int]) -> str:
    return " × ".join(map(str, shape))
