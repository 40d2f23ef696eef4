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

from lora_lab import analysis, spectra
from lora_lab.experiment import val_loss
from lora_lab.modules import BaseModule
from lora_lab.report import Pair
from lora_lab.restore import restore
from lora_lab.runs import Run
from lora_lab.updates import Updates


def again(run: Run, console: Console, **change: Any) -> analysis.Findings:
    """Analyzes a finished run's ΔW with its `spectra` settings changed by `change`.

    Its spectra.npz and advice.yaml are written anew; what was measured in training stays. Raises
    what `restore` raises.
    """
    found = restore(run)
    cfg, data = found.plan.cfg, found.plan.data("adapt")
    module = BaseModule(found.model, data.task, data.sizes["out_features"], cfg.optimizer)
    updates = Updates(found.model, found.base, found.plan.sites)
    pl.seed_everything(cfg.seed, verbose=False)
    loss = partial(val_loss, found.plan.trainer(None, []), module, data)
    asked = cfg.spectra.model_copy(update=change)
    said = analysis.analyze(updates, loss, asked, cfg.bases_dir, console)
    with np.load(run.path / "spectra.npz") as arrays:
        kept = dict(arrays)
    analysis.write(run.path, {**kept, **said.arrays}, said.advice)
    return said


def between(runs: Sequence[Run]) -> list[Pair]:
    """Every pair of runs at every site they share, from their files alone.

    Raises ValueError where two runs share no site whose weights have one shape, FileNotFoundError
    for a run without spectra.npz.
    """
    spans = {run.path.name: _spans(run) for run in runs}
    pairs: list[Pair] = []
    for one, other in combinations(spans, 2):
        shared = [key for key in spans[one] if key in spans[other]]
        for site, side in shared:
            U, V = spans[one][site, side], spans[other][site, side]
            if len(U) == len(V):
                k = min(U.shape[1], V.shape[1])
                distance = spectra.grassmann_distance(U[:, :k], V[:, :k])
                phi = spectra.similarity(U, V).numpy()
                pairs.append(Pair(one, other, site, side, phi, distance, len(U)))
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
            S, shape = arrays[f"{site}/S"], arrays[f"{site}/shape"]
            # Directions of a ΔW that is not there are rounding's.
            rank = int((S[0] * max(shape) * np.finfo(np.float32).eps < S).sum())
            if rank:
                found[site, "input"] = _orthonormal(arrays[f"{site}/Vh"][:rank].T)
                found[site, "output"] = _orthonormal(arrays[f"{site}/U"][:, :rank])
    factors = run.path / "adapter" / "adapter.safetensors"
    for key, A in (load_file(factors) if factors.exists() else {}).items():
        site, _, name = key.rpartition(".")
        if name == "A":
            found[site, "A"] = torch.linalg.svd(A.double(), full_matrices=False).Vh.T
    return found


def _orthonormal(columns: np.ndarray) -> Tensor:
    """Stored in single precision, they are so to seven digits only."""
    return torch.linalg.qr(torch.from_numpy(columns.copy()).double()).Q
