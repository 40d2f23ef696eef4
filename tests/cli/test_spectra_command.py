"""`lora-lab spectra`: what it writes; and what it, `cut` and `extract` refuse.

Independent truth: numpy's SVD of PEFT's own ΔW, and of W − W₀.
Run: make test ARGS=tests/cli/test_spectra_command.py
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.cli.peft_folders import llama, peft_folder
from tests.conftest import Lab, only_run


def test_spectra_writes_its_report_and_names_few_sites(lora_lab: Run):
    adapted = peft_folder(llama(11), target_modules=["q_proj", "up_proj"])
    llama(11).save_pretrained("base")
    code, printed = lora_lab("spectra", "adapter", "--base", "base")
    assert code == 0, printed
    names = ("table.md", "spectra.csv", "spectra.npz", "spectrum.png", "sites.pdf", "index.html")
    assert all((Path("spectra") / name).exists() for name in names)
    assert "… and 10 sites more" in printed
    with open("spectra/spectra.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22
    assert "amplification" in rows[0]
    layers = [int(row["site"].split(".")[2]) for row in rows]
    assert layers == sorted(layers)
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    sigma = np.linalg.svd(layer.get_delta_weight("default").detach(), compute_uv=False)
    arrays = np.load("spectra/spectra.npz")
    stored = arrays["model.layers.1.mlp.up_proj/singular_values"]
    np.testing.assert_allclose(stored, sigma[:4], rtol=1e-5)


@pytest.mark.slow
def test_phi_of_three_adapters(lora_lab: Run):
    directions, kinds = {}, {"a": {}, "al": {"use_dora": True}, "b": {"r": 3}}
    for name, settings in kinds.items():
        adapted = peft_folder(llama(), target_modules=["q_proj"], **settings)
        layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        U, sigma, Vh = np.linalg.svd(product.detach().double().numpy())
        r = np.sum(sigma > 1e-6)
        directions[name] = {"output": U[:, :r], "input": Vh[:r].T}
        Path("adapter").rename(name)
    code, printed = lora_lab("spectra", "a", "al", "b", "--to", "pairs")
    assert code == 0, printed
    assert "adapter 1: a\nadapter 2: al\nadapter 3: b\nal: φ is of s·B·A, without" in printed
    assert "φ is of s·B·A" in Path("pairs/index.html").read_text()
    stored = np.load("pairs/phi.npz")
    for one, other in (("a", "al"), ("a", "b"), ("al", "b")):
        for side in ("input", "output"):
            U, V = directions[one][side], directions[other][side]
            expected = [
                [
                    np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
                    for j in range(1, V.shape[1] + 1)
                ]
                for i in range(1, U.shape[1] + 1)
            ]
            phi = stored[f"{one}|{other}|model.layers.1.self_attn.q_proj|{side}"]
            np.testing.assert_allclose(phi, expected, atol=1e-8)


def test_equal_checkpoints_have_no_spectra(lora_lab: Run):
    save_file({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, "base.safetensors")
    code, printed = lora_lab(
        "spectra", "--before", "base.safetensors", "--after", "base.safetensors"
    )
    assert code == 0, printed
    assert "no matrix changed\nequal tensors, left out: 2" in printed
    assert Path("spectra/index.html").exists()


def test_a_full_fine_tune_of_ours_is_read_as_two_checkpoints(lab: Lab, lora_lab: Run):
    assert lab("shift", "adapter=full") == 0
    run, (base,) = only_run().path, Path("bases").glob("*.safetensors")
    code, printed = lora_lab("spectra", str(run), "--to", "of_run")
    assert code == 2
    assert "has no adapter: its weights were trained in full" in printed
    given = ["--before", str(base), "--after", str(run / "model")]
    assert lora_lab("spectra", *given)[0] == 0
    old, new = load_file(base), load_file(run / "model" / "model.safetensors")
    sigma = np.linalg.svd(new["linear.weight"] - old["linear.weight"], compute_uv=False)
    stored = np.load("spectra/spectra.npz")["linear.weight/singular_values"]
    np.testing.assert_allclose(stored, sigma, rtol=1e-4, atol=1e-6)


REFUSED = {
    "spectra": "give paths of adapters, or --before A --after B",
    "spectra adaptr": "there is no adaptr; nearest: adapter",
    "spectra adapter --to adapter/spectra": "lies in adapter, which is only read",
    "spectra --before base": "--before and --after go together",
    "spectra --before base --after base --base base": "--base goes with adapters",
    "spectra adapter base --base base": "--base goes with one adapter",
    "spectra adapter --base base --to base/spectra": "lies in base, which is only read",
    "spectra --before base --after adapter --to adapter/x": "lies in adapter, which is only read",
    "spectra adapter adapter/": "an adapter is compared with itself: give each of them once",
    "spectra adapter base adapter/../adapter": "an adapter is compared with itself",
    "spectra base": "base holds no adapter: PEFT's folders have adapter_config.json",
    "spectra damaged.safetensors": "no tensors can be read from damaged.safetensors",
    "spectra adapter --base adapter/adapter_config.json": "is no .safetensors file",
    "spectra --before base --after adapter": "share no key",
    "cut adapter": "give one of --rank, --energy, --advice and --scale-intruders",
    "cut adapter --rank 2 --energy .5": "give one of --rank, --energy, --advice",
    "cut adapter --rank 0": "argument --rank: 0 must be an integer of at least 1",
    "cut adapter --rank 1.5": "argument --rank: 1.5 must be an integer of at least 1",
    "cut adapter --rank 4": "--rank 4: must be at least 1 and at most 3, since the adapter's rank",
    "cut adapter --energy 1.5": "argument --energy: 1.5 must be more than 0 and at most 1",
    "cut adapter --rank 2 --to base": "--to base is not empty: give a new folder",
    "cut adapter --advice": "--advice: adapter has no advice.yaml; only a run has one",
    "cut adapter --scale-intruders 2 --base base": "2 must be at least 0 and less than 1",
    "cut adapter --energy x": "argument --energy: x must be more than 0 and at most 1",
    "cut adapter --scale-intruders .5": "--scale-intruders needs --base",
    "cut adapter --rank 2 --base base": "--base goes with --scale-intruders, or with LoHa and LoKr",
    "cut adapter --scale-intruders .5 --base base --to base/x": "lies in base, which is only read",
    "cut adapter --scale-intruders .5 --base wrong.safetensors": "has no weight of the shape of",
    "cut wrong.safetensors --rank 1": "x is no part of LoRA, LoHa or LoKr",
    "extract --before base --after base": "give one of --rank and --energy",
    "extract --before base --after base --rank 1": "no matrix changed that an adapter can hold",
    "extract --before base --after adaptr --rank 1": "there is no adaptr; nearest: adapter",
}


def test_commands_that_cannot_be_run(lora_lab: Run):
    peft_folder(llama(), target_modules=["q_proj"])
    llama().save_pretrained("base")
    save_file({"x": torch.zeros(2)}, "wrong.safetensors")
    Path("damaged.safetensors").write_bytes(b"\xff" * 20)
    before = sorted(Path().rglob("*"))
    for line, message in REFUSED.items():
        code, printed = lora_lab(*line.split())
        assert code == 2, line
        assert message in " ".join(printed.split()), line
        assert sorted(Path().rglob("*")) == before, line
