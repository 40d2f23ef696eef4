"""`lora-lab analyze`: computes again what is asked of a finished ΔW, or compares several ΔW."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from lora_lab.analysis import findings, spectra
from lora_lab.analysis.subspaces import compare_spans
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Config, Spectra
from lora_lab.data import Data
from lora_lab.report import SubspacePair
from lora_lab.runs import Run
from lora_lab.training.cuts import losses_of_cuts
from lora_lab.training.forgetting import Forgetting
from lora_lab.training.modules import BaseModule
from lora_lab.training.restore import restore
from lora_lab.training.source_code import code_changes, other_versions
from lora_lab.training.written_files import written_files

COMPARISONS = "analysis"
"""The folder in which a comparison is written, and the analysis of a run that is read-only."""


def analyze_again(
    run: Run,
    console: Console,
    trust: bool = False,
    bases_dir: Path | None = None,
    to: Path | None = None,
    **change: Any,
) -> tuple[Run, findings.Findings]:
    """Analyzes a finished run's ΔW again, with its `spectra` settings changed by `change`.

    Writes spectra.npz and advice.yaml anew, and adds a row to metrics.jsonl, once all that it reads
    was right. What was measured in training stays. With `to`, and where the run's directory cannot
    be written to, this is done in a copy of it in that folder. Returns the run that was written.
    Raises what `restore` raises.
    """
    if to is None and not os.access(run.path, os.W_OK):
        to = Path(COMPARISONS)
    if to and (to / run.path.name).exists():
        raise ValueError(f"--to {to}: {to / run.path.name} exists; give another folder")
    restored = restore(run, trust, bases_dir)
    if not restored.plan.sites:
        raise ValueError(f"{run.path} has no ΔW: nothing but also_train was trained")
    cfg, data = restored.plan.cfg, restored.plan.training_data()
    module = BaseModule(restored.model, data.task, data.sizes["out_features"], cfg.optimizer)
    if data.known is not None:
        module.forgetting = Forgetting(data.known)
    updates = Updates(restored.model, restored.base, restored.plan.sites)
    pl.seed_everything(cfg.seed, verbose=False)
    trainer = restored.plan.single_device_trainer(None, [])
    _check_loss(trainer, module, data, cfg, run)
    losses = losses_of_cuts(trainer, module, data, updates)
    settings = Spectra.model_validate({**cfg.spectra.model_dump(), **change})
    with TemporaryDirectory() as scratch:  # no folder is made for SVDs where bases are not kept
        svds = cfg.bases_dir if Path(cfg.bases_dir).is_dir() else scratch
        results = findings.analyze(updates, losses, settings, svds, console)
    with np.load(run.path / "spectra.npz") as file:
        files = findings.files({**file, **results.arrays}, results.advice)
    row = {"step": run.rows()[-1]["step"], **results.metrics}
    rows = (run.path / "metrics.jsonl").read_bytes() + f"{json.dumps(row)}\n".encode()
    written = _copy(run, to) if to else run
    written.replace_files({**files, "metrics.jsonl": rows})
    return written, results


def _check_loss(trainer: pl.Trainer, module: BaseModule, data: Data, cfg: Config, run: Run) -> None:
    """Raises ValueError where the restored model's validation loss is not the run's.

    It may differ by rounding, as on another device: by 1 % of it and 0.1 % of that at the start.
    """
    # One for the validation rows and, where forgetting is measured, one for the base's.
    result = trainer.validate(module, data, verbose=False)[0]
    new, losses = result["val/loss"], [row["val/loss"] for row in run.rows() if "val/loss" in row]
    if losses and not abs(new - losses[-1]) <= 0.01 * abs(losses[-1]) + 0.001 * abs(losses[0]):
        changes = "; ".join(filter(None, (code_changes(cfg, run), other_versions(run))))
        raise ValueError(
            f"{run.path}: its model has val/loss {new:.6g} here, and {losses[-1]:.6g} in the run: "
            f"code, data or libraries are not those of its training ({changes or 'unknown which'})"
        )


def _copy(run: Run, to: Path) -> Run:
    """A copy of a finished run's directory in the folder `to`, without files of other kinds."""
    copy = Run(to / run.path.name)
    files = [*written_files(run.path), run.path / "status.json"]
    for file in (file for file in files if not file.is_symlink()):
        new = copy.path / file.relative_to(run.path)
        new.parent.mkdir(parents=True, exist_ok=True)
        copyfile(file, new)
    return copy


def compare_updates(runs: Sequence[Run]) -> list[SubspacePair]:
    """Compares the directions of ΔW for each pair of runs, at each site that both adapt.

    Only files are read; no model is built. At a site three subspaces are compared: the right
    singular vectors of ΔW ("input"), the left ones ("output") and the rows of the factor "A".

    Raises ValueError where a run is given twice or no two runs share a site with weights of one
    shape, DamagedRunError for a run with a damaged file, FileNotFoundError for one without
    spectra.npz.
    """
    for run in runs:
        run.check()
    spans = {str(run.path): _spans(run) for run in runs}
    if len(spans) < len(runs):
        raise ValueError("a run is compared with itself: name each of the runs once")
    if not (pairs := compare_spans(spans)):
        raise ValueError("the runs share no site: their targets or models differ")
    return pairs


def _spans(run: Run) -> dict[tuple[str, str], Tensor]:
    """Orthonormal directions of a run's ΔW by (site, side), one a column: (features, directions).

    Directions whose singular value is no more than rounding are left out.
    """
    if not (path := run.path / "spectra.npz").exists():
        raise FileNotFoundError(
            f"{run.path} has no spectra.npz: it is not finished, or adapts nothing"
        )
    spans: dict[tuple[str, str], Tensor] = {}
    with np.load(path) as arrays:
        sites = [key.removesuffix("/S") for key in arrays.files if key.endswith("/S")]
        for site in sites:
            U, S, Vh = (torch.from_numpy(arrays[f"{site}/{name}"]) for name in ("U", "S", "Vh"))
            svd = spectra.SVD(U.double(), S.double(), Vh.double()).above_rounding()
            if len(svd.S):
                spans[site, "input"] = _orthonormal(svd.Vh.T)  # (in, directions)
                spans[site, "output"] = _orthonormal(svd.U)  # (out, directions)
    factors = run.path / "adapter" / "adapter.safetensors"
    for key, A in (load_file(factors) if factors.exists() else {}).items():
        site, _, name = key.rpartition(".")
        if name != "A":
            continue
        # Of experts A is (E, r, in).
        by_matrix = {site: A} if A.dim() == 2 else {f"{site}.{e}": a for e, a in enumerate(A)}
        for matrix, factor in by_matrix.items():
            svd = spectra.svd_of_matrix(factor).above_rounding()
            if len(svd.S):
                spans[matrix, "A"] = svd.Vh.T  # (in, directions)
    return spans


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span with columns that are orthonormal in double precision.

    spectra.npz has single precision, in which they are orthonormal to seven digits only.
    """
    return torch.linalg.qr(columns).Q
