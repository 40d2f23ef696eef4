"""Advice for the next run: the least ranks of ΔW, site by site, that keep most of its gain."""

import glob
import re
from dataclasses import dataclass

import yaml

from lora_lab.analysis.truncation import Truncation


@dataclass(frozen=True)
class Advice:
    """The least ranks of ΔW by site that keep the share `keep` of what it gains.

    Validation losses: `loss` with ΔW cut to these ranks, `uncut` with ΔW as trained, `without` with
    no ΔW. The gain is `without` − `uncut`.
    """

    ranks: dict[str, int]
    loss: float
    uncut: float
    without: float
    keep: float

    @property
    def share(self) -> float:
        """The share of the gain that is kept with ΔW cut to these ranks."""
        return (self.without - self.loss) / (self.without - self.uncut)

    @property
    def overrides(self) -> str:
        """The ranks as settings of `lora-lab train`, each site by its name."""
        pattern = ",".join(f"{_as_key(site)}:{k}" for site, k in self.ranks.items())
        return f"adapter.r={max(self.ranks.values())} 'adapter.rank_pattern={{{pattern}}}'"

    def text(self) -> str:
        """The content of advice.yaml: what is kept, and the adapter's settings."""
        pattern = {glob.escape(site): k for site, k in self.ranks.items()}
        content = {
            "keep": self.keep,
            "share": self.share,
            "loss": {"cut": self.loss, "uncut": self.uncut, "without": self.without},
            "adapter": {"r": max(self.ranks.values()), "rank_pattern": pattern},
        }
        return (
            "# The least ranks of ΔW that keep the share `keep` of what it gains in val/loss.\n"
            "# With the run's own settings (adapter=lora where its form is another; alpha too: "
            "alpha/r then scales each site anew) add\n"
            f"#   {self.overrides}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"
        )


def advise(truncation: Truncation, keep: float) -> Advice | None:
    """The least ranks that together keep the share `keep` of the gain; None where ΔW gains nothing.

    Each site alone may lose as much as all together may. Where the sites together lose more, what
    each may lose is halved until they do not. No site is advised a rank below 1.
    """
    without, uncut = truncation.model.losses[0], truncation.model.losses[-1]
    if not without > uncut:
        return None
    allowed = (1 - keep) * (without - uncut)
    for halvings in range(12):
        bound = uncut + allowed / 2**halvings
        ranks = {site: max(1, curve.least_rank(bound)) for site, curve in truncation.sites.items()}
        if (loss := truncation.loss(ranks)) <= uncut + allowed:
            return Advice(ranks, loss, uncut, without, keep)
    ranks = {site: curve.ranks[-1] for site, curve in truncation.sites.items()}
    return Advice(ranks, uncut, uncut, without, keep)


def _as_key(site: str) -> str:
    """A glob that fits this name alone, as a key in Hydra's grammar: escaped, and never a number.

    A layer of nn.Sequential is named `0`, which Hydra would read as a number; `[0]` is a glob that
    fits it alone and is text.
    """
    try:
        is_text = str(yaml.safe_load(site)) == site
    except yaml.YAMLError:
        is_text = True
    name = glob.escape(site) if is_text else f"{glob.escape(site[:-1])}[{site[-1]}]"
    return re.sub(r"([\[\]{}:,=\\()])", r"\\\1", name)
