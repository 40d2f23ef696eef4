"""Casts models and batches to the floating-point precision that `trainer.precision` names.

Lightning's Trainer does this while it trains. Outside of training (before ΔW is first measured,
when a finished run is restored, when a pack is tried out) the same plugins are used without one.
"""

from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from torch import bfloat16, float16, nn

from lora_lab.config.schema import Trainer

FULL_NAMES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names of precisions, as `trainer.precision=16`."""


def device_type(trainer: Trainer) -> str:
    """The type of device that `trainer.accelerator` means on this machine, as `cpu` or `cuda`."""
    if trainer.accelerator not in ("auto", "gpu"):
        return trainer.accelerator
    if MPSAccelerator.is_available():
        return "mps"
    return "cuda" if CUDAAccelerator.is_available() else "cpu"


def precision_plugin(trainer: Trainer) -> Precision:
    """The Lightning plugin that a Trainer on one device with these settings would use.

    Its `convert_module` casts a model in place, `convert_input` gives a cast batch, and
    `forward_context` is the context (autocast, or a default dtype) of a forward pass.
    """
    name = str(trainer.model_dump().get("precision") or "32-true")
    name = FULL_NAMES.get(name, name)
    if name in ("16-true", "bf16-true"):
        return HalfPrecision(name)  # pyright: ignore
    if name == "64-true":
        return DoublePrecision()
    if name.startswith("transformer-engine"):
        dtype = float16 if name.endswith("-float16") else bfloat16
        return TransformerEnginePrecision(weights_dtype=dtype)
    if name in ("16-mixed", "bf16-mixed"):
        device = device_type(trainer)
        if device == "cpu":  # as Lightning: a CPU has no autocast to float16
            name = "bf16-mixed"
        return MixedPrecision(name, device if device in ("cpu", "mps") else "cuda")  # pyright: ignore
    return Precision()


def cast(module: nn.Module, trainer: Trainer) -> None:
    """Casts a model's weights in place to the dtypes in which they are trained."""
    precision_plugin(trainer).convert_module(module)
