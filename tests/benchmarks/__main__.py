"""`make bench`: runs every benchmark and prints one table each."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

PLAIN = Path(__file__).with_name("plain.py")


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process from start to exit, in an empty folder."""
    folder = tempfile.mkdtemp()
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    shutil.rmtree(folder)
    cpu = after.children_user - before.children_user + after.children_system
    return wall, cpu - before.children_system


def shift(repeats: int, epochs: int) -> None:
    """All of `lora-lab train`, W&B and figures included, against a plain torch loop."""
    run = [sys.executable, "-m", "lora_lab.cli", "train"]
    run += [f"base.epochs={epochs}", f"trainer.max_epochs={epochs}"]
    plain = [sys.executable, str(PLAIN), str(epochs)]
    pairs = []
    for _ in range(repeats):
        pairs.append((seconds(run), seconds(plain)))
    table = Table(title=f"shift, {epochs} epochs: whole processes, interleaved, {repeats} pairs")
    for name in ("", "lora-lab train", "plain loop", "ratio: median", "min", "max"):
        table.add_column(name, justify="right")
    for i, what in enumerate(("wall s", "processor s")):
        ours, theirs = ([pair[side][i] for pair in pairs] for side in (0, 1))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        middle = (statistics.median(x) for x in (ours, theirs))
        row = [f"{x:.1f}" for x in middle]
        row += [f"{f(ratios):.3f}" for f in (statistics.median, min, max)]
        table.add_row(what, *row)
    Console().print(table)


BENCHMARKS: dict[str, Callable[[int, int], None]] = {"shift": shift}


def main() -> None:
    """Runs the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser("make bench ARGS=…")
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which (all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    for name in arguments.names or BENCHMARKS:
        BENCHMARKS[name](arguments.repeats, arguments.epochs)


if __name__ == "__main__":
    main()
