"""Adapters saved and loaded, and what is said of files that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab import adapters
from tests.adapters.cases import CASES, Case, every_case, the_adapter


@every_case
def test_saved_and_loaded_is_the_same(case: Case, tmp_path: Path):
    model, x = case.build(), case.input()
    the_adapter(model).dropout = 0.25
    model.eval()
    adapters.save(model, tmp_path)
    fresh = case.build().eval()
    adapters.detach(fresh)
    adapters.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    ours, theirs = the_adapter(fresh), the_adapter(model)
    for name in ("r", "alpha", "scale", "dropout", "init"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        "site.lora.A",
        "site.lora.B",
    }


def test_only_what_trains_is_stored(tmp_path: Path):
    model = CASES[0].build()
    adapters.merge(model)
    adapters.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter.safetensors")) == {"site.lora.A", "site.lora.B"}
    about = json.loads((tmp_path / "adapter.json").read_text())
    adapters.unmerge(model)
    assert about["base"] == adapters.weights_hash(adapters.base_state_dict(model))


def saved(tmp_path: Path) -> Any:
    model = CASES[0].build()
    adapters.save(model, tmp_path)
    adapters.detach(model)
    return model


def test_another_base_is_an_error(tmp_path: Path):
    model = saved(tmp_path)
    with torch.no_grad():
        model.site.weight[0, 0] += 1e-6
    with pytest.raises(adapters.AdapterError, match="belongs to another base"):
        adapters.load(model, tmp_path)
    assert not adapters.attached(model)


def edit(tmp_path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(tmp_path / "adapter.safetensors"), **changes}
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"site.lora.A": None}, "no tensors site.lora.A and site.lora.B"),
        ({"site.lora.C": torch.zeros(1)}, "unknown tensor site.lora.C"),
        ({"site.lora.A": torch.zeros(2, 3)}, r"site.lora.A \[2, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, changes: dict, says: str):
    model = saved(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(adapters.AdapterError, match=says):
        adapters.load(model, tmp_path)
    assert not adapters.attached(model)


def test_no_files_are_an_error(tmp_path: Path):
    with pytest.raises(adapters.AdapterError, match="no adapter can be read from"):
        adapters.load(CASES[0].build(), tmp_path / "nowhere")


def test_a_file_cut_short_is_an_error(tmp_path: Path):
    model = saved(tmp_path)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(adapters.AdapterError, match="no adapter can be read from"):
        adapters.load(model, tmp_path)


def test_weights_hash_sees_names_shapes_types_and_bits():
    state = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    same = {"n": torch.tensor(3), "a": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert adapters.weights_hash(state) == adapters.weights_hash(same)
    for other in (
        {**state, "a": state["a"].view(3, 2)},
        {**state, "a": state["a"].double()},
        {**state, "a": -state["a"]},
        {"b": state["a"], "n": state["n"]},
    ):
        assert adapters.weights_hash(other) != adapters.weights_hash(state)
