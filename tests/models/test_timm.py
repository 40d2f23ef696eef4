"""Models of timm with their weights, from a folder or a file.

Independent truth: timm's own create_model with the same weights, and a file too large to be read.
Whole runs are compared with PEFT in tests/training/test_against_peft.py.

Run: make test ARGS=tests/models/test_timm.py
"""

import json
import struct
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_lab import adapters
from lora_lab.config.schema import ConfigError
from lora_lab.models.timm_model import load_weights, new_parameters, timm_model
from lora_lab.training.plan import plan
from lora_lab.training.pretrained_base import draw_new
from tests.config.test_conf import composed
from tests.vision import save_images, tiny_convnext, use_torchvision

HEAD = ["head.fc.weight", "head.fc.bias"]


@pytest.fixture(autouse=True)
def timm() -> Any:
    use_torchvision()
    return pytest.importorskip("timm")


def on_meta(*arguments: Any, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return timm_model(*arguments, **settings)


def assert_equal(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], *but: str):
    assert list(state) == list(reference)
    for key in state.keys() - {*but}:
        assert torch.equal(state[key], reference[key]), key


@pytest.mark.parametrize(("classes", "new"), [(5, []), (3, HEAD)])
def test_weights_are_those_that_timm_loads(timm: Any, classes: int, new: list[str]):
    tiny_convnext("model")
    reference = timm.create_model("local-dir:model", pretrained=True, num_classes=classes)
    stream = torch.get_rng_state()
    assert new_parameters(on_meta("model", out_features=classes), "model") == new
    model = load_weights("model", out_features=classes)
    assert torch.equal(stream, torch.get_rng_state())
    assert_equal(model.state_dict(), reference.state_dict(), *new)
    sites = adapters.find_sites(model, {"all": adapters.Target("linear", ["*.fc1"])})
    assert [site.name for site in sites] == [f"stages.{i}.blocks.0.mlp.fc1" for i in range(4)]
    names = new_parameters(on_meta("model", out_features=classes), "model", new_head=True)
    assert names == HEAD
    drawn = load_weights("model", out_features=classes, new_head=True)
    assert_equal(drawn.state_dict(), reference.state_dict(), *HEAD)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_weights_has_the_number_of_classes_that_its_head_has(timm: Any, suffix: str):
    saved = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    state, file = saved.state_dict(), f"weights.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save({"model": state}, file)
    settings: dict[str, Any] = {"name": "vit_tiny_patch16_224", "image_size": 64}
    assert new_parameters(on_meta(file, out_features=5, **settings), file, **settings) == []
    change = {"pretrained": True, "img_size": 64, "num_classes": 5}
    overlay = {"file": file, "num_classes": 5}
    reference = timm.create_model(settings["name"], pretrained_cfg_overlay=overlay, **change)
    assert reference.pos_embed.shape == (1, 17, 192)  # its vectors of 14 × 14 positions resampled
    model = load_weights(file, out_features=5, **settings)
    assert_equal(model.state_dict(), reference.state_dict())
    names = new_parameters(on_meta(file, out_features=2, **settings), file, **settings)
    assert names == ["head.weight", "head.bias"]


def test_new_parameters_are_found_without_reading_a_weight(timm: Any):
    header, end = {}, 0
    with torch.device("meta"):
        state = timm.create_model("vit_large_patch16_224").state_dict()
    for key, tensor in state.items():
        bounds = [end, end := end + 4 * tensor.numel()]
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": bounds}
    text = json.dumps(header).encode()
    with Path("large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 1.2e9  # 1.2 GB, which take no space on the disk
    before = getrusage(RUSAGE_SELF).ru_maxrss
    settings: dict[str, Any] = {"name": "vit_large_patch16_224"}
    model = on_meta("large.safetensors", out_features=2, **settings)
    names = new_parameters(model, "large.safetensors", **settings)
    assert names == ["head.weight", "head.bias"]
    assert getrusage(RUSAGE_SELF).ru_maxrss < before + 300_000  # KiB


def test_a_new_head_is_drawn_by_the_seed_alone():
    tiny_convnext("model")
    model: Any = load_weights("model", out_features=4000)
    draws = []
    for seed in (0, 0, 1, None):
        torch.rand(7)
        draws.append(draw_new(model, HEAD, seed)["head.fc.weight"])
    one, same, other, shared = draws
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, shared)
    model.reset_classifier(4000)  # timm's draw
    assert one.std().item() == pytest.approx(model.head.fc.weight.std().item(), rel=0.02)
    assert one.abs().max().item() == pytest.approx(
        model.head.fc.weight.abs().max().item(), rel=0.02
    )


def test_settings_reach_the_model():
    tiny_convnext("model")
    settings: dict[str, Any] = {"dropout": 0.3, "drop_path": 0.4, "dtype": "bfloat16"}
    model: Any = load_weights("model", gradient_checkpointing=True, **settings)
    assert model.head.drop.p == 0.3
    assert model.stages[3].blocks[0].drop_path.drop_prob == pytest.approx(0.4)
    assert model.stages[0].grad_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


BAD = {
    "folder": ({"path": "./modle"}, r"path=./modle: no such folder or file.*; nearest: ./model"),
    "name of timm": ({"path": "convnext_ato"}, "path=convnext_ato: .*; nearest: convnext_atto"),
    "hub's id": ({"path": "convnext_atto"}, "id of timm's weights .* timm/convnext_atto.d2_in1k"),
    "no config": (
        {"path": "."},
        r"path=.: the folder has no config.json.*; nearest: (model|other)",
    ),
    "no name": ({"path": "model/model.safetensors"}, "model.name says of which architecture"),
    "wrong name": (
        {"path": "model/model.safetensors", "name": "convnext_ato"},
        "name=convnext_ato: timm has no such model; nearest: convnext_atto",
    ),
    "name of a folder": ({"name": "resnet18"}, "name=resnet18: only for a file of weights"),
    "of transformers": (
        {"path": "other"},
        "path=other: its config.json has no 'architecture'.*pre",
    ),
    "image size": ({"image_size": 64}, "image_size=64: model takes no img_size"),
    "another": (
        {"path": "model/model.safetensors", "name": "resnet18"},
        "path=model/.*: its weights are not those of resnet18: conv1.weight is missing, and 1",
    ),
    "other width": (
        {"path": "model/model.safetensors", "name": "convnext_atto"},
        "path=model/.*: stem.0.bias is 8 in the file, and 40 in convnext_atto|is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case: str):
    tiny_convnext("model")
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "vit"}')
    save_images("images", 20)
    change, message = BAD[case]
    settings = [f"model.{key}={value}" for key, value in {"path": "model", **change}.items()]
    images = ("data=images", "data.train=images", "data.input=tensor", "data.batch_size=2")
    with pytest.raises(ConfigError, match=f"^model.*{message}"):
        plan(composed("model=timm", "base=pretrained", "target=linear", *images, *settings))


@pytest.mark.parametrize("case", ["missing", "damaged"])
def test_bad_weights(case: str):
    tiny_convnext("model")
    file = Path("model/model.safetensors")
    if case == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    message = {"missing": "the folder has no file of weights", "damaged": "cannot be read"}
    with pytest.raises(ValueError, match=f"path=model: .*{message[case]}"):
        new_parameters(on_meta("model", out_features=2), "model")


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_lab.models.timm_model.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"path=a/b: needs timm, pip install 'lora_lab\[images\]'"):
        timm_model("a/b")
