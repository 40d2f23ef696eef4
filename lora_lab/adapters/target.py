"""A target: the rule by which a part of a model's weights gets adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_lab.adapters.globs import as_list, check_globs, matching
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.sites import KINDS, Site

GROUPS = (*KINDS, "attention", "all")
"""What a target's `kind` can be: a kind of site, whatever belongs to attention, or all sites."""


class TargetError(AdapterError):
    """A target that picks no weight, or not those that its writer can have meant."""


class PatternError(TargetError):
    """A pattern of ranks or alphas with a glob that fits no site, or a value that none can have."""


class RankError(AdapterError):
    """A rank that exceeds what the weight can have."""


@dataclass(frozen=True)
class Target:
    """A rule that picks sites: those of `kind` (one of GROUPS) whose name fits a glob of `match`.

    A name is that of a layer (`encoder.fc1`), of a parameter (`attn.in_proj_weight`) or of one of
    its blocks (`attn.in_proj_weight_q`). The blocks of a fused layer (`c_attn.weight_q`) are picked
    by globs that fit them and not the layer. A glob that is itself a name, as `blocks[0]` may be,
    stands for that name alone. Names that fit a glob of `exclude` are left out. r, alpha, dropout
    and init, where given, replace the recipe's at these sites. With `tied` a weight that several
    layers share is adapted, once for all of them; else it is left out.

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

    def check(self, label: str) -> None:
        """Raises TargetError where a value is none that a target can have. `label` is its name."""
        try:
            if self.kind not in GROUPS:
                raise AdapterError(f"kind={self.kind!r}: must be one of {', '.join(GROUPS)}")
            check_globs("match", self.match)
            check_globs("exclude", self.exclude)
            if not as_list(self.match):
                raise AdapterError(f"match={self.match!r}: must have a glob on names; '*' is all")
            if type(self.tied) is not bool:
                raise AdapterError(f"tied={self.tied!r}: must be True or False")
            self.recipe(Recipe(r=1, alpha=1.0)).check()
        except AdapterError as error:
            raise TargetError(f"target '{label}': {error}") from None

    def pick(self, sites: "SitesByName") -> list[Site]:
        """The sites that the rule picks, in the model's order."""
        fitting = sites.fitting(self.match)
        layers = {sites.sites[i].name for i in fitting}
        picked = [sites.sites[i] for i in sorted(fitting - sites.fitting(self.exclude))]
        # A fused layer that fits is one site: its blocks are picked by globs that fit them alone.
        picked = [s for s in picked if not (s.is_block_of_layer and s.layer in layers)]
        return [site for site in picked if self._is_for(site)]

    def _is_for(self, site: Site) -> bool:
        """Whether the rule is for sites of that kind."""
        is_vector = min(site.shape) == 1 or site.parameter.endswith("bias")
        if self.match == "*" and site.kind == "weight" and is_vector:
            return False
        return self.kind in ("all", site.kind) or (self.kind == "attention" and site.attention)

    def names_exactly(self, site: Site) -> bool:
        """Whether the rule names the site itself, and not by a glob that others may fit too."""
        return not names_of(site).isdisjoint(as_list(self.match))

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with what this target sets instead."""
        settings = {key: getattr(self, key) for key in ("r", "alpha", "dropout", "init")}
        return replace(recipe, **{key: v for key, v in settings.items() if v is not None})


def names_of(site: Site) -> set[str]:
    """The names by which a site can be picked: its own, its layer's and its parameter's."""
    return {site.name} if site.is_block_of_layer else {site.name, site.layer, site.key}


class SitesByName:
    """Sites of a model, which are found by globs on their names."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = sites
        self._by_name: dict[str, list[int]] = {}
        for i, site in enumerate(sites):
            for name in names_of(site):
                self._by_name.setdefault(name, []).append(i)

    def fitting(self, globs: str | Sequence[str]) -> set[int]:
        """The positions in `sites` of those that have one of `globs` as a name, or fit it."""
        names = matching(globs, self._by_name)
        return {position for name in names for position in self._by_name[name]}
