"""The analysis of a trained ΔW: its singular vectors, its relation to W, and the loss by rank."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor

from lora_lab.analysis import directions
from lora_lab.analysis.advice import Advice, advise
from lora_lab.analysis.spectra import INTRUDERS_AMONG, SVD, TRIPLES, Spectrum, svd_of_matrix
from lora_lab.analysis.truncation import CutLosses, model_cuts, truncate
from lora_lab.analysis.updates import Updates, split
from lora_lab.analysis.weight_svd import svd_of_weight
from lora_lab.config.schema import Spectra


@dataclass
class Findings:
    """The results of an analysis: metrics by name, arrays for spectra.npz, and advice on ranks."""

    metrics: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    advice: Advice | None = None


def analyze(
    updates: Updates,
    losses: Mapping[str, CutLosses],
    cfg: Spectra,
    bases_dir: str,
    console: Console,
) -> Findings:
    """Analyzes a trained model's ΔW.

    The singular triples are always among the findings; the comparison with the base, the
    truncation curve and the advice as `cfg` asks for them. `losses` measure the validation loss
    with ΔW cut (`loss`) and others, of which there is the curve of all sites alone. `bases_dir`
    keeps the SVDs of the base's weights.
    """
    svds = {site: updates.svd(site) for site in updates.sites}
    findings = Findings(arrays={"experts": np.array(updates.experts)} if updates.experts else {})
    for site, svd in svds.items():
        matrices = updates.sites[site].matrices
        for matrix, triples in zip(matrices, svd.matrices(), strict=True):
            for name, tensor in vars(triples.first(TRIPLES)).items():  # U, S and Vh
                findings.arrays[f"{matrix}/{name}"] = tensor.cpu().float().numpy()
    if cfg.against_base:
        for site, svd in svds.items():
            _compare_with_base(updates, site, svd, Path(bases_dir), findings)
    if cfg.truncation != "none":
        truncation = truncate(svds, losses["loss"], cfg.truncation, console)
        if cfg.truncation == "sites" and (advice := advise(truncation, cfg.keep)):
            findings.advice = advice
            findings.metrics |= {"advice/loss": advice.loss, "advice/share": advice.share}
        curves = {f"{site}/truncation": curve for site, curve in truncation.sites.items()}
        for prefix, curve in {"truncation": truncation.model, **curves}.items():
            findings.arrays[f"{prefix}/ranks"] = np.array(curve.ranks)
            findings.arrays[f"{prefix}/loss"] = np.array(curve.losses)
        cuts = model_cuts(svds, truncation.model.ranks)
        for name, loss in losses.items():
            if name != "loss":
                findings.arrays[f"truncation/{name}"] = np.array([*loss(svds, cuts)])
    return findings


def _compare_with_base(
    updates: Updates, site: str, svd: SVD, directory: Path, findings: Findings
) -> None:
    """Adds how the directions of ΔW relate to those of W, and which are new in W + ΔW.

    Metrics of experts are means over their matrices, without those that are infinite. The relation
    is that of Hu et al. 2021, section 7.3. For a product B A, all directions above rounding count.
    The smallest directions of a dense ΔW are noise: there the first ones count, up to 90% of its
    energy.
    """
    measured: dict[str, list[float]] = {}
    stack = split(updates.sites[site], updates.base_matrix(site))
    for matrix, W, of_matrix in zip(
        updates.sites[site].matrices, stack, svd.matrices(), strict=True
    ):
        metrics, phi = _relation(W.to(svd.S), of_matrix, updates.is_product(site), directory)
        for name, value in metrics.items():
            if np.isfinite(value):
                measured.setdefault(name, []).append(float(value))
        if phi is not None:
            findings.arrays[f"{matrix}/phi_base"] = phi.cpu().float().numpy()
    for name, values in measured.items():
        findings.metrics[f"spectra/{site}/{name}"] = sum(values) / len(values)


def _relation(
    W: Tensor, svd: SVD, is_product: bool, directory: Path
) -> tuple[dict[str, float], Tensor | None]:
    """How the directions of one matrix ΔW relate to those of W: measures, and φ."""
    of_base, of_delta = svd_of_weight(W, directory).above_rounding(), svd.above_rounding()
    if not is_product:
        spectrum = Spectrum(of_delta.S.cpu(), (W.shape[0], W.shape[1]), 0)
        of_delta = of_delta.first(spectrum.energy_90)
    adapted = svd_of_matrix(W + svd.cut(svd.k))
    of_adapted = adapted.above_rounding().first(INTRUDERS_AMONG)
    metrics = {
        "directions": len(of_delta.S),
        "projection": directions.projection(W, of_delta),
        "amplification": directions.amplification(W, of_delta),
        "intruders": int(directions.is_intruder(of_base.U, of_adapted.U).sum()),
        "intruders_among": len(of_adapted.S),
    }
    if not (of_delta.k and of_base.k):
        return metrics, None
    return metrics, directions.similarity(of_delta.first(TRIPLES).U, of_base.first(TRIPLES).U)


def files(arrays: Mapping[str, np.ndarray], advice: Advice | None) -> dict[str, bytes | None]:
    """The content of spectra.npz and of advice.yaml; None for the latter where no rank is advised.

    To be written by `Run.replace_files`.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    text = None if advice is None else advice.text().encode()
    return {"spectra.npz": content.getvalue(), "advice.yaml": text}
