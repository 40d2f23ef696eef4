"""A run's figures: loss curves, the spectrum over training, ΔW itself; each as PNG and PDF."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.report.phi_heat_map import phi_heat_map
from lora_lab.report.plotting import MAX_PANELS, log_scale, panels, save
from lora_lab.runs import Run

MAX_SINGULAR_VALUES = 16
"""Singular values drawn, at most."""


def largest_updates(spectrum: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sites with the largest final ‖ΔW‖, in the model's order."""
    by_norm = sorted(spectrum, key=lambda site: -np.linalg.norm(spectrum[site][-1]))
    return {site: spectrum[site] for site in spectrum if site in by_norm[:MAX_PANELS]}


def write_figures(run: Run, spectrum: dict[str, np.ndarray], directory: Path) -> list[str]:
    """Writes every figure the run has the numbers for, and returns their names."""
    made = {"loss": _loss(run)}
    if (every := len(spectrum)) > MAX_PANELS:
        spectrum = largest_updates(spectrum)
    if spectrum:
        with np.load(run.path / "spectra.npz") as arrays:
            made["spectrum"] = _spectrum(arrays["epochs"], spectrum)
            corners = {site: arrays[f"{site}/delta"] for site in spectrum}
            shapes = {site: tuple(arrays[f"{site}/shape"]) for site in spectrum}
            phi = {s: arrays[f"{s}/phi_base"] for s in spectrum if f"{s}/phi_base" in arrays}
            curves = {
                site: (arrays[f"{prefix}ranks"], arrays[f"{prefix}loss"])
                for site in (None, *spectrum)
                if f"{(prefix := _truncation_key(site))}ranks" in arrays
            }
        made["delta"] = _delta(corners, shapes)
        if phi:
            made["phi"] = _phi(phi)
        if curves:
            made["truncation"] = _truncation(curves)
    for name in ("spectrum", "delta", "phi"):
        if name in made and every > MAX_PANELS:
            made[name].suptitle(f"{MAX_PANELS} of {every} sites, those whose ΔW is largest")
    for name, figure in made.items():
        save(figure, directory / name)
    return list(made)


def _loss(run: Run) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    published = run.config.get("published") or {}
    method = run.config["adapter"]["method"]
    for i, (prefix, label, paper) in enumerate(
        (("base/", "base", "base"), ("", method, "adapted"))
    ):
        for kind, style, width in (("train", "-", 0.8), ("val", "--", 1.4)):
            curve = run.curve(f"{prefix}{kind}/loss")
            if curve:
                name = f"{label}, {'training' if kind == 'train' else 'validation'}"
                style = style if len(curve) > 1 else "s"
                axes.plot(*_points(curve), style, color=f"C{i}", linewidth=width, label=name)
        if points := published.get(paper):
            name = f"{label}, published"
            axes.plot(*_points(points), "o", color=f"C{i}", fillstyle="none", label=name)
    axes.set(xlabel="epoch", ylabel="loss", title=run.config["name"])
    _log(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _log(axes: Axes) -> None:
    """A log scale of what is drawn, where any of it is above 0."""
    every = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [[]])
    every = every[np.isfinite(every) & (every > 0)]
    if every.size:
        log_scale(axes, every.min(), every.max())


def _points(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def _spectrum(epochs: np.ndarray, spectrum: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(len(spectrum), width=4.5)
    for panel, (site, sigma) in zip(axes, spectrum.items(), strict=True):
        for i in range(min(sigma.shape[1], MAX_SINGULAR_VALUES)):
            # A zero (B before the first step) has no place on a log axis.
            values = np.where(sigma[:, i] > 0, sigma[:, i], np.nan)
            panel.plot(
                epochs, values, ".-", color=matplotlib.colormaps["viridis"](i / MAX_SINGULAR_VALUES)
            )
            panel.annotate(rf"$\sigma_{{{i + 1}}}$", (epochs[-1], values[-1]), fontsize=7)
        panel.set(title=site, xlabel="epoch", ylabel="singular values of ΔW")
        _log(panel)
        panel.grid(alpha=0.3)
    return figure


def _delta(corners: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> Figure:
    figure, axes = panels(len(corners), width=4.5)
    for panel, (site, corner) in zip(axes, corners.items(), strict=True):
        limit = np.abs(corner).max() or 1.0
        image = panel.imshow(
            corner, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        rows, columns = corner.shape
        out, rest = shapes[site]
        panel.set_title(
            f"ΔW of {site}: {rows} × {columns} of {out} × {rest}\n"
            f"entries from {corner.min():.4g} to {corner.max():.4g}",
            fontsize=10,
        )
        panel.set(xlabel="column", ylabel="row")
        figure.colorbar(image, ax=panel)
    return figure


def _phi(phi: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(len(phi), width=4.5)
    for panel, (site, values) in zip(axes, phi.items(), strict=True):
        phi_heat_map(figure, panel, values)
        panel.set(title=site, xlabel="first j directions of W", ylabel="first i directions of ΔW")
    return figure


def _truncation_key(site: str | None) -> str:
    return "truncation/" if site is None else f"{site}/truncation/"


def _truncation(curves: dict[str | None, tuple[np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (site, (ranks, loss)) in enumerate(curves.items()):
        if site is not None and len(curves) == 2:
            continue  # the only site: the model's curve is its own
        label = "every site" if site is None else f"{site} alone"
        color, width = ("black", 1.5) if site is None else (f"C{i - 1}", 0.9)
        axes.plot(ranks, loss, ".-", label=label, color=color, linewidth=width)
    axes.set(xlabel="k", ylabel="validation loss with ΔW cut to rank k")
    axes.locator_params(axis="x", integer=True)
    whole = curves[None][1]
    if whole.min() > 1e-6 * whole.max():
        _log(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
