"""Images with a class each: a folder of classes, or a table with a column of images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from os import cpu_count
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from lora_lab.adapters.model_call import Inputs
from lora_lab.data import columns
from lora_lab.data.module import Phase
from lora_lab.data.pixels import pixels
from lora_lab.data.sources import Source
from lora_lab.data.tables import TableData
from lora_lab.seeding import generator


class Images(TableData):
    """Classification of images, read as `TableData` says, decoded and transformed batch by batch.

    A source is a folder with a folder of images for each class (or such a folder for each split),
    or a table: `image` names its column of images or of their paths, `label` that of the classes.
    The image processor of a model, at the folder or id `processor`, makes of each image what the
    model is given; `size`, `mean` and `std` replace its own, as `pixels` says. `augment` changes
    training images: `flip` mirrors half of them, `crop_flip` cuts a part of random size and shape
    out, in place of the processor's, and mirrors half; both are drawn anew by (seed, epoch, row).
    Images are turned as their EXIF orientation says. `input`: a model of transformers is given
    `pixel_values`, one of timm a tensor.
    """

    task = "classification"
    path_arguments = ("train", "val", "test", "base", "processor")

    def __init__(
        self,
        phase: Phase,
        image: str = "image",
        label: str = "label",
        classes: list[str | int] | None = None,
        size: PositiveInt | None = None,
        mean: list[float] | None = None,
        std: list[PositiveFloat] | None = None,
        processor: str | None = None,
        augment: Literal["none", "flip", "crop_flip"] = "none",
        input: Literal["pixel_values", "tensor"] = "pixel_values",
        **table: Any,
    ):
        if find_spec("torchvision") is None:
            raise ValueError("images: needs torchvision, pip install 'lora_lab[images]'")
        super().__init__(phase, **table)
        self.image, self.label, self.augment, self.input = image, label, augment, input
        self.pixels = pixels(processor, size, mean, std)
        self.listed = classes is not None
        names = None if classes is None else tuple(classes)
        self.class_names = columns.class_names(self.sources["train"].table(), label, names)
        """The classes in the order of the model's outputs."""
        for source in self.sources.values():
            source.table().check_column("image", image)
            _targets(source, label, self.class_names, self.listed)
        self.check_chosen()

    @property
    def heads(self) -> tuple[str, ...]:
        """The kind of model that takes such inputs."""
        return ("image" if self.input == "pixel_values" else "timm",)

    @property
    def heads_because(self) -> str:
        """The kind of inputs, which decides on the model."""
        return f" data.input={self.input}"

    @property
    def sizes(self) -> dict[str, int]:
        """An output for each class."""
        return {"out_features": len(self.class_names)}

    def rows(self, source: Source, numbers: Tensor, split: str) -> "ImageRows":
        """Images (B, 3, height, width), and their classes (B,)."""
        augment = self.augment if split == "train" else "none"
        transform = self.pixels.transform(augment)
        key = None if augment == "none" else (self.seed, self.phase, "augment")
        targets = _targets(source, self.label, self.class_names, self.listed)
        return ImageRows(source, self.image, targets, numbers, transform, key, self.input)


@lru_cache(maxsize=8)
def _targets(source: Source, label: str, classes: tuple[str, ...], listed: bool) -> Tensor:
    return columns.class_indices(source.table(), label, classes, listed)


def model_inputs(images: Tensor, input: str) -> Inputs:
    """Images (B, 3, height, width) as the model is called with them. `input` is data.input."""
    return {"pixel_values": images} if input == "pixel_values" else images


class ImageRows:
    """Images of a source, read when a batch asks for them by its row numbers.

    With `key`, the transform draws from a stream that is a function of (*key, epoch, row).
    """

    def __init__(
        self,
        source: Source,
        column: str,
        targets: Tensor,
        rows: Tensor,
        transform: Callable[[Any], Tensor],
        key: tuple | None,
        input: str,
    ):
        self.source, self.column, self.targets, self.rows = source, column, targets, rows
        self.transform, self.key, self.input = transform, key, input
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> tuple[Any, Tensor]:
        """The images (B, 3, height, width) as the model takes them, and the classes (B,)."""
        rows = self.rows[index]
        # Decoding lets other threads run. Transforms draw from torch's global stream, which is
        # seeded for each image in one thread, and put back as it was.
        with ThreadPoolExecutor(min(8, cpu_count() or 1)) as threads:
            images = list(threads.map(self._decoded, rows.tolist()))
        with torch.random.fork_rng(devices=[]):
            pixels = [
                self._transformed(image, row)
                for image, row in zip(images, rows.tolist(), strict=True)
            ]
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, 1, 1)
        return model_inputs(stacked, self.input), self.targets[rows]

    def _decoded(self, row: int) -> Any:
        """An image in RGB, upright. Raises ValueError, with its place, where it cannot be read."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        table = self.source.table()
        image: Any = None
        try:
            image = table.rows[row][self.column]
            if isinstance(image, str):
                folder = table.files[0].parent if table.files else Path()
                with Image.open(folder / image) as opened:
                    return ImageOps.exif_transpose(opened).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, UnidentifiedImageError, AttributeError, SyntaxError) as error:
            shown = f" {image}" if isinstance(image, str) else ""
            raise ValueError(
                f"{table.where(row)}:{shown} is no image to be read ({error})"
            ) from None

    def _transformed(self, image: Any, row: int) -> Tensor:
        if self.key is not None:
            # Not torch.manual_seed, which seeds the streams of GPUs too.
            torch.default_generator.manual_seed(
                generator(*self.key, self.epoch, row).initial_seed()
            )
        return self.transform(image)
