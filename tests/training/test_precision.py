"""Casting to `trainer.precision` without a Trainer.

Independent truth: the precision plugin of the Trainer that Lightning builds from the same settings.

Run: make test ARGS=tests/training/test_precision.py
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab import adapters
from lora_lab.config.schema import Trainer
from lora_lab.models.mlp import MLP
from lora_lab.training.precision import cast, device_type, precision_plugin
from tests.conftest import Lab, only_run

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
    assert isinstance(plugin, type(lightning.precision_plugin))
    assert plugin.precision == lightning.precision_plugin.precision
    assert device_type(trainer) == lightning.strategy.root_device.type
    ours, theirs = model(), model()
    cast(ours, trainer)
    lightning.precision_plugin.convert_module(theirs)
    assert dtypes(plugin, ours) == dtypes(lightning.precision_plugin, theirs)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_adapters_train_in_float32(lab: Lab, precision: str):
    """Each Adam step of 1e-4 moves each number of A: in bf16 half of them would stay."""
    settings = (f"trainer.precision={precision}", "optimizer.lr=1e-4", "trainer.max_epochs=2")
    assert lab("digits", *settings) == 0
    A = load_file(only_run().path / "adapter" / "adapter.safetensors")["body.fc1.A"]
    model = MLP(in_features=64, out_features=10, hidden=[16])
    r, alpha = (only_run().config["adapter"][key] for key in ("r", "alpha"))
    adapters.attach(model, r=r, alpha=alpha)
    start = adapters.attached(model)["body.fc1"].A
    assert A.dtype == torch.float32
    # Pixels that are 0 in all images have a gradient of 0.
    assert (start != A).float().mean() > 0.9


def test_mixed_precision_is_of_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plugin: Any = precision_plugin(settings("cuda", "16-mixed"))
    assert (plugin.device, plugin.precision) == ("cuda", "16-mixed")


def test_a_fused_optimizer_is_clipped_in_mixed_precision(lab: Lab):
    assert lab("digits", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.1") == 0
