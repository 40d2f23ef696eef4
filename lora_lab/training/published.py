"""A paper's rows beside a run's, where the two can be compared."""

from dataclasses import replace

from lora_lab.config import compose
from lora_lab.training import bases
from lora_lab.training.plan import Plan


def with_published(plan: Plan, experiment: str) -> Plan:
    """The plan with a paper's rows only where they can be compared.

    The rows of the base stay if the base is trained as published, those of the adapted model if the
    run differs from the published one, `experiment` as it is shipped, in nothing but seeds and what
    is measured of ΔW (`spectra`).
    """
    cfg = plan.cfg
    assert cfg.published is not None
    paper = compose.published_config(experiment, cfg)
    base = cfg.published.base if bases.key(cfg) == bases.key(paper) else {}
    adapted = cfg.published.adapted if cfg.identity() == paper.identity() else {}
    published = cfg.published.model_copy(update={"base": base, "adapted": adapted})
    return replace(plan, cfg=cfg.model_copy(update={"published": published}))
