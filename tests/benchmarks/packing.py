"""Runs trained together: multiruns with hydra/launcher=packed, and what a pack's steps cost.

A case is one multirun over r and seeds, by each launcher in a fresh process and an empty folder, so
that all start up, all train the base once and all leave the same run directories. `shift` has
besides what one would write without lora_lab (`usual.py`), each of whose jobs trains a base.
Where a multirun takes the better part of an hour, all but packed are measured on `--jobs` of
the runs: with T(n) the seconds of n runs and k those at once, the total is T(k) and, for each run
more, (T(jobs) − T(k))/(jobs − k). Start-up, and a base that is shared, are in T(k) and count once.

`growth` times bare steps, without Lightning, whose cost per step a pack also pays only once.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lab import adapters
from lora_lab.adapters.pack import Pack
from lora_lab.models.linear import Linear
from lora_lab.models.mlp import MLP
from lora_lab.packing.recorded_step import RecordedStep
from lora_lab.report.plotting import log_scale, series_style
from tests.conftest import SMALL

ROOT = Path(__file__).parents[2]
console = Console(width=120)

Grid = tuple[Sequence[int], int]
"""Ranks, and seeds for each."""


@dataclass(frozen=True)
class Case:
    """A multirun: an experiment, its grid, and its size in debugging."""

    title: str
    settings: tuple[str, ...]
    ranks: Sequence[int]
    seeds: int
    small: Sequence[str]
    long: bool = False
    """All but packed are measured on some of the runs, and `usual` too."""


RANKS = (1, 2, 4, 8)
"""Of all but shift: a head of ten classes has no more."""


def of_bytes(rows: int) -> Case:
    """Batches of so many × 64 tokens."""
    settings = ("experiment=bytes_lm", "data.size=60000", f"data.batch_size={rows}")
    title = f"bytes, a transformer of 2 layers, data.size=60000, batches of {rows} × 64 tokens"
    return Case(title, settings, RANKS, 6, SMALL["bytes_lm"])


def bert(rows: int) -> Case:
    """Batches of so many × 32 tokens, in 3 epochs of 1024 rows."""
    settings = (
        *("experiment=digits", "name=bert", "model=linear", "optimizer.lr=0.002"),
        *("data._target_=tests.benchmarks.bert.Tokens", "+data.samples=1024"),
        *(f"data.batch_size={rows}", "model._target_=tests.benchmarks.bert.Bert"),
        "target=['*.attention.self.query','*.attention.self.value']",
        *("base.epochs=3", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1"),
    )
    title = f"BERT-tiny of Hugging Face's, query and value, batches of {rows} × 32 tokens"
    small = ("data.samples=64", "base.epochs=1", "trainer.max_epochs=1")
    return Case(title, settings, RANKS, 6, small)


CASES = {
    "shift": Case("shift", ("experiment=shift",), (1, 2, 4, 8, 16, 32), 4, SMALL["shift"], True),
    "digits": Case("digits, MLP 64→128→128→10", ("experiment=digits",), RANKS, 6, SMALL["digits"]),
    "conv": Case(
        "digits, a CNN's convolutions",
        ("experiment=digits_targets", "target=[conv]"),
        RANKS,
        6,
        SMALL["digits_targets"],
    ),
    "bytes": of_bytes(32),
    "bytes-256": of_bytes(4),
    "bert": bert(16),
    "bert-128": bert(4),
}
"""The language models also with fewer tokens a batch, of which one run does not fill a core."""
LAUNCHERS = {
    "packed": ("hydra/launcher=packed",),
    "basic": ("hydra/launcher=basic",),
    "joblib, 2 at once": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
}


@dataclass(frozen=True)
class Contender:
    """The command of a grid, and how many of its runs are trained at once."""

    command: Callable[[Grid], list[str]]
    at_once: int = 1
    runs: bool = True
    """Its jobs leave run directories, which are counted."""


def sweep(grid: Grid) -> tuple[str, str]:
    """The values of r and of seed."""
    ranks, seeds = grid
    return ",".join(map(str, ranks)), ",".join(map(str, range(seeds)))


def ours(settings: Sequence[str], grid: Grid) -> list[str]:
    """`lora-lab train -m` of a case, with a launcher's settings."""
    ranks, seeds = sweep(grid)
    command = [sys.executable, "-m", "lora_lab.cli", "train", "-m", *settings]
    return [*command, f"adapter.r={ranks}", f"seed={seeds}"]


def usual(settings: Sequence[str], grid: Grid) -> list[str]:
    """What one would write without lora_lab."""
    ranks, seeds = sweep(grid)
    script = str(Path(__file__).with_name("usual.py"))
    return [sys.executable, script, "-m", f"r={ranks}", f"seed={seeds}", *settings]


def contenders(case: Case, quick: bool) -> dict[str, Contender]:
    """Those of a case, the first the one that the others are set against."""
    small = case.small if quick else ()
    contenders: dict[str, Contender] = {}
    for name, settings in LAUNCHERS.items():
        launcher = settings[0].partition("=")[2]
        at_once = 2 if launcher == "joblib" else 1
        contenders[name] = Contender(partial(ours, (*case.settings, *small, *settings)), at_once)
    if case.long:
        tiny = ("samples=256", "in_features=12", "out_features=9", "batch_size=32", "epochs=4")
        contenders["usual.py"] = Contender(partial(usual, tiny if quick else ()), runs=False)
    return contenders


def seconds(contender: Contender, grid: Grid) -> float:
    """Wall seconds of a process in an empty folder. Raises RuntimeError unless all runs end."""
    with tempfile.TemporaryDirectory() as folder:
        # So that tests/benchmarks/bert.py can be imported from within the folder.
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = time.perf_counter()
        ran = subprocess.run(
            contender.command(grid), cwd=folder, env=env, capture_output=True, text=True
        )
        wall = time.perf_counter() - started
        states = Path(folder).glob("runs/*/*/status.json")
        finished = [json.loads(path.read_text())["state"] for path in states].count("finished")
        if ran.returncode or (contender.runs and finished != len(grid[0]) * grid[1]):
            output = f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            raise RuntimeError(
                f"{' '.join(contender.command(grid))}: {finished} finished\n{output}"
            )
    return wall


def multirun_seconds(contender: Contender, case: Case, jobs: int | None) -> float:
    """The seconds of all runs of a case; extrapolated from `jobs` of them where that is given."""
    total = len(case.ranks) * case.seeds
    if jobs is None:
        return seconds(contender, (case.ranks, case.seeds))
    many, few = subsets(case.ranks, contender.at_once, jobs)
    first, more = seconds(contender, (few, 1)), seconds(contender, (many, 1))
    return first + (total - len(few)) * (more - first) / (len(many) - len(few))


def subsets(ranks: Sequence[int], at_once: int, jobs: int) -> tuple[list[int], list[int]]:
    """`jobs` ranks from first to last, a multiple of those at once, and the middle ones of them.

    Each has one seed, so that they are at most as many as the ranks.
    """
    count = min(len(ranks) // at_once, max(2, ceil(jobs / at_once))) * at_once
    many = [ranks[i * (len(ranks) - 1) // (count - 1)] for i in range(count)]
    start = (count - at_once) // 2
    return many, many[start : start + at_once]


def multirun(case: Case, options: argparse.Namespace) -> None:
    """A table of a case: each contender's seconds, and how many times packed's they are."""
    if options.quick:
        case = replace(case, ranks=case.ranks[:3], seeds=2)
    racing = contenders(case, options.quick)
    scaled = set(racing) - {"packed"} if case.long and not (options.full or options.quick) else ()
    took: dict[str, list[float]] = {name: [] for name in racing}
    for i in range(options.repeats):
        for name in list(racing)[:: -1 if i % 2 else 1]:
            jobs = options.jobs if name in scaled else None
            took[name].append(multirun_seconds(racing[name], case, jobs))
            console.print(f"{name}: {took[name][-1]:.1f} s", style="dim")
    total = len(case.ranks) * case.seeds
    title = f"{case.title}: r={sweep((case.ranks, case.seeds))[0]} × {case.seeds} seeds"
    title += f", {total} runs; whole processes, interleaved, {options.repeats} rounds"
    if options.quick:
        title += "; TINY SIZES, only to see that it works"
    if scaled:
        title += f"\nall but packed measured on a few runs, as said, and scaled to {total}"
        title += ", start-up and a shared base counted once"
    table = Table(title=title)
    against = next(iter(racing))
    table.add_column("")
    for name in ("runs measured", "wall s: median", "min–max", f"/ {against}: median", "min–max"):
        table.add_column(name, justify="right")
    for name, seconds_taken in took.items():
        ratios = [a / b for a, b in zip(seconds_taken, took[against], strict=True)]
        sizes = [len(part) for part in subsets(case.ranks, racing[name].at_once, options.jobs)]
        measured = f"{sizes[1]} and {sizes[0]}" if name in scaled else str(total)
        row = [
            measured,
            f"{statistics.median(seconds_taken):.1f}",
            f"{min(seconds_taken):.1f}–{max(seconds_taken):.1f}",
        ]
        row += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"]
        table.add_row(name, *row)
    console.print(table)


@dataclass(frozen=True)
class Growing:
    """A model with adapters on the layers `match`, and a batch of its experiment."""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    match: str
    shared: int
    """Multiplications and additions in the base before the first adapter: its product is the same
    for all runs, whose batches are the same; each step needs it once."""


GROWING = {
    "shift": Growing(
        "shift: linear 1001→1000, 128 rows",
        lambda: Linear(1001, 1000),
        lambda: (torch.randn(128, 1001), torch.randn(128, 1000)),
        F.mse_loss,
        "*",
        2 * 128 * 1001 * 1000,
    ),
    "digits": Growing(
        "digits: MLP 64→128→128→10, 64 rows",
        lambda: MLP(64, 10, [128, 128]),
        lambda: (torch.randn(64, 64), torch.randint(10, (64,))),
        F.cross_entropy,
        "body.*",  # the head has no rank of 64
        2 * 64 * 64 * 128,
    ),
}
POWERS = (1, 2, 4, 8, 16, 32, 64)
RANK, RUNS = 8, 16
"""What is held while the other grows."""


def adapted(model: nn.Module, what: Growing, r: int, seed: int = 0) -> nn.Module:
    """The model of one run."""
    target = adapters.Target(kind="linear", match=what.match)
    adapters.attach(model, {"target": target}, r=r, alpha=r, seed=seed)
    return model


def median_ms(step: Callable[[], object], at_least: float = 0.1) -> float:
    """The median of as many steps as fill `at_least` seconds, after three."""
    for _ in range(3):
        step()
    took, end = [], time.perf_counter() + at_least
    while time.perf_counter() < end or len(took) < 5:
        started = time.perf_counter()
        step()
        took.append(time.perf_counter() - started)
    return 1000 * statistics.median(took)


def alone_ms(what: Growing, r: int) -> float:
    """Milliseconds of a step of one run alone: forward, backward, Adam."""
    model, (x, y) = adapted(what.make(), what, r), what.batch()
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        adam.zero_grad()
        what.loss(model(x), y).backward()
        adam.step()

    return median_ms(step)


def step_ms(what: Growing, runs: int, r: int) -> float:
    """Milliseconds of one step of `runs` runs in one pass."""
    base, (x, y) = what.make(), what.batch()
    models = [adapted(copy.deepcopy(base), what, r, seed) for seed in range(runs)]
    pack = Pack(base, [adapters.attached(model) for model in models])
    adam = torch.optim.Adam([p for p in pack.parameters() if p.requires_grad], fused=True)
    recorded = RecordedStep(pack, what.loss)

    def step() -> None:
        recorded(x, y)
        adam.step()

    return median_ms(step)


def rate() -> float:
    """Operations a millisecond of this machine's largest products, the best of those timed."""
    a = torch.randn(1024, 1024)
    timed = [median_ms(lambda: a @ a, 0) for _ in range(5)]
    return 2 * 1024**3 / min(timed)


def operations_per_run(what: Growing, r: int) -> int:
    """Operations of one run's step that no other run's are: those of its products but `shared`."""
    model, (x, y) = adapted(what.make(), what, r), what.batch()
    with FlopCounterMode(display=False) as counted:
        what.loss(model(x), y).backward()
    return counted.get_total_flops() - what.shared


def growth(options: argparse.Namespace) -> None:
    """How a step's cost grows with the runs of a pack and with r: tables, and a figure."""
    torch.set_num_threads(options.threads)
    sizes = POWERS[:2] if options.quick else POWERS
    lines = {"runs": [(n, RANK) for n in sizes], "r": [(RUNS, r) for r in sizes]}
    points = list(dict.fromkeys(point for line in lines.values() for point in line))
    rates: list[float] = []
    timings = {(name, *point): ([], []) for name in GROWING for point in points}
    for _ in range(options.repeats):
        rates.append(rate())
        for (name, runs, r), (packed, apart) in timings.items():
            packed.append(step_ms(GROWING[name], runs, r))
            apart.append(runs * alone_ms(GROWING[name], r))
    figure = Figure(figsize=(9, 4 * len(GROWING)), layout="constrained")
    axes = figure.subplots(len(GROWING), 2)
    for i, (name, what) in enumerate(GROWING.items()):
        measured: dict[tuple[int, int], tuple[float, float, float]] = {}
        title = f"{what.title}: ms a bare step, median of {options.repeats} rounds\n"
        title += f"threads: {options.threads}; largest product: {max(rates) / 1e6:.0f} Gflop/s"
        table = Table(title=title)
        for heading in ("runs", "r", *SERIES, "pack / floor", "apart / pack"):
            table.add_column(heading, justify="right")
        for runs, r in points:
            packed, apart = map(statistics.median, timings[name, runs, r])
            floor = (what.shared + runs * operations_per_run(what, r)) / max(rates)
            measured[runs, r] = packed, apart, floor
            row = [f"{x:.3g}" for x in (packed, apart, floor, packed / floor, apart / packed)]
            end = (runs, r) == lines["runs"][-1]
            table.add_row(str(runs), str(r), *row, end_section=end)
        console.print(table)
        for j, (axis, line) in enumerate(lines.items()):
            panel, x = axes[i, j], [point[j] for point in line]
            for k, series in enumerate(SERIES):
                color, marker = series_style(k)
                y = [measured[point][k] for point in line]
                panel.plot(x, y, f"{marker}-", color=color, markersize=4, label=series)
            shown = [v for point in line for v in measured[point] if v == v]
            log_scale(panel, min(shown), max(shown))
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, map(str, x))
            held = f"r = {RANK}" if axis == "runs" else f"{RUNS} runs"
            panel.set(xlabel=axis, ylabel="ms a step", title=f"{what.title}\n{held}")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    if options.figure:
        figure.savefig(options.figure)


SERIES = ("one pack", "one after another", "floor")
"""The floor: the products that runs share, once, and those of each run, at the rate of the
machine's largest product. One of few columns has a lower rate; all else is not counted."""


def main() -> None:
    """Runs the cases that are named, or all."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.packing")
    parser.add_argument("names", nargs="*", choices=[*CASES, "growth", []], help="which (all)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument(
        "--jobs", type=int, default=3, help="of shift's 24 runs, for all but packed: 3, to 6"
    )
    parser.add_argument("--full", action="store_true", help="all 24 of shift's, for all")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, only to see that it works"
    )
    parser.add_argument("--threads", type=int, default=1, help="of growth (1)")
    parser.add_argument("--figure", type=Path, help="where growth's figure goes, a PNG")
    options = parser.parse_args()
    for name in options.names or [*CASES, "growth"]:
        if name == "growth":
            growth(options)
        else:
            multirun(CASES[name], options)


if __name__ == "__main__":
    main()
