"""Spectra from factors against the dense product's SVD, and what measuring costs a run."""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from lora_lab import train
from lora_lab.analysis import spectra
from lora_lab.training.callbacks.spectra import SpectraCallback

SIZE = 4096


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def factors(ranks: list[int], repeats: int) -> Table:
    """`spectrum_of_factors` at 4096 × 4096, interleaved with a float32 svdvals(B @ A)."""
    table = Table(title=f"spectrum of B A, {SIZE} × {SIZE}: medians of {repeats} interleaved")
    for name in ("r", "from factors", "svdvals(B @ A)", "ratio", "its error", "error of svdvals"):
        table.add_column(name, justify="right")
    torch.manual_seed(0)
    for r in ranks:
        # Singular values over six decades, as a trained update's may be.
        decades = torch.logspace(0, -6, r, dtype=torch.float64) if r > 1 else torch.ones(1)
        U, V = (torch.linalg.qr(torch.randn(SIZE, r, dtype=torch.float64)).Q for _ in range(2))
        A, B = (decades.sqrt()[:, None] * V.T).float(), (U * decades.sqrt()).float()
        truth = torch.linalg.svdvals(B.double() @ A.double())[:r]
        ours, dense = [], []
        for _ in range(repeats):
            ours.append(seconds(lambda A=A, B=B: spectra.spectrum_of_factors(A, B)))
            dense.append(seconds(lambda A=A, B=B: torch.linalg.svdvals(B @ A)))
        computed = spectra.spectrum_of_factors(A, B).singular_values
        theirs = torch.linalg.svdvals(B @ A)[:r].double()
        errors = ((abs(values - truth) / truth).max() for values in (computed, theirs))
        fast, slow = statistics.median(ours), statistics.median(dense)
        row = [f"{fast * 1e3:.3g} ms", f"{slow:.3g} s", f"1 : {slow / fast:,.0f}"]
        table.add_row(str(r), *row, *(f"{error:.1e}" for error in errors))
    return table


def share(experiment: str, *overrides: str) -> tuple[float, float]:
    """Seconds that SpectraCallback takes of a run's training, and that training's seconds."""
    spent = {"measuring": 0.0, "training": 0.0}
    measure, fit = SpectraCallback._measure, pl.Trainer.fit

    def timed(key: str, call: Callable) -> Callable:
        def timed_call(*arguments: object, **named: object) -> None:
            spent[key] += seconds(lambda: call(*arguments, **named))

        return timed_call

    SpectraCallback._measure = timed("measuring", measure)
    pl.Trainer.fit = timed("training", fit)
    sys.argv[1:] = [f"experiment={experiment}", *overrides]
    try:
        with redirect_stdout(io.StringIO()):
            train.main()
    finally:
        SpectraCallback._measure, pl.Trainer.fit = measure, fit
    return spent["measuring"], spent["training"]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.spectra")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    console.print(factors(arguments.ranks, arguments.repeats))
    table = Table(title="measuring ΔW: its share of training, base included, at default schedules")
    for name in ("experiment", "measuring s", "training s", "share"):
        table.add_column(name, justify="right")
    for experiment in ("shift", "digits"):
        with tempfile.TemporaryDirectory() as folder:
            places = [f"runs_dir={folder}/runs", f"bases_dir={folder}/bases"]
            measuring, training = share(experiment, *places)
        share_of = f"{measuring / training:.2%}"
        table.add_row(experiment, f"{measuring:.3f}", f"{training:.1f}", share_of)
    console.print(table)


if __name__ == "__main__":
    main()
