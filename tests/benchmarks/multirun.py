"""What a run of a multirun costs beside its training: many trivial runs in one process."""

import argparse
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_lab import report, train
from lora_lab.config import compose
from lora_lab.tracking.tracking import Tracking
from lora_lab.training import bases, experiment, plan
from tests.conftest import SMALL

PARTS: dict[str, list[tuple[Any, str]]] = {
    "composing": [(compose, "compose_config")],
    "checking": [(plan, "plan")],
    "W&B's start and end": [(Tracking, "__init__"), (Tracking, "finish_wandb")],
    "base": [(bases, "obtain")],
    "training": [(experiment, "fit")],
    "report": [(report, "write_run")],
}
"""What is timed within a run; the rest is Hydra's, validation, spectra and files."""


def multirun(runs: int, *settings: str) -> tuple[float, float, dict[str, float]]:
    """Wall and processor seconds a run of `runs` runs of one epoch, and the wall of each part."""
    spent, undo = dict.fromkeys(PARTS, 0.0), []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[part] += time.perf_counter() - started

        return timed

    for part, places in PARTS.items():
        for place, name in places:
            undo.append((place, name, getattr(place, name)))
            setattr(place, name, timed(part, getattr(place, name)))
    brief = ("base.epochs=1", "trainer.max_epochs=1", f"seed=range({runs})")
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            places = (f"runs_dir={folder}/runs", f"bases_dir={folder}/bases")
            sys.argv[1:] = ["-m", *SMALL["shift"], *brief, *places, *settings]
            before, started = os.times(), time.perf_counter()
            train.main()
            wall, after = time.perf_counter() - started, os.times()
    finally:
        for place, name, function in undo:
            setattr(place, name, function)
    cpu = after.user - before.user + after.system - before.system
    return wall / runs, cpu / runs, {part: seconds / runs for part, seconds in spent.items()}


def main() -> None:
    """Prints a table: a row for each way of tracking and drawing."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.multirun")
    parser.add_argument("--runs", type=int, default=100)
    runs = parser.parse_args().runs
    logging.disable(logging.INFO)
    train.console.quiet = True
    multirun(1)  # what is imported when it is first needed
    multiruns = {
        "as by default": ((), runs),
        "tracking=off": (("tracking=off",), runs),
        "figures=true": (("figures=true",), max(1, runs // 10)),
    }
    table = Table(title="seconds a run, one process, basic launcher, shift small, one epoch")
    for name in ("", "runs", "wall", "processor", *PARTS):
        table.add_column(name, justify="right")
    for name, (settings, count) in multiruns.items():
        wall, cpu, parts = multirun(count, *settings)
        numbers = [f"{x:.3f}" for x in (wall, cpu, *parts.values())]
        table.add_row(name, str(count), *numbers)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
