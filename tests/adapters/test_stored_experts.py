"""Experts in adapter folders that are read, measured and cut without a model.

The truth is ΔW of the model that wrote the folder, its SVD by torch, and PEFT's reading of folders.

Run: make test ARGS=tests/adapters/test_stored_experts.py
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError
from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.peft import load_peft, save_peft
from lora_lab.adapters.peft_parameters import key_of_path
from lora_lab.adapters.stored import read_adapter, read_updates
from lora_lab.analysis.cut import cut_adapter, cut_update
from lora_lab.cli.update_spectra import of_adapter
from tests.adapters import zoo
from tests.adapters.test_experts import moved
from tests.adapters.test_peft_experts import EVERY, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

FORMATS = {"ours": (adapters.save, adapters.load), "PEFT": (save_peft, load_peft)}


def matrices(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """ΔW and W of each matrix, out × in, by name."""
    found = {}
    for site, adapter in adapters.attached(model).items():
        path = site.rpartition(".")[0] if adapter.kind in ("experts", "weight") else site
        weight = adapter.weight_of(model.get_submodule(path))
        parts = [adapter.weight_to_matrix(W).detach() for W in (adapter.delta(weight), weight)]
        if adapter.kind == "experts":
            found |= {f"{site}.{e}": pair for e, pair in enumerate(zip(*parts, strict=True))}
        else:
            found[site.removesuffix(".weight")] = parts
    return found


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("form", FORMATS)
def test_each_experts_update_and_weight_are_read(name: str, form: str, tmp_path: Path):
    base, _ = zoo.build(name)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model, weights = moved(base, EVERY), Checkpoint(tmp_path / "base.safetensors")
    FORMATS[form][0](model, tmp_path / "adapter")
    expected = matrices(model)
    updates = {n.removesuffix(".weight"): u for n, u in read_updates(tmp_path / "adapter").items()}
    assert updates.keys() == expected.keys()
    for matrix, (delta, W) in expected.items():
        update = updates[matrix]
        torch.testing.assert_close(update.delta(W), delta, rtol=1e-6, atol=1e-8)
        stored = weights.matrix(matrix, update)
        assert stored is not None
        assert torch.equal(stored, W)
    assert updates["model.layers.1.mlp.experts.down_proj.3"].r == 2


@pytest.mark.parametrize(("form", "name"), [("ours", "deepseek_v3"), ("PEFT", "gpt_oss")])
def test_a_cut_gives_all_experts_of_a_site_one_rank(form: str, name: str, tmp_path: Path):
    base, inputs = zoo.build(name)
    model: Any = moved(copy.deepcopy(base), EVERY, r=3)
    (down,) = (
        a for s, a in adapters.attached(model).items() if s.endswith(".1.mlp.experts.down_proj")
    )
    down.B.data[:, :, 2] = 0  # of rank 2, and one of the experts of rank 1
    down.B.data[1, :, 1] = 0
    save, load = FORMATS[form]
    save(model, tmp_path / "before")
    energy = 1 - 1e-9
    sites = cut_adapter(
        read_adapter(tmp_path / "before"),
        tmp_path / "after",
        lambda n, u: cut_update(n, u, lambda _, spectrum: spectrum.energy_rank(energy)),
    )
    cut = sites["model.layers.1.mlp.experts.down_proj"]
    assert (cut.r, cut.k) == (3, 2)
    assert cut.kept == pytest.approx(1.0)
    assert sites["model.layers.1.mlp.experts.gate_up_proj"].k == 3
    twin = copy.deepcopy(base)
    load(twin, tmp_path / "after")
    torch.testing.assert_close(logits(twin, inputs), logits(model, inputs), rtol=1e-6, atol=1e-7)
    assert adapters.attached(twin)["model.layers.1.mlp.experts.down_proj"].r == 2
    if form == "PEFT":
        theirs = PeftModel.from_pretrained(base, tmp_path / "after")
        expected = logits(twin, inputs)
        torch.testing.assert_close(logits(theirs, inputs), expected, rtol=1e-6, atol=1e-8)


def test_a_cut_to_rank_1_is_the_first_triple_of_each_expert(tmp_path: Path):
    base, _ = zoo.build("mixtral")
    model = moved(base)
    expected = {name: delta for name, (delta, _) in matrices(model).items()}
    save_peft(model, tmp_path / "before")
    cut_adapter(
        read_adapter(tmp_path / "before"),
        tmp_path / "after",
        lambda n, u: cut_update(n, u, lambda *_: 1),
    )
    for name, update in read_updates(tmp_path / "after").items():
        U, S, Vh = torch.linalg.svd(expected[name])
        torch.testing.assert_close(
            update.delta(expected[name]), S[0] * U[:, :1] @ Vh[:1], rtol=1e-5, atol=1e-6
        )


def test_spectra_of_a_folder_list_each_expert(tmp_path: Path):
    base, _ = zoo.build("gpt_oss")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = moved(base)
    save_peft(model, tmp_path / "adapter")
    of_adapter(
        tmp_path / "adapter", tmp_path / "base.safetensors", tmp_path / "to", Console(quiet=True)
    )
    rows = (tmp_path / "to" / "spectra.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 4  # two parameters in two layers, of four experts
    name = "model.layers.0.mlp.experts.down_proj.3"
    (row,) = (row for row in rows if row.startswith(f"{name},"))
    delta, W = matrices(model)[name]
    relative = (torch.linalg.matrix_norm(delta) / torch.linalg.matrix_norm(W)).item()
    values = dict(zip(rows[0].split(","), row.split(","), strict=True))
    assert float(values["‖ΔW‖/‖W‖"]) == pytest.approx(relative, rel=1e-2)


def test_which_parameter_a_tensor_is_of_is_told_or_refused():
    paths = ["m.experts", "m.experts.base_layer", "m.fc"]
    names = ["experts.down_proj", "experts.up_proj"]
    assert key_of_path("m.experts", paths, names) == "m.experts.down_proj"
    assert key_of_path("m.experts.base_layer", paths, names) == "m.experts.up_proj"
    assert key_of_path("m.fc", paths, names) is None
    for other in (["experts.one", "experts.two"], ["experts.down_proj"]):
        with pytest.raises(AdapterError, match="only the model tells"):
            key_of_path("m.experts", paths, other)
    three = [*paths, "m.experts.base_layer.base_layer"]
    with pytest.raises(AdapterError, match="only the model tells"):
        key_of_path(three[-1], three, [*names, "experts.gate_proj"])
