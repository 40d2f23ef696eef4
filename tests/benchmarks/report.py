"""`lora-lab report` on 200 runs: 10 ranks, 5 values of alpha, 4 seeds; and `lora-lab ls` on them.

Copies of one real run of `digits`, each with its config, metrics and spectra. Seconds of
processes from start to exit, imports included. The bound for the report is 20 s.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lab.runs import Run, find_runs
from tests.copied_runs import copy_run

BOUND = 20.0


def timed(*command: str) -> tuple[float, float]:
    """Wall and processor seconds of `lora-lab COMMAND`."""
    before, started = os.times(), time.perf_counter()
    program = [sys.executable, "-m", "lora_lab.cli", *command]
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user - before.children_user + after.children_system
    return wall, cpu - before.children_system


def sweep(folder: Path, epochs: int) -> list[Run]:
    """200 runs below the current folder, of a real one with that many epochs."""
    train = ["train", "experiment=digits", f"trainer.max_epochs={epochs}", "tracking=off"]
    timed(*train, "figures=false", "runs_dir=first")
    (first,) = find_runs(folder / "first")
    points = product(range(1, 11), (1.0, 2.0, 4.0, 8.0, 16.0), range(4))
    keys = ("adapter.r", "adapter.alpha", "seed")
    return copy_run(
        first, (dict(zip(keys, point, strict=True)) for point in points), folder / "runs"
    )


def main() -> None:
    """Makes the runs and prints the table; exits with 1 where the report is beyond its bound."""
    parser = argparse.ArgumentParser("tests.benchmarks.report")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs = sweep(Path(folder), arguments.epochs)
        rows = len(runs[0].rows())
        table = Table(title=f"{len(runs)} runs of {rows} rows of metrics each: whole processes")
        for name in ("", "wall s", "processor s", "bound s"):
            table.add_column(name, justify="right" if name else "left")
        took = timed("report", "runs/digits")
        table.add_row("lora-lab report", *(f"{x:.1f}" for x in (*took, BOUND)))
        for name in ("ls", "best"):
            table.add_row(f"lora-lab {name}", *(f"{x:.1f}" for x in timed(name)), "–")
        Console().print(table)
        os.chdir("/")
    sys.exit(took[0] > BOUND)


if __name__ == "__main__":
    main()
