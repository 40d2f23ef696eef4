"""torchvision and timm for the tests that need them, beside a torch for CPUs."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn


def use_torchvision() -> None:
    """Makes torchvision and timm importable in this process; skips the test where they are not.

    They are installed in a folder of their own: torchmetrics imports torchvision wherever it can,
    and PyPI's, which is built for CUDA, cannot be imported beside a torch for CPUs. For want of its
    library of operators it asks for two that do not exist, and which are declared here.
    """
    folder = str(Path(sys.prefix) / "vision")
    if folder not in sys.path:
        sys.path.append(folder)
    if not hasattr(torch.ops.torchvision, "nms"):
        global library
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pytest.importorskip("torchvision")


def save_images(folder: str, count: int) -> None:
    """Saves images of one color each in the folders of two classes."""
    from PIL import Image

    for i in range(count):
        file = Path(folder, ("cat", "dog")[i % 2], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)).save(file)


def tiny_convnext(folder: str, classes: int = 5, **settings: object) -> nn.Module:
    """Saves a small ConvNeXt of timm with random weights as timm does, and gives it."""
    use_torchvision()
    import timm  # pyright: ignore[reportMissingImports]

    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "conv_mlp": False, "ls_init_value": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("convnext_atto", num_classes=classes, **sizes, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return model
