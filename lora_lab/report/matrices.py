"""The matrices whose ΔW spectra.npz describes, and the sites that they belong to.

A site has one matrix, which bears its name, or is a mixture's experts: a matrix for each of them,
`<site>.<expert>`. The array `experts` has the names of such sites.
"""

from collections.abc import Collection, Mapping

import numpy as np

from lora_lab.runs import Run

SUFFIX = "/singular_values"


def singular_values_by_matrix(run: Run) -> dict[str, np.ndarray]:
    """Matrix → singular values of its ΔW (times × k), from spectra.npz; {} without that file."""
    if not (path := run.path / "spectra.npz").exists():
        return {}
    with np.load(path) as arrays:
        return {k.removesuffix(SUFFIX): arrays[k] for k in arrays.files if k.endswith(SUFFIX)}


def experts_of_run(run: Run) -> list[str]:
    """The names of a run's sites that are experts."""
    if not (path := run.path / "spectra.npz").exists():
        return []
    with np.load(path) as arrays:
        return experts_of(arrays)


def experts_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the sites that are experts, by the arrays of spectra.npz."""
    return arrays["experts"].tolist() if "experts" in arrays else []


def site_of(matrix: str, experts: Collection[str]) -> str:
    """The name of the site that a matrix belongs to."""
    stem = matrix.rpartition(".")[0]
    return stem if stem in experts else matrix


def means_by_site(
    by_matrix: Mapping[str, np.ndarray], experts: Collection[str]
) -> dict[str, np.ndarray]:
    """Site → what its matrix has, or the mean of what its experts have."""
    members: dict[str, list[np.ndarray]] = {}
    for matrix, values in by_matrix.items():
        members.setdefault(site_of(matrix, experts), []).append(values)
    return {site: np.mean(values, axis=0) for site, values in members.items()}
