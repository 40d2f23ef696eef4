"""data=images: what is made of an image, what is drawn, and which inputs are refused.

Truth: images of a color a half, whose pixels are known.
Run: make test ARGS=tests/data/test_images.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.data.images import Images
from lora_lab.data.pixels import IMAGENET
from tests.vision import use_torchvision

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torchvision()
    monkeypatch.setenv("LORA_LAB_CACHE", str(Path("cache").absolute()))
    for i, name in enumerate(("cat", "dog", "cat", "dog")):
        save_image(f"train/{name}/{i}.png", 10 + 40 * i)
    save_image("val/dog/0.png", 7)


def save_image(path: str, green: int) -> None:
    """40 × 20 pixels: the left half red, the right half blue, with some green."""
    from PIL import Image

    image = Image.new("RGB", (40, 20), (255, green, 0))
    image.paste((0, green, 255), (20, 0, 40, 20))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def ready(**change: Any) -> Images:
    settings = {"train": "train", "val": "val", "phase": "adapt", "size": 10}
    data = Images(**{**settings, "batch_size": 2, "seed": 0, **change})
    data.setup("fit")
    return data


def pixels(green: int, mirrored: bool = False) -> torch.Tensor:
    """The image of `save_image` at 10 × 10, normalized by hand: (3, 10, 10)."""
    left, right = (255, green, 0), (0, green, 255)
    colors = [right, left] if mirrored else [left, right]
    mean, std = IMAGENET
    image = torch.empty(3, 10, 10)
    for half, color in enumerate(colors):
        for channel in range(3):
            value = (color[channel] / 255 - mean[channel]) / std[channel]
            image[channel, :, 5 * half : 5 * half + 5] = value
    return image


def test_images_are_resized_cut_and_normalized():
    data = ready()
    assert data.class_names == ("cat", "dog")
    inputs, targets = data.train[slice(0, 4)]
    assert targets.tolist() == [0, 0, 1, 1]
    for image, green in zip(inputs["pixel_values"], (10, 90, 50, 130), strict=True):
        assert image.shape == (3, 10, 10)
        edges = [0, 1, 2, 3, 6, 7, 8, 9]  # the two columns between the halves are mixed
        torch.testing.assert_close(
            image[:, :, edges], pixels(green)[:, :, edges], atol=0.02, rtol=0
        )
    (inputs, targets), *_ = data.val_dataloader()
    assert targets.tolist() == [1]
    assert ready(input="tensor").train[torch.tensor([1])][0].shape == (1, 3, 10, 10)


def test_flips_are_drawn_by_seed_epoch_and_row():
    data = ready(augment="flip")
    loader = data.train_dataloader()

    def flipped(epoch: int, rows: torch.Tensor) -> list[bool]:
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        return [bool(image[2, 0, 0] > 0) for image in data.train[rows][0]["pixel_values"]]

    before = torch.get_rng_state()
    by_epoch = [flipped(epoch, torch.arange(4)) for epoch in range(50)]
    assert torch.equal(torch.get_rng_state(), before)
    assert by_epoch == [flipped(epoch, torch.arange(4)) for epoch in range(50)]
    assert flipped(3, torch.tensor([2, 0])) == [by_epoch[3][2], by_epoch[3][0]]
    assert any(len(set(row)) == 2 for row in by_epoch)
    share = sum(map(sum, by_epoch)) / 200
    assert abs(share - 0.5) < 4 * (0.25 / 200) ** 0.5


def test_crops_are_drawn_for_training_only():
    data = ready(augment="crop_flip", val="train")
    first = data.train[slice(0, 4)][0]["pixel_values"]
    data.train_dataloader().sampler.set_epoch(1)  # pyright: ignore
    assert first.shape == (4, 3, 10, 10)
    assert not torch.equal(first, data.train[slice(0, 4)][0]["pixel_values"])
    assert torch.equal(
        data.val[slice(0, 4)][0]["pixel_values"], ready().train[slice(0, 4)][0]["pixel_values"]
    )


def test_tables_have_images_or_their_paths():
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    expected = ready().train[slice(0, 4)]
    files = [f"train/{name}.png" for name in ("cat/0", "cat/2", "dog/1", "dog/3")]
    rows = [{"image": f, "label": f.split("/")[1]} for f in files]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = Features({"photo": ImageColumn(), "label": ClassLabel(names=["cat", "dog"])})
    Dataset.from_dict({"photo": files, "label": [0, 0, 1, 1]}, features).save_to_disk("saved")
    for settings in (
        {"train": "rows.jsonl"},
        {"train": "saved", "image": "photo", "val": None, "val_share": 0.25},
    ):
        data = ready(**settings)
        numbers = data.train.rows
        inputs, targets = data.train[slice(0, 4)]
        assert torch.equal(inputs["pixel_values"], expected[0]["pixel_values"][numbers])
        assert torch.equal(targets, expected[1][numbers])


def test_a_batch_is_what_the_processor_makes_of_its_images():
    import transformers
    from PIL import Image

    transformers.CLIPImageProcessor(
        size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}
    ).save_pretrained("model")
    (inputs, _), *_ = ready(val="train", processor="model", size=None).val_dataloader()
    images = [Image.open(f"train/{name}.png") for name in ("cat/0", "cat/2", "dog/1", "dog/3")]
    process = transformers.AutoImageProcessor.from_pretrained("model")
    assert torch.equal(inputs["pixel_values"], process(images, return_tensors="pt")["pixel_values"])


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing folder": ({"train": "trian"}, r"train=trian: .*"),
    "no images": ({"train": "none"}, r"train=none: no files of rows"),
    "one class": ({"train": "val"}, r"label=label: all rows of train=val are 'dog'"),
    "new in validation": (
        {"val": "other"},
        r"val=other, row 1: 'label' is 'dgo', .* of training .*: dog",
    ),
    "missing column": ({"image": "img"}, r"image=img: train=train has no such column .*: image"),
    "empty image": ({"train": "empty"}, r"train=empty: 0.png is empty"),
    "two means": ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\]: must be three numbers"),
    "no split": (
        {"train": "splits:trian"},
        r"train=splits:trian: has no split trian .*nearest: train",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_errors(change: dict[str, Any], message: str):
    save_image("other/dgo/0.png", 1)
    save_image("splits/train/dog/0.png", 1)
    for path in ("none/a.md", "empty/cat/0.png"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text("x" if "none" in path else "")
    with pytest.raises(ValueError, match=message):
        ready(**change)


def test_a_broken_image_is_named():
    Path("train/dog/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train=train, row 3: .*dog/1.png is no image to be read"):
        ready().train[slice(0, 4)]
