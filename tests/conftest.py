"""Fixtures: small runs by the real command, each test in an empty folder."""

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import HealthCheck, settings

from lora_lab import train
from lora_lab.cli import main as cli
from lora_lab.report.metric_meanings import metric_of
from lora_lab.runs import Run, find_runs
from lora_lab.tracking.wandb_run import Server
from tests.protocol_files import FILES

# Its first draw reads the constants of all modules that are imported by then, timm's among them.
settings.register_profile("tests", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# To embed fonts in a PDF takes a quarter of a report's time.
matplotlib.rcParams["pdf.use14corefonts"] = True

SMALL = {
    "shift": [
        *("data.samples=256", "data.in_features=12", "data.out_features=9", "data.batch_size=32"),
        *("base.epochs=4", "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2"),
        *("optimizer.lr=0.05", "base.optimizer.lr=0.05", "spectra.every_n_epochs=2"),
    ],
    "digits": ["base.epochs=2", "trainer.max_epochs=2", "model.hidden=[16]"],
    "docs_minilm": [
        *("data.per_package=8", "data.batch_size=8", "data.max_length=8", "trainer.max_epochs=2"),
        *("spectra.against_base=false", "forget.count=8", "forget.max_length=8"),
    ],
    "cut_digits": ["base.epochs=2", "trainer.max_epochs=2", "model.hidden=[16]"],
    "digits_rank": ["base.epochs=2", "trainer.max_epochs=2", "model.hidden=[16]"],
    "digits_targets": ["base.epochs=2", "trainer.max_epochs=2"],
    "bytes_bigram": [
        *("data.size=4000", "data.context=16", "data.batch_size=16"),
        *("base.epochs=2", "trainer.max_epochs=2"),
    ],
    "bytes_lm": [
        *("data.size=4000", "data.context=16", "base.epochs=2", "trainer.max_epochs=2"),
        *("model.width=16", "model.layers=1"),
    ],
    **{
        name: [
            *("data.samples=16", "data.in_features=12", "data.out_features=10", "data.steps=2"),
            *("base.epochs=2", "trainer.max_epochs=2"),
        ]
        for name in ("planted_linear", "what_trains", "intruders")
    },
    "scaling": [
        *("data.samples=16", "data.in_features=12", "data.out_features=10", "data.steps=2"),
        "base.epochs=2",
    ],
    "subspace": [
        *("data.samples=16", "data.in_features=12", "data.out_features=10", "data.steps=2"),
        *("optimizer.lr=0.1", "base.epochs=2", "trainer.max_epochs=2"),
    ],
    "planted_conv": [
        *("data.samples=32", "data.in_features=2", "data.size=4", "data.steps=2"),
        *("base.epochs=2", "trainer.max_epochs=2"),
    ],
    "planted_embedding": [
        *("data.samples=40", "data.in_features=20", "data.out_features=8", "data.steps=2"),
        *("base.epochs=2", "trainer.max_epochs=2"),
    ],
    "group_shift": [
        *("data.in_features=20", "data.out_features=8", "data.groups=[8,6]", "data.steps=2"),
        *("base.epochs=2", "trainer.max_epochs=2"),
    ],
    **{experiment: [] for experiment in FILES},
}
"""Experiment → settings that make it small enough for tests."""

Lab = Callable[..., int]


def quick(rows: Iterable[Any], some: Collection[Any]) -> list[Any]:
    """Test parameters of which all but some are slow; a row that is a tuple has several."""
    slow = pytest.mark.slow
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)), marks=[] if row in some else slow
        )
        for row in rows
    ]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `lora-lab ARGUMENTS` here and gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["lora-lab", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test runs in an empty folder, without W&B settings or a login from outside."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    for name, value in (("waited", 0.0), ("answers", True), ("failure_file", None)):
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setattr(sys, "argv", ["lora-lab"])
    yield
    logging.getLogger("lora_lab").setLevel(logging.NOTSET)


def small(experiment: str, *overrides: str, tracking: str = "off") -> int:
    """Runs `lora-lab train` here, small, and gives its exit code."""
    sizes = [o for o in SMALL[experiment] if not o.startswith("base.")]
    if "base=checkpoint" not in overrides:
        sizes = SMALL[experiment]
    quick = [f"tracking={tracking}", "figures=false"]
    sys.argv[1:] = [f"experiment={experiment}", *quick, *sizes, *overrides]
    try:
        train.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        assert not (unknown := unknown_metrics()), f"not in METRICS: {unknown}"
    return 0


def unknown_metrics() -> set[str]:
    """Names that the runs here have logged, and that report/metric_meanings.py does not know."""
    files = Path().glob("runs*/*/*/metrics.jsonl")
    rows = "".join(file.read_text(errors="ignore") for file in files)
    return {name for name in set(re.findall(r'"([^"]+)":', rows)) if metric_of(name) is None}


@pytest.fixture
def lab() -> Lab:
    """lab("shift", "adapter.r=2") runs `lora-lab train` here, small, and gives its exit code."""
    return small


def only_run(root: str = "runs") -> Run:
    """The only run below `root`."""
    (run,) = find_runs(Path(root))
    return run
