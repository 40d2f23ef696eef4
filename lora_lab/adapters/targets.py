"""Which weights get an adapter: targets pick sites, and each site gets its recipe."""

import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from lora_lab.adapters.memory import Span, memory_span, overlaps, parameters_in_memory
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.sites import ADAPTERS, KINDS, Site, adapter_class, candidate_sites

GROUPS = (*KINDS, "attention", "all")
"""What a target's `kind` can be: a kind of site, whatever belongs to attention, or all sites."""

Patterns = Mapping[str, Mapping[str, float]]
"""Values for single sites: {"r" or "alpha": {glob on names: value}}."""


class TargetError(AdapterError):
    """A target that picks no weight, or not those that its writer can have meant."""


class PatternError(TargetError):
    """A pattern of ranks or alphas with a glob that fits no site."""


class RankError(AdapterError):
    """A rank that exceeds what the weight can have."""


@dataclass(frozen=True)
class Target:
    """A rule that picks sites: those of `kind` (one of GROUPS) whose name fits a glob of `match`.

    A name is that of a layer (`encoder.fc1`), of a parameter (`attn.in_proj_weight`) or of one of
    its blocks (`attn.in_proj_weight_q`). Names that fit a glob of `exclude` are left out. r, alpha,
    dropout and init, where given, replace the recipe's at these sites. With `tied` a weight that
    several layers share is adapted, once for all of them; else it is an error.
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
        """`recipe` with what this target sets instead."""
        settings = {key: getattr(self, key) for key in ("r", "alpha", "dropout", "init")}
        return replace(recipe, **{key: v for key, v in settings.items() if v is not None})


def find_sites(
    model: nn.Module,
    targets: Mapping[str, Target],
    recipe: Recipe | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    trained_in_full: Collection[str] = (),
) -> list[Site]:
    """The sites that `targets` pick in `model`, in the model's order.

    Works on a model on the meta device: no weight is read. With `recipe` each site gets a recipe:
    what its target sets goes before `recipe`, and the patterns ({glob: value}, the first that fits)
    go before both. Sites whose parameter's key is in `trained_in_full` are left out.

    Raises TargetError when a target or a pattern picks nothing, when two targets pick one site,
    when a picked weight is tied to another layer's or is no parameter; RankError when r exceeds a
    site's rank; AdapterError for an invalid recipe.
    """
    _check_targets(targets)
    candidates = list(candidate_sites(model))
    label_by_site = _pick(model, targets, candidates, trained_in_full)
    picked = [site for site in candidates if site.name in label_by_site]
    patterns = {"r": rank_pattern or {}, "alpha": alpha_pattern or {}}
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        _check_globs([*(pattern or {})], picked, f"{name}:", PatternError)
    names_by_span = parameters_in_memory(model)
    sites: list[Site] = []
    tied: list[tuple[Site, list[str]]] = []
    taken: set[object] = set()
    for site in picked:
        layer, target = model.get_submodule(site.layer), targets[label_by_site[site.name]]
        span, tied_to = _check_weight(site, layer, names_by_span)
        if tied_to and not target.tied:
            tied.append((site, names_by_span[span]))
            continue
        if (span, site.rows) in taken:
            continue  # tied on purpose, and adapted with the first layer that has it
        taken.add((span, site.rows))
        if recipe is not None:
            site = replace(site, recipe=_site_recipe(site, target.recipe(recipe), patterns))
            _check_recipe(site, layer)
            if tied_to and site.recipe is not None:
                site.recipe.check_shared(site.name)
        sites.append(replace(site, tied_to=tied_to))
    if tied:
        raise TargetError(_reason_tied(tied, targets, label_by_site))
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
            raise TargetError(_reason_none_picked(label, target, model, sites))
        names = [site.name for site in picked if site.key not in trained_in_full]
        if not names:
            shown = ", ".join(site.name for site in picked[:3])
            raise TargetError(
                f"target '{label}' picks only what trains in full (also_train): {shown}; "
                "leave the target out, or take this from also_train"
            )
        _check_globs([*_globs(target.match), *_globs(target.exclude)], sites, f"target '{label}':")
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
        if not any(_fits(site, glob) for site in sites):
            raise error(f"{where} '{glob}' fits no site; nearest: {_nearest(glob, sites)}")


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
    if reason := adapter_class(layer).reason_not_adaptable(layer):
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


def _reason_tied(
    tied: Sequence[tuple[Site, list[str]]],
    targets: Mapping[str, Target],
    label_by_site: Mapping[str, str],
) -> str:
    """Names the picked sites that are `tied` (with all names of each weight), and the way out."""
    weights = "; ".join(f"'{site.name}' is tied ({' = '.join(names)})" for site, names in tied)
    labels = [label_by_site[site.name] for site, _ in tied]
    exclude, adapt_once = [], []
    for label in dict.fromkeys(labels):
        names = [site.name for site, _ in tied if label_by_site[site.name] == label]
        picks_others = len(names) < list(label_by_site.values()).count(label)
        if picks_others:
            exclude += _setting(
                label, targets[label], "exclude", [*_globs(targets[label].exclude), *names]
            )
        adapt_once += _setting(label, targets[label], "tied", ["true"])
    ways = [f"{' '.join(adapt_once)} adapts it once for all of them"]
    if exclude:
        ways.insert(0, f"{' '.join(exclude)} leaves it out")
    return (
        f"the weight of {weights}: an adapter would change one use of it and not the other; "
        f"{', '.join(ways)}"
    )


def _setting(label: str, target: Target, key: str, values: Sequence[str]) -> list[str]:
    """What sets a target's `key`, as it is written on a command line.

    A target that is only a glob has the glob as its label, with which no key can be written: it
    gets a label first.
    """
    before = []
    if not label.isidentifier():
        before = ["target=all", f"target.all.match={_list(_globs(target.match))}"]
        label = "all"
    return [shlex.quote(word) for word in (*before, f"target.{label}.{key}={_list(values)}")]


def _list(values: Sequence[str]) -> str:
    """One value, or several in brackets."""
    return values[0] if len(values) == 1 else f"[{','.join(values)}]"


def _site_recipe(site: Site, recipe: Recipe, patterns: Patterns) -> Recipe:
    """`recipe` with r and alpha of the first patterns that fit the site."""
    for key, globs in patterns.items():
        values = [value for glob, value in globs.items() if _fits(site, glob)]
        recipe = replace(recipe, **{key: values[0]}) if values else recipe
    return recipe


def _check_recipe(site: Site, layer: nn.Module) -> None:
    recipe = site.recipe
    assert recipe is not None
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


def _nearest(glob: str, sites: Iterable[Site]) -> str:
    names = [site.name for site in sites]
    return ", ".join(difflib.get_close_matches(glob, names, n=3, cutoff=0.0))


def _reason_none_picked(label: str, target: Target, model: nn.Module, sites: Sequence[Site]) -> str:
    globs = list(_globs(target.match))
    noun = "weight" if target.kind in ("all", "weight") else f"{target.kind} weight"
    of_kind = [site for site in sites if replace(target, match="*", exclude=()).picks(site)]
    if not of_kind:
        return f"target '{label}' picks nothing: the model has no {noun}"
    if any(_fits(site, globs) for site in of_kind):
        return f"target '{label}' picks nothing: its exclude leaves out all that its match picks"
    of_other_kinds = [site for site in sites if _fits(site, globs)]
    if of_other_kinds:
        shown = ", ".join(f"{site.name} ({site.kind})" for site in of_other_kinds[:3])
        return f"target '{label}' picks no {noun}, only {shown}"
    layers = {n: m for n, m in model.named_modules() if n and any(fnmatchcase(n, g) for g in globs)}
    if layers and globs != ["*"]:
        shown = ", ".join(f"{n} ({type(m).__name__})" for n, m in list(layers.items())[:3])
        return f"target '{label}' picks no {noun}, only {shown}"
    shown = ", ".join(f"'{glob}'" for glob in globs)
    last_names = [*dict.fromkeys(site.name.rpartition(".")[2] for site in of_kind)]
    few = ", ".join(last_names[:6]) + (", …" if last_names[6:] else "")
    subject = "" if globs == [label] else f": {shown} fits none"
    return (
        f"target '{label}' picks no {noun}{subject}; nearest names: "
        f"{_nearest(globs[0], of_kind)}; last names of its {noun}s: {few}"
    )
