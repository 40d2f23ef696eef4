"""Runs that differ in r and seeds alone, and their figures against r."""

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_lab.report.figures import panels
from lora_lab.report.theory import Held, held
from lora_lab.runs import Run

NO_MATTER = ("published", "runs_dir", "bases_dir", "overwrite", "figures", "sweep", "tracking")
NO_MATTER += ("spectra",)
"""What of a config does not tell one series of runs from another."""


def rank(run: Run) -> int | None:
    """Its r; None without LoRA."""
    return run.config["adapter"].get("r")


def series_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """LoRA runs that differ in r and seeds alone, by what tells one series from another."""
    members: dict[str, dict[str, list[Run]]] = {}
    said: dict[str, dict[str, Any]] = {}
    for run in runs:
        if rank(run) is not None:
            flat = _flat({k: v for k, v in run.config.items() if k not in NO_MATTER})
            for key in ("adapter.r", "seed", "data.seed", "base.seed"):
                flat.pop(key, None)
            key = json.dumps(flat, sort_keys=True)
            said[key] = flat
            members.setdefault(run.config["name"], {}).setdefault(key, []).append(run)
    series: dict[str, list[Run]] = {}
    for name, own in members.items():
        keys = dict.fromkeys(k for series_key in own for k in said[series_key])
        differ = [k for k in keys if len({json.dumps(said[s].get(k)) for s in own}) > 1]
        for series_key, its in own.items():
            words = [name] if len(members) > 1 else []
            words += [f"{k.split('.')[-1]}={said[series_key].get(k, '–')}" for k in differ]
            series[", ".join(words)] = its
    return series


def _short(label: str) -> str:
    return label if len(label) <= 48 else f"{label[:47]}…"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def losses_by_rank(runs: Sequence[Run]) -> dict[int, list[float]]:
    """Final losses by r."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if (r := rank(run)) is not None and (loss := run.last("val/loss")) is not None:
            found.setdefault(r, []).append(loss)
    return dict(sorted(found.items()))


def losses_cut(runs: Sequence[Run]) -> tuple[dict[int, list[float]], int]:
    """Losses by k of the runs with the largest r, their ΔW cut to rank k; and that r."""
    top = max((r for run in runs if (r := rank(run)) is not None), default=0)
    found: dict[int, list[float]] = {}
    for run in runs:
        if rank(run) == top and (run.path / "spectra.npz").exists():
            with np.load(run.path / "spectra.npz") as arrays:
                if "truncation/ranks" in arrays:
                    ranks, losses = arrays["truncation/ranks"], arrays["truncation/loss"]
                    for k, loss in zip(ranks.tolist(), losses.tolist(), strict=True):
                        found.setdefault(k, []).append(loss)
    return found, top


def against_rank(runs: Sequence[Run]) -> Figure | None:
    """Loss against r: runs as points, their mean as a line, ΔW cut, full fine-tuning, the base.

    A colour for each series; None of several experiments, or where none has two ranks.
    """
    series = {name: own for name, own in series_of(runs).items() if len(losses_by_rank(own)) > 1}
    if not series or len({run.config["name"] for run in runs}) > 1:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    every: list[float] = []
    ticks: set[int] = set()
    for i, (name, own) in enumerate(series.items()):
        trained, (cut, top) = losses_by_rank(own), losses_cut(own)
        points = [(r, loss) for r, losses in trained.items() for loss in losses]
        every += [loss for _, loss in points]
        label = f" ({_short(name)})" if name else ""
        axes.plot(*zip(*points, strict=True), ".", color=f"C{i}", alpha=0.5)
        means = [mean(values) for values in trained.values()]
        axes.plot(list(trained), means, color=f"C{i}", label=f"trained at r{label}")
        if shown := {k: mean(losses) for k, losses in sorted(cut.items()) if k}:
            ks, losses = list(shown), list(shown.values())
            axes.plot(ks, losses, "--", color=f"C{i}", label=f"cut from r = {top}{label}")
        theory = [
            (r, one.theory)
            for run in own
            if (r := rank(run))
            for one in held(run)
            if one.metric == "val/loss"
        ]
        if theory:
            label = None if i else "theory"
            axes.plot(*zip(*theory, strict=True), "k+", markersize=9, label=label)
        ticks |= {*trained, *shown}
    for method, color in (("full", "black"), ("none", "gray")):
        losses = [run.last("val/loss") for run in runs if run.config["adapter"]["method"] == method]
        if losses := [loss for loss in losses if loss is not None]:
            label = f"adapter={method}"
            axes.axhline(mean(losses), color=color, linewidth=0.9, linestyle=":", label=label)
    axes.set(xlabel="r", ylabel="validation loss", xscale="log", title=runs[0].config["name"])
    axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)], minor=False)
    axes.minorticks_off()
    if min(every) > 1e-6 * max(every):  # what rounding leaves of a zero would fill a log axis
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def against_theory(runs: Sequence[Run]) -> Figure | None:
    """Every metric that theory speaks of against r: measured as points, theory as a line."""
    found: dict[str, dict[str, dict[int, list[Held]]]] = {}
    for name, own in series_of(runs).items():
        for run in own:
            for one in held(run):
                by_r = found.setdefault(one.metric, {}).setdefault(name, {})
                by_r.setdefault(int(run.config["adapter"]["r"]), []).append(one)
    enough = any(len(by_r) > 1 for series in found.values() for by_r in series.values())
    if not enough or len({run.config["name"] for run in runs}) > 1:
        return None
    figure, axes = panels(len(found), width=4.5)
    for panel, (metric, series) in zip(axes, found.items(), strict=True):
        ticks: set[int] = set()
        for i, (name, by_r) in enumerate(series.items()):
            ranks = sorted(by_r)
            values = np.array([mean(o.theory for o in by_r[r]) for r in ranks])
            errors = np.array([mean(o.error for o in by_r[r]) for r in ranks])
            panel.plot(ranks, values, color=f"C{i}", label=f"theory {_short(name)}".strip())
            if errors.any():
                band = (values - 3 * errors, values + 3 * errors)
                panel.fill_between(ranks, *band, color=f"C{i}", alpha=0.15, label="± 3 s.e.")
            points = [(r, o.measured) for r in ranks for o in by_r[r]]
            marks = {"fillstyle": "none", "color": f"C{i}", "label": "measured"}
            panel.plot(*zip(*points, strict=True), "o", **marks)
            ticks |= set(ranks)
        panel.set(title=metric, xlabel="r", xscale="log")
        panel.set_xticks(sorted(ticks), [str(r) for r in sorted(ticks)], minor=False)
        panel.minorticks_off()
        low, high = panel.get_ylim()
        if (middle := abs(low + high) / 2) and high - low < 0.02 * middle:
            panel.set_ylim(low - 0.02 * middle, high + 0.02 * middle)  # rounding is no shape
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure
