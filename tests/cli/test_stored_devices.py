"""The devices on which `lora-lab reproduce` repeats a run, and what it says of them.

Independent truth: a table of what runs had, what is asked for, and the line and the Trainer's
settings that follow on a machine without a GPU. That two processes give the bits of two is in
tests/training/test_devices.py. Run: make test ARGS=tests/cli/test_stored_devices.py
"""

import os
from pathlib import Path

import pytest
import torch

from lora_lab.cli.stored_devices import on_devices
from lora_lab.config.checks import parse_config
from tests.conftest import only_run, small

OLD = "devices: stored not recorded, by its config accelerator=auto devices=1"

# What the run recorded as (accelerator, devices, nodes, strategy), what its config says where that
# is not the default, --devices, the line, and the new accelerator and number of devices.
ROWS = {
    "one": ("cpu 1 1 auto", {}, None, "devices: 1 × cpu, as the stored run", ("cpu", 1)),
    "two": ("cpu 2 1 ddp", {}, None, "devices: 2 × cpu (ddp), as the stored run", ("cpu", 2)),
    "of two, one": (
        *("cpu 2 1 ddp", {}, 1),
        *("devices: stored 2 × cpu (ddp); new 1 × cpu, by --devices", ("cpu", 1)),
    ),
    "of one, two": (
        *("cpu 1 1 auto", {}, 2),
        *("devices: stored 1 × cpu; new 2 × cpu (ddp), by --devices", ("cpu", 2)),
    ),
    "of two, two": (
        *("cpu 2 1 ddp", {}, 2),
        *("devices: 2 × cpu (ddp), as the stored run", ("cpu", 2)),
    ),
    "two nodes become processes": (
        *("cpu 1 2 ddp", {}, None),
        *("devices: stored 2 × cpu on 2 nodes (ddp); new 2 × cpu (ddp)", ("cpu", 2)),
    ),
    "shared weights": (
        *("cpu 2 1 fsdp", {}, None),
        *("devices: 2 × cpu (fsdp), as the stored run", ("cpu", 2)),
    ),
    "a GPU that is not here": (
        *("cuda 1 1 auto", {}, None),
        *("devices: stored 1 × cuda; new 1 × cpu, as this machine lacks those", ("auto", 1)),
    ),
    "GPUs that are not here": (
        *("cuda 4 1 fsdp", {}, None),
        *("devices: stored 4 × cuda (fsdp); new 1 × cpu, as this machine lacks those", ("auto", 1)),
    ),
    "two, of GPUs that are not here": (
        *("cuda 4 1 ddp", {}, 2),
        "devices: stored 4 × cuda (ddp); new 2 × cpu (ddp), as this machine lacks those",
        ("auto", 2),
    ),
    "an earlier version's": (None, {}, None, f"{OLD}; new 1 × cpu", ("auto", 1)),
    "two, of an earlier version's": (
        *(None, {}, 2, f"{OLD}; new 2 × cpu (ddp), by --devices", ("auto", 2)),
    ),
    "an earlier version's GPUs": (
        *(None, {"accelerator": "gpu", "devices": 8}, None),
        "devices: stored not recorded, by its config accelerator=gpu devices=8; new 1 × cpu, "
        "as this machine lacks those",
        ("auto", 1),
    ),
    "no devices": ("cpu one 1 auto", {}, None, f"{OLD}; new 1 × cpu", ("auto", 1)),
}


@pytest.fixture(scope="module")
def shift(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run."""
    folder = tmp_path_factory.mktemp("shift")
    os.chdir(folder)
    assert small("shift") == 0
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_the_devices_of_a_reproduction(row: str, shift: Path, monkeypatch: pytest.MonkeyPatch):
    recorded, config, number, line, expected = ROWS[row]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(shift)
    run = only_run()
    fields = ("accelerator", "devices", "num_nodes", "strategy")
    run.update_status(devices=recorded and dict(zip(fields, recorded.split(), strict=True)))
    stored = {**run.config, "trainer": {**run.config["trainer"], **config}}
    cfg, actual = on_devices(parse_config(stored), run, number)
    assert actual == line
    assert (cfg.trainer.accelerator, cfg.trainer.devices) == expected
