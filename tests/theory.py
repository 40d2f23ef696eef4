"""`make theory`: runs all experiments whose result theory predicts, and compares.

Each is run with three seeds of data and of adapter, by the command in its YAML.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lora_lab.analysis import theory
from lora_lab.cli.analyze import compare_updates
from lora_lab.report.theory import TheoryCheck, check_against_theory
from lora_lab.runs import Run, find_runs

SEEDS = (0, 1, 2)

MULTIRUNS: dict[str, list[list[str]]] = {
    "planted_linear": [
        ["adapter.r=1,2,3,4,6"],
        ["adapter.r=2,4", "data.whiten=false", "data.noise=0.5"],
        ["adapter=full"],
    ],
    "planted_conv": [["adapter.r=1,2,3,4,6"], ["adapter.r=2", "data.whiten=false"]],
    # LoRA-FA on an embedding: its B, the factor that is drawn, is frozen.
    "planted_embedding": [["adapter.r=1,2,3,4,6"], ["adapter=lora_fa", "adapter.r=2,8"]],
    "group_shift": [["adapter.r=1,2,3,4,6"]],
    "scaling": [["adapter=lora,rslora", "adapter.r=1,4,16,64,256"]],
    "subspace": [["adapter.r=8,64"]],
    "what_trains": [["adapter=lora,lora_fa,lora_xs,pissa,olora", "adapter.r=1,4,16"]],
    "intruders": [["adapter.r=1,2,3,4,6"]],
}
"""Experiment → what its multiruns vary."""

SMALL: dict[str, list[list[str]]] = {
    "planted_linear": [["adapter.r=2,4"]],
    "planted_conv": [["adapter.r=2,4"]],
    "planted_embedding": [["adapter.r=2,4"]],
    "group_shift": [["adapter.r=2,4"]],
    "scaling": [["adapter=lora,rslora", "adapter.r=16"]],
    "subspace": [["adapter.r=8"]],
    "what_trains": [["adapter=lora_fa,lora_xs,pissa", "adapter.r=4"]],
    "intruders": [["adapter.r=2"]],
}
"""The same for the tests: fewer points."""

SHARED = 4
"""Directions that the subspace experiment plants."""


@dataclass(frozen=True)
class Line:
    """One metric of one point, over the seeds."""

    experiment: str
    point: str
    r: int
    metric: str
    seeds: list[TheoryCheck]

    @property
    def passes(self) -> bool:
        """Whether theory holds for all seeds."""
        return all(one.holds for one in self.seeds)

    @property
    def worst(self) -> str:
        """The largest gap of the seeds, in standard errors where theory has one."""
        if any(one.standard_error for one in self.seeds):
            return (
                f"{max(abs(o.measured - o.theory) / o.standard_error for o in self.seeds):.2f} s.e."
            )
        return f"{max((one.gap for one in self.seeds), key=abs):.1e}"


def commands(multiruns: dict[str, list[list[str]]]) -> list[list[str]]:
    """The arguments of `lora-lab train` for each multirun and each seed."""
    return [
        [
            "-m",
            f"experiment={experiment}",
            *varied,
            *seeds(experiment, seed),
            "tracking=off",
            "figures=false",
        ]
        for experiment, varied_settings in multiruns.items()
        for varied in varied_settings
        for seed in SEEDS
    ]


def seeds(experiment: str, seed: int) -> list[str]:
    """Pairs of runs of `subspace` share their data and differ in A."""
    if experiment == "subspace":
        return [f"seed={2 * seed},{2 * seed + 1}", f"data.seed={seed}"]
    return [f"seed={seed}", f"data.seed={seed}"]


def lines(runs: Sequence[Run]) -> list[Line]:
    """What was measured and what theory says, by experiment, point, r and metric."""
    by_line: dict[tuple[str, str, int, str], list[TheoryCheck]] = {}
    for run in runs:
        if (name := run.config["name"]) != "subspace":
            for one in check_against_theory(run):
                by_line.setdefault((name, *_point(run), one.metric), []).append(one)
    for seed in SEEDS:
        pair_of_runs = [
            r for r in runs if r.config["name"] == "subspace" and r.config["data"]["seed"] == seed
        ]
        for pair in compare_updates(pair_of_runs) if len(pair_of_runs) > 1 else []:
            if pair.side == "A":
                d, (r, other) = pair.dimension, sorted(pair.phi.shape)
                for i, j in {(2, 2), (SHARED, SHARED), (r, r), (r, other)}:
                    prediction = theory.similarity(i, j, d, SHARED)
                    i_one, i_other = (i, j) if pair.phi.shape[0] == r else (j, i)
                    phi = float(pair.phi[i_one - 1, i_other - 1])
                    one = TheoryCheck(
                        f"φ({i}, {j})", phi, prediction.value, prediction.standard_error, 1.0
                    )
                    by_line.setdefault(("subspace", f"r={r}, {other}", r, one.metric), []).append(
                        one
                    )
    order = list(MULTIRUNS)
    return [
        Line(*key, by_line[key]) for key in sorted(by_line, key=lambda key: order.index(key[0]))
    ]


def _point(run: Run) -> tuple[str, int]:
    adapter, data = run.config["adapter"], run.config["data"]
    parts = [] if adapter["method"] == "lora" else [adapter["method"]]
    parts += [adapter[k] for k in ("init",) if adapter.get(k, "kaiming") != "kaiming"]
    parts += [f"trains {adapter['trains']}"] if adapter.get("trains", "both") != "both" else []
    parts += [adapter["scaling"]] if adapter.get("scaling", "alpha/r") != "alpha/r" else []
    parts += ["not white"] if data.get("whiten") is False else []
    return ", ".join(parts) or "LoRA", adapter.get("r", 0)


def table(results: Sequence[Line]) -> Table:
    """One line a metric: means over the seeds, the worst gap, and whether all hold."""
    rich_table = Table(title=f"theory, seeds {', '.join(map(str, SEEDS))}")
    for name in ("experiment", "adapter", "r", "metric", "measured", "theory", "worst gap", "pass"):
        rich_table.add_column(name, justify="left" if name in ("experiment", "metric") else "right")
    for line in results:
        numbers = (mean(getattr(o, name) for o in line.seeds) for name in ("measured", "theory"))
        rich_table.add_row(
            *(
                line.experiment,
                line.point,
                str(line.r or "–"),
                line.metric.removeprefix("spectra/"),
            ),
            *(f"{value:.6g}" for value in numbers),
            *(line.worst, "yes" if line.passes else "[red]NO"),
        )
    return rich_table


def main() -> None:
    """Runs all, two at a time, and prints the table. Exits with 1 where theory does not hold."""
    parser = argparse.ArgumentParser("make theory ARGS=…")
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(MULTIRUNS)} (all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, one thread each")
    arguments = parser.parse_args()
    chosen = {
        name: varied_settings
        for name, varied_settings in MULTIRUNS.items()
        if not arguments.names or name in arguments.names
    }
    console = Console(width=None if sys.stdout.isatty() else 130)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:

        def run(command: list[str]) -> tuple[list[str], subprocess.CompletedProcess]:
            lab = [sys.executable, "-m", "lora_lab.cli", "train", *command]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            return command, subprocess.run(lab, cwd=folder, env=env, capture_output=True, text=True)

        todo, failed = commands(chosen), []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for command, ended in track(
                pool.map(run, todo), "multiruns", len(todo), console=console
            ):
                if ended.returncode:
                    failed.append(command)
                    console.print(
                        f"[red]failed:[/] lora-lab train {' '.join(command)}\n{ended.stderr}"
                    )
        runs = [run for run in find_runs(Path(folder) / "runs") if run.finished]
        results = lines(runs)
    console.print(table(results))
    passed = sum(line.passes for line in results)
    console.print(
        f"{passed} of {len(results)} hold; {len(runs)} runs in {time.time() - started:.0f} s"
    )
    sys.exit(bool(failed) or passed < len(results))


if __name__ == "__main__":
    main()
