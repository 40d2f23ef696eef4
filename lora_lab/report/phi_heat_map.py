"""The heat map of φ."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def phi_heat_map(figure: Figure, panel: Axes, phi: np.ndarray) -> None:
    """φ(i, j) as a picture, from 0 to 1, counted from 1."""
    i, j = phi.shape
    extent = (0.5, j + 0.5, i + 0.5, 0.5)
    image = panel.imshow(phi, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    panel.locator_params(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=panel, label="φ(i, j)")
