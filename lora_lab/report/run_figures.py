"""The figures of one run: losses, singular values over training, ΔW, φ, and the truncation curve.

Each is written as PNG and PDF. All numbers come from the run directory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.report.matrices import experts_of, singular_values_by_matrix, site_of
from lora_lab.report.phi_heat_map import phi_heat_map
from lora_lab.report.plotting import MAX_PANELS, log_scale, panels, save
from lora_lab.runs import Run

MAX_SINGULAR_VALUES = 16
"""Largest number of singular values drawn for a site."""


def largest_updates(spectrum: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The `MAX_PANELS` sites whose ΔW has the largest final Frobenius norm, in the model's order.

    `spectrum` holds the singular values of each site's ΔW (time × k), as the result does.
    """
    # The Frobenius norm of a matrix is the norm of its singular values.
    by_norm = sorted(spectrum, key=lambda site: -np.linalg.norm(spectrum[site][-1]))
    return {site: spectrum[site] for site in spectrum if site in by_norm[:MAX_PANELS]}


def write_figures(run: Run, spectrum: dict[str, np.ndarray], directory: Path) -> list[str]:
    """Writes the figures the run has numbers for to `directory`, and returns their names.

    `spectrum` holds the singular values of each matrix's ΔW (time × k): of a site's, or of one of
    its experts'. Where it is empty, only the losses are drawn.
    """
    figures = {"loss": _loss(run)}
    if spectrum:
        figures |= _update_figures(run, largest_updates(spectrum))
    for name in ("spectrum", "delta", "phi"):
        if name in figures and len(spectrum) > MAX_PANELS:
            title = f"{MAX_PANELS} of {len(spectrum)} matrices, those whose ΔW is largest"
            figures[name].suptitle(title)
    for name, figure in figures.items():
        save(figure, directory / name)
    return list(figures)


def write_spectrum_picture(run: Run, file: Path) -> bool:
    """Draws the singular values of ΔW by epoch to `file` alone; False where the run has none."""
    spectrum = largest_updates(singular_values_by_matrix(run))
    if spectrum:
        with np.load(run.path / "spectra.npz") as arrays:
            epochs = arrays["epochs"]
        _spectrum(epochs, spectrum).savefig(file)
    return bool(spectrum)


def _update_figures(run: Run, spectrum: dict[str, np.ndarray]) -> dict[str, Figure]:
    """The figures of ΔW, by name, for the matrices in `spectrum`; read from spectra.npz."""
    with np.load(run.path / "spectra.npz") as arrays:
        figures = {"spectrum": _spectrum(arrays["epochs"], spectrum)}
        figures["delta"] = _delta(arrays, list(spectrum))
        phi = {s: arrays[f"{s}/phi_base"] for s in spectrum if f"{s}/phi_base" in arrays}
        # A site's curve is measured with only that site cut, the one without a site with all cut.
        sites = [site_of(matrix, experts_of(arrays)) for matrix in spectrum]
        prefixes = {None: "truncation", **{site: f"{site}/truncation" for site in sites}}
        curves = {
            site: (arrays[f"{prefix}/ranks"], arrays[f"{prefix}/loss"])
            for site, prefix in prefixes.items()
            if f"{prefix}/ranks" in arrays
        }
    if phi:
        figures["phi"] = _phi(phi)
    if curves:
        figures["truncation"] = _truncation(curves)
    return figures


def _loss(run: Run) -> Figure:
    """Training and validation loss by epoch, of the base and of the adapted model."""
    figure, (axes,) = panels(1, width=6)
    published = run.config.get("published") or {}
    method = run.config["adapter"]["method"]
    models = (("base/", "base", "base"), ("", method, "adapted"))
    for i, (prefix, model, published_key) in enumerate(models):
        for phase, style, width in (("train", "-", 0.8), ("val", "--", 1.4)):
            if curve := run.curve(f"{prefix}{phase}/loss"):
                label = f"{model}, {'training' if phase == 'train' else 'validation'}"
                style = style if len(curve) > 1 else "s"  # a line of one point is not visible
                points = zip(*curve.items(), strict=True)  # epochs, losses
                axes.plot(*points, style, color=f"C{i}", linewidth=width, label=label)
        if not prefix and (curve := run.curve("forget/loss")):
            points = zip(*curve.items(), strict=True)
            style = {"color": "dimgray", "linewidth": 1.2, "marker": ".", "linestyle": ":"}
            axes.plot(*points, **style, label=f"{model}, what the base knew")
        if curve := published.get(published_key):
            points = zip(*curve.items(), strict=True)
            axes.plot(*points, "o", color=f"C{i}", fillstyle="none", label=f"{model}, published")
    axes.set(xlabel="epoch", ylabel="loss", title=run.config["name"])
    _log_scale_of_lines(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _log_scale_of_lines(axes: Axes) -> None:
    """Makes the y axis logarithmic if any value drawn as a line is above 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [[]])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        log_scale(axes, values.min(), values.max())


def _spectrum(epochs: np.ndarray, spectrum: dict[str, np.ndarray]) -> Figure:
    """The singular values of ΔW by epoch, a panel for each site and a line for each σ_i.

    `epochs` (time,) are those at which the values in `spectrum` (time × k) were measured.
    """
    figure, axes = panels(len(spectrum), width=4.5)
    for panel, (site, singular_values) in zip(axes, spectrum.items(), strict=True):
        for i in range(min(singular_values.shape[1], MAX_SINGULAR_VALUES)):
            # A zero cannot be shown on a log axis: B is zero before the first step, and so is ΔW.
            sigma_i = np.where(singular_values[:, i] > 0, singular_values[:, i], np.nan)  # (time,)
            color = matplotlib.colormaps["viridis"](i / MAX_SINGULAR_VALUES)
            panel.plot(epochs, sigma_i, ".-", color=color)
            panel.annotate(rf"$\sigma_{{{i + 1}}}$", (epochs[-1], sigma_i[-1]), fontsize=7)
        panel.set(title=site, xlabel="epoch", ylabel="singular values of ΔW")
        _log_scale_of_lines(panel)
        panel.grid(alpha=0.3)
    return figure


def _delta(arrays: Mapping[str, np.ndarray], sites: Sequence[str]) -> Figure:
    """The entries of ΔW as a picture, a panel for each site; red is above 0, blue below.

    `arrays` are those of spectra.npz, which has the top left entries of ΔW and its full shape.
    """
    figure, axes = panels(len(sites), width=4.5)
    for panel, site in zip(axes, sites, strict=True):
        corner, (out, rest) = arrays[f"{site}/delta"], arrays[f"{site}/shape"]
        limit = np.abs(corner).max() or 1.0
        image = panel.imshow(corner, "RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        rows, columns = corner.shape
        title = f"ΔW of {site}: {rows} × {columns} of {out} × {rest}\n"
        title += f"entries from {corner.min():.4g} to {corner.max():.4g}"
        panel.set_title(title, fontsize=10)
        panel.set(xlabel="column", ylabel="row")
        figure.colorbar(image, ax=panel)
    return figure


def _phi(phi: dict[str, np.ndarray]) -> Figure:
    """How far the directions of ΔW lie in those of W, a heat map of φ for each site."""
    figure, axes = panels(len(phi), width=4.5)
    for panel, (site, values) in zip(axes, phi.items(), strict=True):
        phi_heat_map(figure, panel, values)
        panel.set(title=site, xlabel="first j directions of W", ylabel="first i directions of ΔW")
    return figure


def _truncation(curves: dict[str | None, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Validation loss against the rank k that ΔW is cut to after training.

    `curves` holds ranks and losses: under a site's name with only that site cut, under None with
    all sites cut.
    """
    figure, (axes,) = panels(1, width=6)
    for i, (site, (ranks, loss)) in enumerate(curves.items()):
        if site is not None and len(curves) == 2:
            continue  # the model has one site, whose curve is the curve of all sites
        label = "every site" if site is None else f"{site} alone"
        color, width = ("black", 1.5) if site is None else (f"C{i - 1}", 0.9)
        axes.plot(ranks, loss, ".-", label=label, color=color, linewidth=width)
    axes.set(xlabel="k", ylabel="validation loss with ΔW cut to rank k")
    axes.locator_params(axis="x", integer=True)
    loss = curves[None][1]
    # A loss of zero comes out as rounding error, which would stretch a log axis over many decades.
    if loss.min() > 1e-6 * loss.max():
        _log_scale_of_lines(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
