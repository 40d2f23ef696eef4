"""A target: the rule by which a part of a model's weights gets adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.sites import KINDS, Site

GROUPS = (*KINDS, "attention", "all")
"""What a target's `kind` can be: a kind of site, whatever belongs to attention, or all sites."""


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
    several layers share is adapted, once for all of them; else it is left out.

    Parameters whose matrix has one row or column, as a class token, and biases of two dimensions,
    as those of experts, are picked by name only.
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
        is_vector = min(site.shape) == 1 or site.parameter.endswith("bias")
        if self.match == "*" and site.kind == "weight" and is_vector:
            return False
        return of_kind and fits(site, self.match) and not fits(site, self.exclude)

    def names(self, site: Site) -> bool:
        """Whether the rule names the site itself: by a match without wildcards."""
        return any(fits(site, glob) for glob in as_list(self.match) if not set(glob) & set("*?["))

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with what this target sets instead."""
        settings = {key: getattr(self, key) for key in ("r", "alpha", "dropout", "init")}
        return replace(recipe, **{key: v for key, v in settings.items() if v is not None})


def fits(site: Site, globs: str | Sequence[str]) -> bool:
    """Whether the name of the site, of its layer or of its parameter fits one of the globs."""
    names = {site.name, site.layer, site.key}
    return any(fnmatchcase(name, glob) for name in names for glob in as_list(globs))


def as_list(globs: str | Sequence[str]) -> Sequence[str]:
    """One glob as a list of one."""
    return [globs] if isinstance(globs, str) else globs
