"""data=images: a model is given the pixels that its own image processor makes of an image.

Truth: the processor of transformers itself, timm's own transform, and for other sizes a processor
that was made with them. In this process transformers may have looked for torchvision before it
could be imported, and then computes by PIL; a slow test compares in a process with torchvision.
Run: make test ARGS=tests/data/test_pixels.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_lab.data.images import Images
from lora_lab.data.pixels import pixels
from tests.vision import tiny_convnext, use_torchvision

ROOT = Path(__file__).parents[2]
SQUARE = {"size": {"height": 24, "width": 24}}
CROPPED = {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squeezed": ("ViTImageProcessor", SQUARE),
    "squeezed, bicubic": ("ViTImageProcessor", {**SQUARE, "resample": 3}),
    "middle of a square": ("DeiTImageProcessor", CROPPED),
    "middle, bicubic": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 20, "width": 20}},
    ),
    "without a middle": ("DeiTImageProcessor", {**CROPPED, "do_center_crop": False}),
    "not normalized": ("ViTImageProcessor", {**SQUARE, "do_normalize": False}),
    "bytes": ("ViTImageProcessor", {**SQUARE, "do_rescale": False, "do_normalize": False}),
    "other bytes": ("ViTImageProcessor", {**SQUARE, "rescale_factor": 1 / 100}),
    "blue, green, red": (
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
    ),
    "share of the middle": (
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 24}, "crop_pct": 0.8},
    ),
    "from -1 to 1": ("EfficientNetImageProcessor", {**SQUARE, "rescale_offset": True}),
}
OF_TIMM: dict[str, dict[str, Any]] = {
    "middle": {"crop_pct": 0.8, "interpolation": "bicubic"},
    "squeezed": {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
    "with borders": {"crop_pct": 0.9, "crop_mode": "border", "mean": [0.5] * 3, "std": [0.2] * 3},
}


@pytest.fixture(autouse=True)
def torchvision() -> None:
    use_torchvision()


def images() -> list[Any]:
    """Three images of random pixels: wide, high, and smaller than a model's."""
    from PIL import Image

    numbers = np.random.default_rng(0)
    sides = ((40, 57), (61, 38), (14, 17))
    return [Image.fromarray(numbers.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]


def processor(name: str, settings: dict[str, Any]) -> Any:
    """A processor of transformers, saved as `model`."""
    import transformers

    getattr(transformers, name)(**settings).save_pretrained("model")
    return transformers.AutoImageProcessor.from_pretrained("model")


def timm_transform(settings: dict[str, Any], **given: Any) -> Any:
    """timm's transform for a model that is saved, with these settings, as `model`."""
    from timm.data import (  # pyright: ignore[reportMissingImports]
        create_transform,
        resolve_data_config,
    )

    tiny_convnext("model")
    config = json.loads(Path("model/config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 24, 24], **settings}
    Path("model/config.json").write_text(json.dumps(config))
    data_config = resolve_data_config(given, pretrained_cfg=config["pretrained_cfg"])
    return create_transform(**data_config, is_training=False)


def assert_same(actual: Any, expected: Any) -> None:
    """Within 1e-6 of the largest number, of bytes for one that does not scale them."""
    for image in images():
        whole = expected(image)
        bound = 1e-6 * max(1, float(whole.abs().max()))
        torch.testing.assert_close(actual(image), whole, atol=bound, rtol=0)


@pytest.mark.parametrize(("name", "settings"), PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_are_those_of_the_processor(name: str, settings: dict[str, Any]):
    process = processor(name, settings)
    made = pixels("model", None, None, None)
    assert_same(made.preprocess, lambda image: process(image, return_tensors="pt").pixel_values[0])


WITH_TORCHVISION = """
from tests.vision import use_torchvision
use_torchvision()
from tests.data import test_pixels
for case in test_pixels.PROCESSORS.values():
    test_pixels.test_pixels_are_those_of_the_processor(*case)
    assert test_pixels.processor(*case).backend == "torchvision"
test_pixels.test_a_random_part_is_resized_as_the_image("transformers")
"""


@pytest.mark.slow
def test_pixels_are_those_of_the_processor_with_torchvision():
    code = [sys.executable, "-c", WITH_TORCHVISION]
    subprocess.run(code, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("settings", OF_TIMM.values(), ids=OF_TIMM)
def test_pixels_are_those_of_timm(settings: dict[str, Any]):
    expected = timm_transform(settings)
    assert_same(pixels("model", None, None, None).preprocess, expected)


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
SETTINGS = {
    "size": ({"size": 32}, {"size": {"height": 37, "width": 37}}),
    "mean": ({"mean": MEAN}, {"image_mean": MEAN}),
    "all": (
        {"size": 20, "mean": MEAN, "std": STD},
        {
            **{"size": {"height": 23, "width": 23}, "crop_size": {"height": 20, "width": 20}},
            **{"image_mean": MEAN, "image_std": STD},
        },
    ),
}


@pytest.mark.parametrize(("given", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_size_mean_and_std_replace_those_of_the_processor(
    given: dict[str, Any], settings: dict[str, Any]
):
    """DeiT's resizes to 256 / 224 of what it cuts out: 37 for 32, 23 for 20."""
    crop = {"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}}
    if "size" in given:
        settings = {**CROPPED, **settings}
    process = processor("DeiTImageProcessor", {**crop, **settings, "do_normalize": True})
    processor("DeiTImageProcessor", {**crop, "do_normalize": "mean" not in given})
    made = pixels("model", **{"size": None, "mean": None, "std": None, **given})
    assert_same(made.preprocess, lambda image: process(image, return_tensors="pt").pixel_values[0])


def test_size_mean_and_std_replace_those_of_timm():
    expected = timm_transform(
        {"crop_pct": 0.8, "mean": [0.5] * 3}, input_size=(3, 20, 20), mean=MEAN, std=STD
    )
    assert_same(pixels("model", 20, MEAN, STD).preprocess, expected)


@pytest.mark.parametrize("case", [*PROCESSORS, *OF_TIMM, "none"])
def test_a_random_part_is_scaled_as_the_image(case: str):
    """Any part of an image of one color is that color."""
    from PIL import Image

    if case in PROCESSORS:
        processor(*PROCESSORS[case])
    elif case in OF_TIMM:
        timm_transform(OF_TIMM[case])
    made = pixels(None if case == "none" else "model", None, None, None)
    image = Image.new("RGB", (30, 30), (200, 100, 50))
    for augment in ("flip", "crop_flip"):
        torch.testing.assert_close(made.transform(augment)(image), made.preprocess(image))


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_random_part_is_resized_as_the_image(library: str):
    from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

    if library == "transformers":
        processor("ViTImageProcessor", {**SQUARE, "resample": 3})
    else:
        timm_transform({"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3})
    transform = pixels("model", None, None, None).transform("crop_flip")
    part = v2.RandomResizedCrop(24, interpolation=v2.InterpolationMode.BICUBIC)
    with torch.random.fork_rng(devices=[]):
        for seed in range(4):
            torch.manual_seed(seed)
            expected = v2.RandomHorizontalFlip()(part(v2.ToImage()(images()[0]))) / 127.5 - 1
            torch.manual_seed(seed)
            torch.testing.assert_close(
                transform(images()[0]), expected.as_subclass(torch.Tensor), atol=1e-6, rtol=0
            )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation: int):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from PIL import Image

    numbers = images()[0]
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    files = [f"photos/{name}/{i}.png" for name in "ab" for i in range(2)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(turned(np.asarray(numbers)))).save(file, exif=exif)
    rows = {"image": files, "label": [file.split("/")[1] for file in files]}
    Dataset.from_dict(
        rows, Features({"image": ImageColumn(), "label": Value("string")})
    ).to_parquet("rows.parquet")
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"image": f, "label": f.split("/")[1]}) + "\n" for f in files)
    )
    expected = pixels(None, 10, None, None).preprocess(numbers)
    for train in ("photos", "rows.parquet", "rows.jsonl"):
        data = Images("adapt", train=train, val=train, size=10, batch_size=2, seed=0)
        data.setup("fit")
        assert torch.equal(data.train[slice(0, 1)][0]["pixel_values"][0], expected)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "sizes": (
        "ViTImageProcessor",
        {"do_resize": False},
        {},
        r"^processor=model: ViT\w* makes images of several sizes, .*; data.processor=null data.si",
    ),
    "not square": (
        "ViTImageProcessor",
        {"size": {"height": 24, "width": 12}},
        {"size": 12},
        r"^processor=model: ViT\w* makes 24 × 12 pixels with data.size=12; data.size=null fits",
    ),
    "no mean": (
        "MobileViTImageProcessor",
        {},
        {"mean": MEAN},
        r"^processor=model: MobileViT\w* takes no mean and std; data.mean=null data.std=null",
    ),
}


@pytest.mark.parametrize(("name", "settings", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_processor_cannot_do(
    name: str, settings: dict[str, Any], given: dict[str, Any], message: str
):
    processor(name, settings)
    with pytest.raises(ValueError, match=message):
        pixels("model", **{"size": None, "mean": None, "std": None, **given})


def test_images_that_have_their_size_are_resized_on_request():
    processor("ViTImageProcessor", {**SQUARE, "do_resize": False})
    assert pixels("model", 12, None, None).shape == (3, 12, 12)


def test_a_processor_of_no_known_kind_is_an_error():
    Path("model").mkdir()
    Path("model/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"processor=model: .*image_processor_type"):
        pixels("model", None, None, None)
