"""Which weights get an adapter: targets → sites, each with its recipe."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from lora_lab.adapters.adapter import AdapterError, Recipe
from lora_lab.adapters.sites import (
    ADAPTERS,
    KINDS,
    Site,
    adapter_class,
    candidates,
    overlap,
    place_in_memory,
)

GROUPS = (*KINDS, "attention", "all")
"""What a target can ask for: a kind, what belongs to attention whatever its kind, or everything."""


class TargetError(AdapterError):
    """A target that picks no weight, or not the ones its writer can have meant."""


class RankError(AdapterError):
    """A rank that the weight cannot have."""


@dataclass(frozen=True)
class Target:
    """A rule that picks sites: those of `kind` (one of GROUPS) whose name fits a glob of `match`.

    A name is that of a layer (`encoder.fc1`), of a parameter (`attn.in_proj_weight`) or of one of
    its blocks (`attn.in_proj_weight_q`). Names that fit a glob of `exclude` are left out. r, alpha,
    dropout and init, where given, are these sites' own. `tied`: a weight that several layers share
    is adapted, once and for all of them.
    """

    kind: str = "all"
    match: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    init: str | None = None
    tied: bool = False

    def picks(self, site: Site) -> bool:
        """Whether the rule picks `site`."""
        of_kind = self.kind in ("all", site.kind) or (self.kind == "attention" and site.attention)
        return of_kind and _fits(site, self.match) and not _fits(site, self.exclude)

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with what this target says of its own."""
        own = {key: getattr(self, key) for key in ("r", "alpha", "dropout", "init")}
        return replace(recipe, **{key: value for key, value in own.items() if value is not None})


def find_sites(
    model: nn.Module,
    targets: Mapping[str, Target],
    recipe: Recipe | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[Site]:
    """The sites that `targets` pick in `model`, in the model's own order.

    Works on a model on the meta device: no weight is read. With `recipe` every site has its own:
    the recipe, over which goes what its target says, over which go the patterns ({glob: value},
    the first that fits). Raises TargetError when a target or a pattern picks nothing, when two
    targets pick one site, when a picked weight is tied to another layer's or is no parameter;
    RankError when r is over a site's rank; AdapterError for a recipe that cannot be.
    """
    if not isinstance(targets, Mapping) or not all(
        isinstance(target, Target) for target in targets.values()
    ):
        raise TargetError(
            f"targets={targets!r}: must be one of {', '.join(GROUPS)}, or "
            "{label: Target(match=…)} with a glob on names"
        )
    every = list(candidates(model))
    picked: dict[str, str] = {}
    for label, target in targets.items():
        if target.kind not in GROUPS:
            raise TargetError(
                f"target '{label}': kind={target.kind!r} must be one of {', '.join(GROUPS)}"
            )
        hits = [site.name for site in every if target.picks(site)]
        if not hits:
            raise TargetError(_no_match(label, target, model, every))
        for glob in (*_globs(target.match), *_globs(target.exclude)):
            if not any(_fits(site, glob) for site in every):
                raise TargetError(
                    f"target '{label}': '{glob}' fits no weight{_nearest(glob, every)}"
                )
        for name in hits:
            if name in picked:
                raise TargetError(
                    f"targets '{picked[name]}' and '{label}' both pick '{name}': "
                    "a weight takes one adapter; leave one of the two out, or narrow its match"
                )
            picked[name] = label
    patterns = {"r": rank_pattern or {}, "alpha": alpha_pattern or {}}
    for pattern in (glob for globs in patterns.values() for glob in globs):
        if not any(_fits(site, pattern) for site in every if site.name in picked):
            raise TargetError(f"pattern '{pattern}' fits no site{_nearest(pattern, picked)}")
    owners: dict[tuple[int, int, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not nn.parameter.is_lazy(parameter):
            owners.setdefault(place_in_memory(parameter), []).append(name)
    sites: list[Site] = []
    taken: set[object] = set()
    for site in every:
        if site.name not in picked:
            continue
        label = picked[site.name]
        place, tied = _checked(site, model.get_submodule(site.layer), targets[label], owners)
        if (place, site.rows) in taken:
            continue  # tied on purpose, and adapted with the first layer that has it
        taken.add((place, site.rows))
        if recipe is not None:
            own = targets[label].recipe(recipe)
            for key, globs in patterns.items():
                fit = [value for glob, value in globs.items() if _fits(site, glob)]
                own = replace(own, **{key: fit[0]}) if fit else own
            _check_recipe(site, own, model.get_submodule(site.layer))
            site = replace(site, recipe=own)
        sites.append(replace(site, tied_to=tied))
    return sites


def _checked(
    site: Site, layer: nn.Module, target: Target, owners: Mapping[tuple[int, int, int], list[str]]
) -> tuple[object, tuple[str, ...]]:
    """Where the site's weight is in memory, and which other parameters are the same."""
    weight = layer._parameters.get(site.parameter)
    if weight is None:
        raise TargetError(
            f"the weight of '{site.name}' is no parameter but computed from others (a norm or "
            "another parametrization): exclude it by a glob"
        )
    if why := adapter_class(layer).refusal(layer):
        raise TargetError(f"'{site.name}' cannot be adapted: {why}, or exclude it by a glob")
    place = place_in_memory(weight)
    names = owners[place]
    parts = [name for other in owners if overlap(place, other) for name in owners[other]]
    if parts:
        raise TargetError(
            f"the weight of '{site.name}' shares some of its memory with {', '.join(parts)}: an "
            "adapter would change one and not the other; exclude it by a glob"
        )
    if len(names) == 1:
        return place, ()
    if not target.tied:
        raise TargetError(
            f"the weight of '{site.name}' is tied ({' = '.join(names)}): an adapter would change "
            "one use of it and not the other; untie it first, exclude it by a glob, or say "
            "tied=true in the target, to adapt it once for all of them"
        )
    return place, tuple(name for name in names if name != site.key)


def _check_recipe(site: Site, recipe: Recipe, layer: nn.Module) -> None:
    recipe.check()
    if recipe.r > min(site.shape):
        out, rest = site.shape
        raise RankError(
            f"r={recipe.r} exceeds the rank of '{site.name}' (weight {out} × {rest}): "
            f"at most {min(site.shape)}"
        )
    if recipe.dora and not adapter_class(layer).takes_dora:
        able = ", ".join(dict.fromkeys(A.kind for A in ADAPTERS if A.takes_dora))
        raise AdapterError(
            f"dora=true: '{site.name}' is of kind {site.kind}, DoRA is for {able}; "
            "leave it out of the target, or by its exclude"
        )


def _fits(site: Site, globs: str | Sequence[str]) -> bool:
    names = {site.name, site.layer, site.key}
    return any(fnmatchcase(name, glob) for name in names for glob in _globs(globs))


def _globs(globs: str | Sequence[str]) -> Sequence[str]:
    return [globs] if isinstance(globs, str) else globs


def _nearest(glob: str, names: Iterable[Site | str]) -> str:
    known = [name.name if isinstance(name, Site) else name for name in names]
    return f"; nearest: {', '.join(difflib.get_close_matches(glob, known, n=3, cutoff=0.0))}"


def _no_match(label: str, target: Target, model: nn.Module, every: Sequence[Site]) -> str:
    globs = list(_globs(target.match))
    what = "weight" if target.kind in ("all", "weight") else f"{target.kind} weight"
    of_kind = [site for site in every if replace(target, match="*", exclude=()).picks(site)]
    if not of_kind:
        return f"target '{label}' picks nothing: the model has no {what}"
    if any(_fits(site, globs) for site in of_kind):
        return f"target '{label}' picks nothing: its exclude leaves out all that its match picks"
    other = [site for site in every if _fits(site, globs)]
    if other:
        shown = ", ".join(f"{site.name} ({site.kind})" for site in other[:3])
        return f"target '{label}' picks no {what}, only {shown}"
    layers = {n: m for n, m in model.named_modules() if n and any(fnmatchcase(n, g) for g in globs)}
    if layers and globs != ["*"]:
        shown = ", ".join(f"{n} ({type(m).__name__})" for n, m in list(layers.items())[:3])
        return f"target '{label}' picks no {what}, only {shown}"
    names = [site.name for site in of_kind]
    near = difflib.get_close_matches(globs[0], names, n=3, cutoff=0.0)
    return f"target '{label}' picks no weight; nearest names: {', '.join(near)}"
