"""The `lora-lab analyze` command: a run's ΔW again after the fact, and the ΔW of runs compared."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from lora_lab.analysis import findings, spectra
from lora_lab.analysis.spectra import SVD, svd_of_matrix
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Spectra
from lora_lab.report import SubspacePair
from lora_lab.runs import Run
from lora_lab.training.cuts import cut_losses
from lora_lab.training.modules import BaseModule
from lora_lab.training.restore import restore


def analyze_again(run: Run, console: Console, **change: Any) -> findings.Findings:
    """Analyzes a finished run's ΔW with its `spectra` settings changed by `change`.

    Its spectra.npz and advice.yaml are written anew, its metrics have one row more; what was
    measured in training stays. Raises what `restore` raises.
    """
    found = restore(run)
    cfg, data = found.plan.cfg, found.plan.data("adapt")
    module = BaseModule(found.model, data.task, data.sizes["out_features"], cfg.optimizer)
    updates = Updates(found.model, found.base, found.plan.sites)
    pl.seed_everything(cfg.seed, verbose=False)
    losses = partial(cut_losses, found.plan.single_device_trainer(None, []), module, data, updates)
    asked = Spectra.model_validate({**cfg.spectra.model_dump(), **change})
    learned = findings.analyze(updates, losses, asked, cfg.bases_dir, console)
    with np.load(run.path / "spectra.npz") as arrays:
        kept = dict(arrays)
    findings.write(run.path, {**kept, **learned.arrays}, learned.advice)
    run.append_row({"step": run.rows()[-1]["step"], **learned.metrics})
    return learned


def compare_updates(runs: Sequence[Run]) -> list[SubspacePair]:
    """Every pair of runs at every site they share, from their files alone.

    Raises ValueError where a run is named twice or no two share a site whose weights have one
    shape, FileNotFoundError for a run without spectra.npz.
    """
    spans = {str(run.path): _spans(run) for run in runs}
    if len(spans) < len(runs):
        raise ValueError("a run is compared with itself: name each of the runs once")
    pairs: list[SubspacePair] = []
    for one, other in combinations(spans, 2):
        shared = [key for key in spans[one] if key in spans[other]]
        for site, side in shared:
            U, V = spans[one][site, side], spans[other][site, side]
            if len(U) == len(V):
                k = min(U.shape[1], V.shape[1])
                distance = spectra.grassmann_distance(U[:, :k], V[:, :k])
                phi = spectra.similarity(U, V).numpy()
                pairs.append(SubspacePair(one, other, site, side, phi, distance, len(U)))
    if not pairs:
        raise ValueError("the runs share no site: their targets or models differ")
    return pairs


def _spans(run: Run) -> dict[tuple[str, str], Tensor]:
    """A run's directions by site and side, as columns."""
    path = run.path / "spectra.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"{run.path} has no spectra.npz: it is not finished, or adapts nothing"
        )
    found: dict[tuple[str, str], Tensor] = {}
    with np.load(path) as arrays:
        sites = [key.removesuffix("/S") for key in arrays.files if key.endswith("/S")]
        for site in sites:
            U, S, Vh = (torch.from_numpy(arrays[f"{site}/{name}"]) for name in ("U", "S", "Vh"))
            seen = SVD(U.double(), S.double(), Vh.double()).above_rounding()
            if len(seen.S):
                found[site, "input"] = _orthonormal(seen.Vh.T)
                found[site, "output"] = _orthonormal(seen.U)
    factors = run.path / "adapter" / "adapter.safetensors"
    for key, A in (load_file(factors) if factors.exists() else {}).items():
        site, _, name = key.rpartition(".")
        if name == "A":
            seen = svd_of_matrix(A).above_rounding()
            if len(seen.S):
                found[site, "A"] = seen.Vh.T
    return found


def _orthonormal(columns: Tensor) -> Tensor:
    """Stored in single precision, they are so to seven digits only."""
    return torch.linalg.qr(columns).Q
