"""Casting to `trainer.precision` without a Trainer.

Independent truth: the precision plugin of the Trainer that Lightning builds from the same settings.

Run: make test ARGS=tests/training/test_precision.py
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lora_lab.config.schema import Trainer
from lora_lab.training.precision import cast, device_type, precision_plugin

PRECISIONS = ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]
SHORT = [None, 16, 32, 64, "16", "32", "64", "bf16"]
ACCELERATORS = ["cpu", "auto"]


def settings(accelerator: str, precision: str | int | None) -> Trainer:
    given: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": precision}
    return Trainer(**given, max_epochs=1, check_val_every_n_epoch=1)


def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    model.register_buffer("counts", torch.zeros(2, dtype=torch.long))
    return model


def dtypes(plugin: Any, model: nn.Module) -> list[torch.dtype]:
    """Of the weights, of a batch, of a new tensor and of a product within the forward pass."""
    batch = plugin.convert_input((torch.rand(2, 3), torch.tensor([0, 1])))
    with plugin.forward_context():
        within = torch.zeros(1), torch.rand(2, 3) @ torch.rand(3, 2)
    tensors = [*model.state_dict().values(), *batch, *within]
    return [tensor.dtype for tensor in tensors]


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("precision", [*PRECISIONS, *SHORT], ids=str)
@pytest.mark.filterwarnings("ignore:.*discouraged", "ignore:.*AMP with fp16")
def test_as_lightnings_trainer(accelerator: str, precision: str | int | None):
    trainer = settings(accelerator, precision)
    lightning = pl.Trainer(**trainer.model_dump(), logger=False, enable_checkpointing=False)
    plugin = precision_plugin(trainer)
    assert type(plugin) is type(lightning.precision_plugin)
    assert plugin.precision == lightning.precision_plugin.precision
    assert device_type(trainer) == lightning.strategy.root_device.type
    ours, theirs = model(), model()
    cast(ours, trainer)
    lightning.precision_plugin.convert_module(theirs)
    assert dtypes(plugin, ours) == dtypes(lightning.precision_plugin, theirs)


def test_mixed_precision_is_of_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plugin: Any = precision_plugin(settings("cuda", "16-mixed"))
    assert (plugin.device, plugin.precision) == ("cuda", "16-mixed")
