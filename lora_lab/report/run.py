"""One run's tables, and the list of many."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from lora_lab.report import page
from lora_lab.report.plotting import MAX_PANELS
from lora_lab.report.run_figures import largest_updates, write_figures
from lora_lab.report.tables import Rows, csv_of, format_number, markdown
from lora_lab.report.theory import CHECK_COLUMNS, GAP_NOTE, check_against_theory, check_row
from lora_lab.runs import Run, write_atomic

OWN = ("r", "alpha", "dropout", "init")
"""What a target may set for its own sites."""

SHOWN = 24
"""Sites that are listed by name when a run starts; adapter/adapter.json has all."""


@dataclass(frozen=True)
class RunTables:
    """What a run has to say: curves by epoch, facts by name, and theory beside what was measured.

    The first row of curves and theory holds the column names; theory is [] where there is none.
    """

    curves: Rows
    facts: Rows
    theory: Rows


def run_tables(run: Run) -> RunTables:
    """The run's tables, from its files alone."""
    theory = [check_row(one) for one in check_against_theory(run)]
    return RunTables(_curves(run), _facts(run), [CHECK_COLUMNS, *theory] if theory else [])


def _curves(run: Run) -> Rows:
    published = run.config.get("published") or {}
    method = run.config["adapter"]["method"]
    columns: dict[str, dict[int, float]] = {}
    for prefix, label, paper in (("base/", "base", "base"), ("", method, "adapted")):
        for key in dict.fromkeys(
            k for row in run.rows() for k in row if k.startswith(f"{prefix}val/")
        ):
            name = f"{label} {key.removeprefix(f'{prefix}val/')}"
            columns[name] = run.curve(key)
            if key.endswith("val/loss") and published.get(paper):
                columns[f"{label} published"] = published[paper]
    epochs = sorted({epoch for curve in columns.values() for epoch in curve})
    body = [[str(e), *(format_number(curve.get(e)) for curve in columns.values())] for e in epochs]
    return [["epoch", *columns], *body]


def _facts(run: Run) -> Rows:
    config, adapter = run.config, run.config["adapter"]
    facts = []
    if adapter["method"] == "lora":
        how = [
            f"r={adapter['r']}",
            f"alpha={adapter['alpha']:g}",
            adapter["scaling"],
            adapter["init"],
        ]
        how += ["DoRA"] if adapter.get("dora") else []
        how += [f"trains {adapter['trains']}"] if adapter.get("trains", "both") != "both" else []
        ratio = adapter.get("lr_ratio", 1)
        how += [f"lr ratio {ratio:g}"] if ratio != 1 else []
        own = any(t.get(k) for t in config["target"].values() for k in OWN)
        own = own or adapter.get("rank_pattern") or adapter.get("alpha_pattern")
        how += ["but for sites with their own (adapter/adapter.json)"] if own else []
        facts.append(["adapter", ", ".join(how)])
    loss = run.curve("val/loss")
    if loss:
        facts.append(["loss on the new data before adaptation", format_number(loss[min(loss)])])
    if len(loss) > 1:
        facts.append(["loss on the new data after adaptation", format_number(loss[max(loss)])])
    if (merged := run.last("merged/val/loss")) is not None:
        facts.append(["loss of the merged model", format_number(merged)])
    trainable, base = run.last("parameters/trainable"), run.last("parameters/base")
    if trainable and base:
        share = f"{format_number(trainable)} of {format_number(base)} ({trainable / base:.3%})"
        facts.append(["trainable parameters", share])
    full = run.last("bytes/full_optimizer")
    for what, name in (("adapter on disk", "adapter"), ("optimizer state", "optimizer")):
        if (size := run.last(f"bytes/{name}")) is not None:
            beside = (
                f", {_bytes(full)} for full fine-tuning" if full and name == "optimizer" else ""
            )
            facts.append([what, f"{_bytes(size)}{beside}"])
    everything = singular_values_by_site(run)
    for site, sigma in largest_updates(everything).items():
        last = ", ".join(format_number(value) for value in sigma[-1][:4])
        more = ", …" if sigma.shape[1] > 4 else ""
        rank = run.last(f"spectra/{site}/effective_rank")
        facts.append([f"ΔW of {site}: singular values", f"{last}{more}"])
        facts.append([f"ΔW of {site}: effective rank", format_number(rank)])
        for name, words in (
            ("amplification", f"ΔW of {site}: ‖ΔW‖ over what W has of its directions"),
            ("intruders", f"W + ΔW of {site}: first directions that W has not"),
        ):
            if (value := run.last(f"spectra/{site}/{name}")) is not None:
                among = run.last(f"spectra/{site}/intruders_among")
                of = f" of {format_number(among)}" if name == "intruders" and among else ""
                facts.append([words, format_number(value) + of])
    if (more := len(everything) - MAX_PANELS) > 0:
        facts.append([f"and {more} sites more", "with a smaller ΔW, in spectra.npz"])
    if (run.path / "advice.yaml").exists():
        advice = yaml.safe_load((run.path / "advice.yaml").read_text())
        ranks = advice["adapter"]["rank_pattern"].items()
        shown = ", ".join(f"{site} {k}" for site, k in list(ranks)[:MAX_PANELS])
        more = ", …" if len(ranks) > MAX_PANELS else ""
        kept = f"≥ {100 * advice['keep']:.4g}% of the gain ({advice['share']:.1%})"
        facts.append([f"ranks that keep {kept}", shown + more])
    facts.append(["seed, data seed", f"{config['seed']}, {config['data'].get('seed', '–')}"])
    return facts


def _bytes(size: float) -> str:
    unit = min(3, int(np.log10(max(size, 1)) // 3))
    return f"{size / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB')[unit]}"


def site_table(picked: Iterable[Any]) -> Table:
    """What the targets matched: each site's weight as a matrix, r, alpha, and what trains there."""
    picked = list(picked)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("site", "weight", "r", "alpha", "init", "dropout", "trains"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for site in picked[:SHOWN]:
        weight = " × ".join(map(str, site.shape))
        recipe = site.recipe
        how = (str(recipe.r), f"{recipe.alpha:g}", recipe.init, f"{recipe.dropout:g}")
        table.add_row(site.name, weight, *how, f"{site.trainable_parameters:,}")
    if len(picked) > SHOWN:
        table.add_row(f"… and {len(picked) - SHOWN} more")
    table.add_section()
    total = sum(site.trainable_parameters for site in picked)
    table.add_row(f"{len(picked)} site{'s' * (len(picked) != 1)}", *[""] * 5, f"{total:,}")
    return table


def singular_values_by_site(run: Run) -> dict[str, np.ndarray]:
    """Site → singular values (time × k), from spectra.npz; empty where there is none."""
    path, suffix = run.path / "spectra.npz", "/singular_values"
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return {k.removesuffix(suffix): arrays[k] for k in arrays.files if k.endswith(suffix)}


def write_run(run: Run, draw: bool = True) -> Path:
    """Writes report/: table.md, curves.csv, facts.csv, index.html, every figure as PNG and PDF."""
    directory = run.path / "report"
    directory.mkdir(exist_ok=True)
    made = run_tables(run)
    drawn = write_figures(run, singular_values_by_site(run), directory) if draw else []
    parts = [
        f"# {run.config['name']}: {run.path.name}",
        markdown(made.curves, "r"),
        *([markdown(made.theory, "r"), GAP_NOTE] if made.theory else []),
        markdown([["", ""], *made.facts], "l"),
        *(f"![{name}]({name}.png)" for name in drawn),
    ]
    write_atomic(directory / "table.md", "\n\n".join(parts) + "\n")
    write_atomic(directory / "curves.csv", csv_of(made.curves))
    if made.theory:
        write_atomic(directory / "theory.csv", csv_of(made.theory))
    facts = [["fact", "value"], *made.facts]
    write_atomic(directory / "facts.csv", csv_of(facts))
    page.write_run_page(
        run, [("facts", facts), ("curves", made.curves), ("theory", made.theory)], drawn
    )
    return directory


def show_run(run: Run, console: Console) -> None:
    """Prints the run's tables, and where its figures and files are."""
    made = run_tables(run)
    shown = [(made.curves, True), *([(made.theory, True)] if made.theory else [])]
    for rows, head in (*shown, (made.facts, False)):
        table = Table(box=box.SIMPLE, show_header=head, pad_edge=False)
        for name in rows[0]:
            table.add_column(name if head else "", justify="right" if head else "left")
        for row in rows[1:] if head else rows:
            table.add_row(*row)
        console.print(table)
    seconds = run.status.get("seconds")
    if made.theory:
        console.print(f"{GAP_NOTE}\n", highlight=False)
    console.print(figures_line(run.path / "report"), soft_wrap=True, highlight=False)
    took = f" ({seconds:.0f} s)" if seconds else ""
    console.print(f"run      {run.path}{took}", soft_wrap=True, highlight=False)
    if wandb := run.status.get("wandb"):
        path = os.path.relpath(run.path / wandb)
        console.print(f"W&B      {path}", soft_wrap=True, highlight=False)


def figures_line(directory: Path, none: str = "none drawn: lora-lab report draws them") -> str:
    """Which figures a report has, in a line."""
    names = ", ".join(path.stem for path in sorted(directory.glob("*.png")))
    return f"figures  {directory} ({names or none})"


def runs_table(runs: Iterable[Run], state: str | None = None, sort: str = "name") -> Table:
    """The table of `lora-lab ls`: the runs in one state, or all, by name, loss, time or start."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("status", "experiment", "cell"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "final loss", "time", "hash"):
        table.add_column(name, justify="right", no_wrap=True)
    found = []
    for run in runs:
        status = run.status
        try:
            loss = run.last("val/loss") if status["state"] == "finished" else None
        except ValueError:
            status["state"], loss = "damaged", None
        if state in (None, status["state"]):
            by = {"name": 0, "loss": loss, "time": status.get("seconds")}
            by["started"] = status.get("started")
            found.append((by[sort], run, status, loss))
    # What has no loss or time, or none that is a number, comes last.
    found.sort(key=lambda one: (one[0] is None or one[0] != one[0], one[0] or 0))
    for _, run, status, loss in found:
        seconds = status.get("seconds")
        table.add_row(
            status["state"],
            run.path.absolute().parent.name,
            status.get("cell", "–"),
            str(status.get("seed", "–")),
            format_number(loss),
            f"{seconds:.0f} s" if seconds is not None else "–",
            run.path.name.rpartition("-")[2],
        )
    return table
