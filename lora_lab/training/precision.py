"""Casts models and batches to the floating-point precision that `trainer.precision` names.

Lightning's Trainer does this while it trains. Outside of training (before ΔW is first measured,
when a finished run is restored, when a pack is tried out) the same plugins are used without one.
"""

from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import nn

from lora_lab.config.schema import Trainer


def connector(trainer: Trainer) -> _AcceleratorConnector:
    """The part of Lightning's Trainer that chooses its device and its precision plugin.

    It is built by itself, for one device, in a tenth of a millisecond. Lightning has no public
    function for this choice.
    """
    name = trainer.model_dump().get("precision")
    return _AcceleratorConnector(devices=1, accelerator=trainer.accelerator, precision=name)


def device_type(trainer: Trainer) -> str:
    """The type of device that `trainer.accelerator` means on this machine, as `cpu` or `cuda`."""
    return connector(trainer).strategy.root_device.type


def precision_plugin(trainer: Trainer) -> Precision:
    """The Lightning plugin that a Trainer on one device with these settings would use.

    Its `convert_module` casts a model in place, `convert_input` gives a cast batch, and
    `forward_context` is the context (autocast, or a default dtype) of a forward pass.
    """
    return connector(trainer).precision_plugin


def cast(module: nn.Module, trainer: Trainer) -> None:
    """Casts a model's weights in place to the dtypes in which they are trained."""
    precision_plugin(trainer).convert_module(module)
