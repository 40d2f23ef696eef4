"""Every shipped experiment ends settled, so that what it compares is no rounding.

Each is run twice with all its settings: the second time with another number of threads and with A's
first values moved by 1e-7 of themselves. Their final metrics must agree to 1%. Slow: run by
`make test-slow ARGS="-k settled"`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_lab import train
from lora_lab.adapters.init import INITS
from lora_lab.runs import find_runs
from tests.protocol_files import FILES

EXPERIMENTS = sorted({path.stem for path in Path("conf/experiment").glob("*.yaml")} - {*FILES})
"""Those that need no files of their user."""


def move_first_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds 1e-7 of itself to what each init draws for A."""
    for name, init in INITS.items():

        def draw(*args: object, draw=init.draw) -> tuple[Tensor, Tensor]:
            A, B = draw(*args)  # pyright: ignore[reportArgumentType]
            return A * (1 + 1e-7), B

        monkeypatch.setitem(INITS, name, replace(init, draw=draw))


def final_metrics(experiment: str, folder: str) -> dict[str, float]:
    sys.argv = ["lora-lab train", f"experiment={experiment}", f"runs_dir={folder}"]
    sys.argv += ["tracking=off", "figures=false"]
    train.main()
    (run,) = find_runs(Path(folder))
    names = {name for row in run.rows() for name in row if name.startswith("val/")}
    return {name: run.last(name) or 0.0 for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_ends_settled(experiment: str, monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = final_metrics(experiment, "first")
        torch.set_num_threads(2)
        move_first_values(monkeypatch)
        second = final_metrics(experiment, "second")
    finally:
        torch.set_num_threads(threads)
    assert first
    assert second == pytest.approx(first, rel=0.01)
