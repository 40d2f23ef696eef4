"""Runs that a report reads, made of a config and numbers alone: no model is trained.

A `RunResult` is what a report knows of a run directory once it has read it.
"""

from pathlib import Path
from typing import Any

from lora_lab.report.cells import RunResult
from lora_lab.runs import Run


def seed_run(r: int | None, seed: int, last: dict[str, float], **settings: Any) -> RunResult:
    """A finished run with these metrics at its end; r None is full fine-tuning.

    `settings` are lr, alpha, data_seed, heal, state and error.
    """
    adapter = {"method": "full"} if r is None else {"method": "lora", "r": r, "init": "kaiming"}
    if r is not None:
        adapter |= {"alpha": settings.get("alpha", 8), "heal": settings.get("heal", 0)}
    config = {
        "name": "hand",
        "seed": seed,
        "target": ["linear"],
        "adapter": adapter,
        "data": {"seed": settings.get("data_seed", 0)},
        "optimizer": {"lr": settings.get("lr", 0.01)},
    }
    status = {"state": settings.get("state", "finished"), "error": settings.get("error", "")}
    path = Path("hand") / f"r{r}-{seed}-{settings}"
    return RunResult(Run(path), status, config, last, {}, 1.0)
