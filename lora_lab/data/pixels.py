"""What a model is given of an image: the pixels that its own image processor makes of it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab.config.errors import first_line

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, which most models were trained with."""

Three = Sequence[float] | None
"""A number for each of red, green and blue."""


@dataclass(frozen=True)
class Pixels:
    """The transforms of an image into a tensor (3, height, width), as a model takes it.

    `preprocess` takes an image (PIL, RGB) as it is. `normalize` takes a tensor of bytes that has
    its height and width already, and changes its numbers alone. `resample` says how the pixels of
    another size are computed: torchvision's word, or PIL's number.
    """

    preprocess: Callable[[Any], Tensor]
    normalize: Callable[[Any], Tensor]
    resample: str | int = "bilinear"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each image's tensor: (3, height, width)."""
        return tuple(self.preprocess(_image(64, 48)).shape)

    def transform(self, augment: str) -> Callable[[Any], Tensor]:
        """The transform of an image that is augmented as data.augment says."""
        from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

        if augment == "none":
            return self.preprocess
        cut = [self.preprocess]
        if augment == "crop_flip":
            word = isinstance(self.resample, str)
            resample = v2.InterpolationMode(self.resample) if word else self.resample
            part = v2.RandomResizedCrop(self.shape[1:], interpolation=resample)
            cut = [v2.ToImage(), part, self.normalize]
        return v2.Compose([*cut, v2.RandomHorizontalFlip()])


def pixels(processor: str | None, size: int | None, mean: Three, std: Three) -> Pixels:
    """What the image processor of a model (its folder or hub id) makes of images.

    `size`, `mean` and `std` replace its own; with `size`, it cuts the same part out of an image.
    Without a processor, the shorter side becomes `size` (None: 224) pixels, the middle is cut out,
    and `mean` and `std` are ImageNet's. Raises ValueError, `argument=value: rule`.
    """
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and len(value) != 3:
            raise ValueError(f"{name}={value}: must be three numbers, of red, green and blue")
    library, of_timm = _stored(processor) if processor is not None else (None, {})
    if library == "transformers":
        return _of_transformers(str(processor), size, mean, std)
    if library == "timm":
        return _of_timm(str(processor), of_timm, size, mean, std)
    return _of_torchvision(size or 224, mean or IMAGENET[0], std or IMAGENET[1])


def _stored(processor: str) -> tuple[str | None, dict[str, Any]]:
    """The library of the image processor at a path, if any, and timm's config.json."""
    from transformers import ImageProcessingMixin

    if Path(processor).is_file():
        return None, {}  # a file of weights
    read = ImageProcessingMixin.get_image_processor_dict
    try:
        read(processor)
        return "transformers", {}
    except OSError as error:
        if "couldn't connect" in str(error):
            return None, {}  # a second look would wait as long for the hub as this one did
    with suppress(OSError):
        config = read(processor, image_processor_filename="config.json")[0]
        if "architecture" in config:
            return "timm", config.get("pretrained_cfg", config)
    return None, {}


def _of_torchvision(size: int, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

    normalize = _normalize(mean, std)
    return Pixels(
        v2.Compose([v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), normalize]), normalize
    )


def _normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
    """The transform of bytes into numbers from 0 to 1, normalized by mean and std."""
    from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]

    from_bytes = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([from_bytes, v2.Normalize(list(mean), list(std))])


def _of_timm(
    processor: str, stored: dict[str, Any], size: int | None, mean: Three, std: Three
) -> Pixels:
    """timm's transform of validation images, which resizes by PIL."""
    if find_spec("timm") is None:
        raise ValueError(f"processor={processor}: needs timm, pip install 'lora_lab[images]'")
    from timm import data  # pyright: ignore[reportMissingImports]

    given = {"mean": mean, "std": std, "input_size": size and (3, size, size)}
    config = data.resolve_data_config(given, pretrained_cfg=stored)
    normalize = _normalize(config["mean"], config["std"])
    return Pixels(data.create_transform(**config), normalize, config["interpolation"])


def _of_transformers(processor: str, size: int | None, mean: Three, std: Three) -> Pixels:
    """The processor that transformers' AutoImageProcessor gives, called image by image.

    It resizes by torchvision, or by PIL in transformers before 5: they differ by 1 or 2 of 255.
    """
    from transformers import AutoImageProcessor

    try:
        # Code that lies beside the settings is not run, nor is a user asked whether it may.
        process: Any = AutoImageProcessor.from_pretrained(processor, trust_remote_code=False)
        settings = _settings(process, size, mean, std)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ValueError(f"processor={processor}: {first_line(error)}") from None
    uncut = {**settings, "do_resize": False, "do_center_crop": False}
    preprocess, normalize = (partial(_processed, process, one) for one in (settings, uncut))
    resample = process.to_dict().get("resample")
    return Pixels(preprocess, normalize, "bilinear" if resample is None else resample)


def _processed(process: Any, settings: dict[str, Any], image: Any) -> Tensor:
    """The tensor of one image. `settings` replace the processor's own."""
    return process(image, return_tensors="pt", **settings)["pixel_values"][0]


def _settings(process: Any, size: int | None, mean: Three, std: Three) -> dict[str, Any]:
    """The settings of a processor that size, mean and std replace; None is its own.

    Raises ValueError where its images are not of one size, or where it does not take a value.
    """
    stored, name = process.to_dict(), type(process).__name__
    given = {"image_mean": mean, "image_std": std}
    settings: dict[str, Any] = {key: list(value) for key, value in given.items() if value}
    if settings:
        settings["do_normalize"] = True
    if size is not None:
        settings["do_resize"] = True
        # DeiT's processor resizes to 256 and cuts out 224 × 224: for 32 × 32 it resizes to 37, the
        # rounded 256 · 32 / 224.
        side = _processed(process, settings, _image(64, 48)).shape[-1]
        settings |= {
            key: {edge: round(length * size / side) for edge, length in stored[key].items()}
            for key in ("size", "crop_size")
            if stored.get(key)
        }
    one, other = (_processed(process, settings, _image(*sides)) for sides in ((64, 48), (40, 90)))
    if one.ndim != 3 or one.shape != other.shape:
        raise ValueError(
            f"{name} makes images of several sizes, and a batch needs one; data.processor=null "
            "data.size=224 makes them of one"
        )
    if size is not None and one.shape[1:] != (size, size):
        height, width = one.shape[1:]
        raise ValueError(
            f"{name} makes {height} × {width} pixels with data.size={size}; data.size=null fits"
        )
    if settings.get("do_normalize"):
        shifted = {**settings, "image_mean": [9.0] * 3}
        if torch.equal(one, _processed(process, shifted, _image(64, 48))):
            raise ValueError(f"{name} takes no mean and std; data.mean=null data.std=null")
    return settings


def _image(width: int, height: int) -> Any:
    """An image of one color, that no processor makes zeros of."""
    from PIL import Image

    return Image.new("RGB", (width, height), (90, 120, 150))
