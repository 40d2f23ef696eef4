"""Casts models and batches to the floating-point precision that `trainer.precision` names.

Lightning's Trainer does this while it trains. Outside of training (before ΔW is first measured,
when a finished run is restored, when a pack is tried out) the same plugins are used without one.
"""

from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import nn

from lora_lab.adapters.files import is_adapter_key
from lora_lab.config.schema import Trainer


class HalfPrecisionBase(HalfPrecision):
    """Lightning's bf16-true and 16-true, but for adapters: what trains stays in float32.

    A step smaller than half of a bf16 number's last digit would leave it as it was: of Adam's steps
    of 1e-4 half did. A model without adapters (adapter=full) is cast as Lightning does.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts the base's parameters and buffers in place."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        for name, tensor in tensors:
            if tensor.is_floating_point() and not is_adapter_key(name):
                tensor.data = tensor.data.to(self._desired_input_dtype)
        return module


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
    """The Lightning plugin of a Trainer with these settings.

    Its `convert_module` casts a model in place, `convert_input` gives a cast batch, and
    `forward_context` is the context (autocast, or a default dtype) of a forward pass.
    """
    plugin = connector(trainer).precision_plugin
    # FSDP splits blocks of weights of one dtype.
    if type(plugin) is HalfPrecision and trainer.model_dump().get("strategy") != "fsdp":
        return HalfPrecisionBase(plugin.precision)
    return plugin


def cast(module: nn.Module, trainer: Trainer) -> None:
    """Casts a model's weights in place to the dtypes in which they are trained."""
    precision_plugin(trainer).convert_module(module)
