"""A run's figures: loss curves, the spectrum over training, ΔW itself; each as PNG and PDF."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_lab.runs import Run

# Fonts as text, so that a PDF's labels can be searched and edited.
matplotlib.rcParams.update({"pdf.fonttype": 42, "savefig.dpi": 150})
SHOWN = 16
"""Singular values drawn, at most."""


PANELS = 12
"""Sites drawn, at most: those whose ΔW is largest."""

# Okabe and Ito's colours, which the colour-blind tell apart, without yellow, which paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style(i: int) -> tuple[str, str]:
    """The colour and marker of the i-th series: 49 that differ."""
    return COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]


def largest(spectrum: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sites with the largest final ‖ΔW‖, in the model's order."""
    by_norm = sorted(spectrum, key=lambda site: -np.linalg.norm(spectrum[site][-1]))
    return {site: spectrum[site] for site in spectrum if site in by_norm[:PANELS]}


def draw(run: Run, spectrum: dict[str, np.ndarray], directory: Path) -> list[str]:
    """Writes every figure the run has the numbers for, and returns their names."""
    made = {"loss": _loss(run)}
    if (every := len(spectrum)) > PANELS:
        spectrum = largest(spectrum)
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
        if name in made and every > PANELS:
            made[name].suptitle(f"{PANELS} of {every} sites, those whose ΔW is largest")
    for name, figure in made.items():
        save(figure, directory / name)
    return list(made)


def log_scale(axes: Axes, low: float, high: float, which: str = "y") -> None:
    """A log scale of values from `low` to `high`; with plain numbers where they are few decades."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = np.log10(high / low)
    if decades < 1e-3:
        return  # one value: as wide as matplotlib makes it
    subs = (1, 2, 5) if decades > 0.7 else range(1, 10)
    if decades < 3:
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, whose layout has room for all that belongs to it, as PNG and PDF."""
    figure.savefig(path.with_suffix(".png"))
    figure.set_layout_engine("none")  # it stays as laid out, and is not laid out again
    figure.savefig(path.with_suffix(".pdf"))


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
        for i in range(min(sigma.shape[1], SHOWN)):
            # A zero (B before the first step) has no place on a log axis.
            values = np.where(sigma[:, i] > 0, sigma[:, i], np.nan)
            panel.plot(epochs, values, ".-", color=matplotlib.colormaps["viridis"](i / SHOWN))
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
        heat(figure, panel, values)
        panel.set(title=site, xlabel="first j directions of W", ylabel="first i directions of ΔW")
    return figure


def heat(figure: Figure, panel: Axes, phi: np.ndarray) -> None:
    """φ(i, j) as a picture, from 0 to 1, counted from 1."""
    i, j = phi.shape
    extent = (0.5, j + 0.5, i + 0.5, 0.5)
    image = panel.imshow(phi, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    panel.locator_params(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=panel, label="φ(i, j)")


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


def panels(count: int, width: float) -> tuple[Figure, list]:
    """A figure of `count` panels, three a line."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])
