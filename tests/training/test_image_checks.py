"""Images that do not fit their model: refused in the plan, before there is a run directory.

Truth: a table of settings with the key, the rule and the way out that the error must name; models
that take images of any size, and those whose size is the data's, are planned.

Run: make test ARGS=tests/training/test_image_checks.py
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from lora_lab.config.schema import ConfigError
from lora_lab.data.images import Images
from lora_lab.training import fit_checks
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.tiny_models import tiny_model
from tests.vision import save_images, tiny_convnext, use_torchvision


def test_images_and_their_models():
    use_torchvision()
    save_images("images", 40)
    tiny_convnext("convnext")
    tiny_model("vit", "vit", "image")
    vit = ["model=pretrained", "model.path=vit", "model.head=image", "base=pretrained"]
    timm = ["model=timm", "model.path=convnext", "base=pretrained"]
    images = ["data=images", "data.train=images", "target=linear"]
    plan(composed(*vit, *images))
    plan(composed(*timm, *images, "data.input=tensor"))
    bad = {
        "data=images data.input=pixel_values needs model=pretrained model.head=image": timm,
        "model.head=image: data=images data.input=tensor needs model=timm": [
            *(*vit, "data.input=tensor"),
        ],
        "model.dropout=1.5: must be at least 0": [*timm, "data.input=tensor", "model.dropout=1.5"],
    }
    for message, settings in bad.items():
        with pytest.raises(ConfigError) as error:
            plan(composed(*images, *settings))
        assert message in str(error.value)


IMAGES = "data=images data.train=images target=linear base=pretrained "
VIT = IMAGES + "model=pretrained model.head=image model.path="
TIMM = IMAGES + "model=timm data.input=tensor model.path="
SHAPES: dict[str, tuple[str, str | None]] = {
    "the processor's": (VIT + "vit", None),
    "other": (
        VIT + "vit data.size=20",
        "data.size=20: images of 20 × 20 pixels, and the model (model.path=vit) takes 16 × 16; "
        "data.size=16 fits",
    ),
    "no processor": (
        VIT + "vit data.processor=null",
        "data.size=null: images of 224 × 224 pixels, and the model (model.path=vit) takes 16 × 16",
    ),
    "gray": (VIT + "gray", "model.path=gray: the model takes 1-channel images, and"),
    "any size": (TIMM + "convnext data.size=40", None),
    "timm": (
        TIMM + "vit_of_timm data.size=40",
        "data.size=40: images of 40 × 40 pixels, and the model (model.path=vit_of_timm) takes "
        "32 × 32; data.size=32 fits",
    ),
    "timm, as built": (TIMM + "vit_of_timm data.size=48 model.image_size=48", None),
    "timm, not as built": (
        TIMM + "vit_of_timm data.size=40 model.image_size=48",
        "the model (model.path=vit_of_timm) takes 48 × 48; data.size=48 fits",
    ),
    "clip": (
        VIT + "clip data.size=20",
        "data.size=20: images of 20 × 20 pixels, and the model (model.path=clip) takes 16 × 16",
    ),
    "timm, gray": (TIMM + "gray_of_timm", "model.path=gray_of_timm: the model takes 1-channel"),
}


def write_image_model(name: str) -> None:
    """The model of a case, with random weights: its folder, named as it is."""
    import timm  # pyright: ignore[reportMissingImports]

    if name in ("vit", "gray"):
        tiny_model("vit", name, "image", num_channels=3 if name == "vit" else 1)
    elif name == "clip":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        vision = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
        config = transformers.CLIPConfig(text_config=sizes, vision_config=vision)
        transformers.CLIPForImageClassification(config).save_pretrained(name)
    elif name == "vit_of_timm":
        sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 2}
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
        timm.models.save_for_hf(model, name, model_args=sizes, safe_serialization=True)
    else:
        tiny_convnext(name, in_chans=1 if name == "gray_of_timm" else 3)


@pytest.mark.parametrize(("settings", "message"), SHAPES.values(), ids=SHAPES)
def test_images_of_a_shape_that_the_model_takes(settings: str, message: str | None):
    use_torchvision()
    save_images("images", 40)
    write_image_model(settings.partition("model.path=")[2].partition(" ")[0])
    if message is None:
        plan(composed(*settings.split()))
        return
    with pytest.raises(ConfigError) as error:
        plan(composed(*settings.split()))
    assert message in str(error.value)


class ReadsItsPixels(nn.Module):
    """A model that reads numbers, which the meta device does not have; it states a size."""

    config = SimpleNamespace(image_size=16)

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(pixel_values.mean() if pixel_values.max() > 0 else pixel_values.sum())


class AroundTimm(nn.Module):
    """As transformers' TimmWrapperForImageClassification, a model of timm within another."""

    def __init__(self, size: int):
        import timm  # pyright: ignore[reportMissingImports]

        super().__init__()
        sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": size}
        self.timm_model = timm.create_model("vit_tiny_patch16_224", **sizes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.timm_model(pixel_values)


def test_images_of_other_models():
    use_torchvision()
    save_images("images", 40)
    cfg = composed(*VIT.split()[:-1], "model.path=m", "data.processor=null", "data.size=48")
    data = Images("adapt", train="images", batch_size=2, seed=0, size=48)
    with torch.device("meta"):
        reads, fits, other = ReadsItsPixels(), AroundTimm(48), AroundTimm(32)
    fit_checks.check_images(cfg, data, reads)
    fit_checks.check_images(cfg, data, fits)
    with pytest.raises(ConfigError, match=r"^data.size=48: .* takes 32 × 32; data.size=32 fits"):
        fit_checks.check_images(cfg, data, other)
