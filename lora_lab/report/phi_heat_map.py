"""The heat map of φ, the overlap of the first directions of two updates, or of ΔW and W."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def phi_heat_map(figure: Figure, panel: Axes, phi: np.ndarray) -> None:
    """Draws φ, the overlap of two subspaces (Hu et al. 2021, equation 4), with a colour bar.

    `phi` (i × j) has values from 0 to 1. Row i and column j stand for the first i and the first j
    directions, counted from 1.
    """
    i, j = phi.shape
    # imshow counts cells from 0 and from the top. This extent (left, right, bottom, top) puts the
    # centre of the first cell at (1, 1), and row 1 at the top.
    extent = (0.5, j + 0.5, i + 0.5, 0.5)
    image = panel.imshow(phi, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    panel.locator_params(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=panel, label="φ(i, j)")
