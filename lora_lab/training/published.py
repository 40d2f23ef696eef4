"""A paper's rows beside a run's, where the two can be compared."""

from dataclasses import replace

from lora_lab.config import compose
from lora_lab.training import bases
from lora_lab.training.plan import Plan


def with_published(plan: Plan, experiment: str) -> Plan:
    """The plan with a paper's rows only where they can be compared.

    The rows of the base stay if the base is trained as published, those of the adapted model if the
    run differs from the published one, `experiment` as it is shipped, in nothing but seeds, what
    is measured of ΔW (`spectra`) and where its files lie. Of the cells, that stays which the run is
    of.
    """
    cfg, published = plan.cfg, plan.cfg.published
    assert published is not None
    base, adapted = published.base, published.adapted
    if base or adapted:
        paper = compose.published_config(experiment, cfg)
        base = base if bases.key(cfg) == bases.key(paper) else {}
        adapted = adapted if cfg.identity() == paper.identity() else {}
    cells = {
        settings: metrics
        for settings, metrics in published.cells.items()
        if compose.published_config(experiment, cfg, settings).identity() == cfg.identity()
    }
    rows = {"base": base, "adapted": adapted, "cells": cells}
    published = published.model_copy(update=rows)
    return replace(plan, cfg=cfg.model_copy(update={"published": published}))
