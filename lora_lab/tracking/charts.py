"""What W&B draws of an analysis, as numbers: pixels, rows of a table, and lines of a chart.

`arrays` are those of spectra.npz: `SITE/phi_base`, `SITE/S`, `SITE/truncation/ranks` and so on.
"""

from collections.abc import Mapping

import numpy as np

from lora_lab.report.matrices import experts_of, site_of

Arrays = Mapping[str, np.ndarray]


def heat_maps(arrays: Arrays) -> dict[str, np.ndarray]:
    """φ(ΔW, W) of each site as a grey image, 0 black and 1 white, by the key of its array.

    Not those of experts, which may be thousands.
    """
    images, experts = {}, experts_of(arrays)
    for key, phi in arrays.items():
        matrix = key.removesuffix("/phi_base")
        if matrix != key and site_of(matrix, experts) == matrix:
            # (i, j) → (8 i, 8 j): each entry is a block of 8 × 8 pixels, without smoothing.
            images[key] = np.kron((255 * phi.clip(0, 1)).astype(np.uint8), np.ones((8, 8), "u1"))
    return images


def singular_value_rows(arrays: Arrays) -> list[list]:
    """Site and its first four singular values, 0 past the last: a row for each site."""
    return [
        [key.removesuffix("/S"), *map(float, [*values[:4], *[0.0] * (4 - len(values[:4]))])]
        for key, values in arrays.items()
        if key.endswith("/S")
    ]


def truncation_lines(arrays: Arrays) -> dict[str, np.ndarray]:
    """The losses of the model's truncation curve, and of the sites' measured at the same ranks."""
    lines = {"all sites": arrays["truncation/loss"]}
    for key in arrays:
        site = key.removesuffix("/truncation/ranks")
        if site != key and np.array_equal(arrays[key], arrays["truncation/ranks"]):
            lines[site] = arrays[f"{site}/truncation/loss"]
    return lines
