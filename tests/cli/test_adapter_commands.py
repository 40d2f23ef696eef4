"""`lora-lab spectra`, `cut` and `extract`: what they write, and what they refuse.

Independent truth: PEFT loads the folders that are written, and its model gives what the base gives
with W + the SVD-cut ΔW of numpy; PEFT's own reduce_intruder_dimension; our `adapters.load`.
Run: make test ARGS=tests/cli/test_adapter_commands.py
"""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_lab import adapters
from tests.conftest import Lab, command, only_run

Run = Callable[..., tuple[int, str]]
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def lora_lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """lora_lab("cut", …) runs the command here, and gives its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code = command(monkeypatch, *arguments)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return run


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
    sizes["num_hidden_layers"] = layers
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, vocab_size=20, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=20, tie_word_embeddings=False)).eval()


CONFIGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (llama, {}),
    "rslora": (llama, {"use_rslora": True}),
    "dora": (llama, {"use_dora": True}),
    "patterns": (llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*": 3}}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head in full": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@torch.no_grad()
def peft_folder(model: Any, **settings: Any) -> Any:
    """PEFT's model with random factors, saved in the folder `adapter`."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained("adapter")
    return adapted


def lora_layers(model: nn.Module) -> dict[str, Any]:
    layers = dict(model.named_modules())
    return {name: m for name, m in layers.items() if isinstance(m, peft.tuners.lora.LoraLayer)}


def nearest(matrix: Tensor, k: int) -> Tensor:
    U, S, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :k] * S[:k]) @ Vh[:k])


def loaded(model: nn.Module, folder: str) -> Any:
    return peft.PeftModel.from_pretrained(model, folder).eval()  # pyright: ignore


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_peft_loads_a_cut_that_is_w_plus_the_cut_update(lora_lab: Run, name: str):
    make, settings = CONFIGS[name]
    adapted = peft_folder(make(), **settings).eval()
    code, printed = lora_lab("cut", "adapter", "--rank", "2", "--to", "small")
    assert code == 0, printed
    # Each layer's B A is replaced by its nearest matrix of rank 2 in PEFT's own model.
    for module in lora_layers(adapted).values():
        if "default" in module.lora_embedding_A:
            A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        product, r = nearest(B @ A, 2), len(A)
        U, S, Vh = torch.linalg.svd(product)
        B.data.copy_((U[:, :r] * S[:r]).float())
        A.data.copy_(Vh[:r].float())
    small = loaded(make(), "small")
    torch.testing.assert_close(small(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-5, atol=1e-5)
    for key, tensor in load_file("small/adapter_model.safetensors").items():
        if "lora_A" in key or "lora_embedding_A" in key:
            assert len(tensor) == 2
    before, after = (
        sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for folder in ("adapter", "small")
    )
    assert f"bytes    {before:,} → {after:,}" in printed


@torch.no_grad()
def test_energy_gives_each_site_its_rank(lora_lab: Run):
    adapted = peft_folder(llama())
    assert lora_lab("cut", "adapter", "--energy", ".8", "--to", "small")[0] == 0
    with open("small/sites.csv") as file:
        rows = {row["site"]: row for row in csv.DictReader(file)}
    ranks = set()
    for name, module in lora_layers(adapted).items():
        sigma = np.linalg.svd(module.get_delta_weight("default"), compute_uv=False)
        share = np.cumsum(sigma**2) / np.sum(sigma**2)
        k = 1 + int(np.sum(share < 0.8))
        ranks.add(k)
        row = rows[name.removeprefix("base_model.model.")]
        assert row["rank"] == (f"4 → {k}" if k < 4 else "4")
        assert abs(float(row["kept"].rstrip("%")) / 100 - share[k - 1]) < 1e-4
    assert len(ranks) > 1
    loaded(llama(), "small")(TOKENS)


def test_intruders_are_scaled_as_peft_scales_them(lora_lab: Run):
    adapted = peft_folder(llama()).eval()
    save_file({k: v.clone() for k, v in llama().state_dict().items()}, "base.safetensors")
    arguments = ["--scale-intruders", "0.25", "--base", "base.safetensors", "--to", "mild"]
    code, printed = lora_lab("cut", "adapter", *arguments)
    assert code == 0, printed
    reduce_intruder_dimension(adapted, mitigation_lambda=0.25, logging_sink=None)
    mild = loaded(llama(), "mild")
    ours = lora_layers(mild)
    for name, module in lora_layers(adapted).items():
        theirs = module.get_delta_weight("intruder_reduced")
        delta = ours[name].get_delta_weight("default")
        torch.testing.assert_close(delta, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "pissa", "lora_xs", "dora", "lora_fa", "rslora"])
def test_a_runs_adapter_is_cut_and_loads(lab: Lab, lora_lab: Run, adapter: str):
    assert lab("shift", "adapter.r=4", f"adapter={adapter}") == 0
    run = only_run().path
    code, printed = lora_lab("cut", str(run), "--rank", "1", "--to", "small")
    assert code == 0, printed
    (base,) = Path("bases").glob("*.safetensors")
    deltas = []
    for folder in (run / "adapter", Path("small")):
        model = nn.ModuleDict({"linear": nn.Linear(12, 9, bias="linear.bias" in load_file(base))})
        model.load_state_dict(load_file(base))
        adapters.load(model, folder)
        (attached,) = adapters.attached(model).values()
        A, B = attached.factors()
        deltas.append((attached.scale * B @ A).detach())
    assert np.linalg.matrix_rank(deltas[1].numpy(), tol=1e-5) == 1
    torch.testing.assert_close(deltas[1].double(), nearest(deltas[0], 1), rtol=1e-4, atol=1e-5)


def test_advice_is_that_of_the_run(lab: Lab, lora_lab: Run):
    assert lab("digits", "adapter.r=4") == 0
    run = only_run().path
    if not (run / "advice.yaml").exists():
        pytest.skip("ΔW gained nothing")
    ranks = yaml.safe_load((run / "advice.yaml").read_text())["adapter"]["rank_pattern"]
    code, printed = lora_lab("cut", str(run), "--advice", "--to", "small")
    assert code == 0, printed
    tensors = load_file("small/adapter.safetensors")
    assert {key[:-2]: len(t) for key, t in tensors.items() if key.endswith(".A")} == ranks


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_peft_loads_what_is_extracted(lora_lab: Run, make: Callable[[], Any]):
    before, after = make(), make()
    for parameter in after.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    before.save_pretrained("before")
    after.save_pretrained("after", max_shard_size="8KB")
    assert Path("after/model.safetensors.index.json").exists()
    code, printed = lora_lab("extract", "--before", "before", "--after", "after", "--rank", "3")
    assert code == 0, printed
    expected, held, total = make(), 0.0, 0.0
    for name, module in expected.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            change = after.get_parameter(key) - parameter
            total += change.square().sum().item()
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and change.dim() == 2:
                cut = nearest(change, 3)
                held += cut.square().sum().item()
                parameter.add_(cut)
    theirs = loaded(make(), "extracted")
    torch.testing.assert_close(theirs(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert f"{held / total:.2%} of ‖W − W₀‖² over all" in printed
    assert "of one dimension, with the norm of their change" in printed


@torch.no_grad()
def test_what_an_adapter_cannot_hold_is_said(lora_lab: Run):
    before: dict[str, Tensor] = {
        "fc.weight": torch.zeros(6, 4),
        "tok_embeddings.weight": torch.zeros(9, 4),
        "conv.weight": torch.zeros(6, 4, 3),
        "experts": torch.zeros(2, 4, 4),
    }
    after = {key: torch.randn_like(tensor) for key, tensor in before.items()}
    save_file(before, "before.safetensors")
    save_file(after, "after.safetensors")
    given = ["--before", "before.safetensors", "--after", "after.safetensors"]
    code, printed = lora_lab("extract", *given, "--energy", "1")
    assert code == 0, printed
    assert "not held experts: it is no layer's `weight`" in printed
    assert "layers are told by their names" in printed
    tensors = load_file("extracted/adapter_model.safetensors")
    prefix = "base_model.model."
    A, B = (tensors[f"{prefix}tok_embeddings.lora_embedding_{part}"] for part in "AB")
    torch.testing.assert_close((B @ A).T, after["tok_embeddings.weight"])
    A, B = (tensors[f"{prefix}conv.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(B.flatten(1) @ A.flatten(1), after["conv.weight"].flatten(1))


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
    # Itself, under another path: all directions are shared.
    Path("copy").symlink_to("adapter")
    assert lora_lab("spectra", "adapter", "copy")[0] == 2
    Path("adapter").rename("first")
    for folder in ("other", "adapter"):
        peft_folder(llama(), target_modules=["q_proj"])
        Path("adapter").rename(folder)
    code, printed = lora_lab("spectra", "adapter", "other", "--to", "pairs")
    assert code == 0, printed
    assert "adapter 1: adapter\nadapter 2: other" in printed
    assert all((Path("pairs") / name).exists() for name in ("pairs.csv", "phi.npz", "index.html"))


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
    "spectra base": "base holds no adapter: PEFT's folders have adapter_config.json",
    "spectra damaged.safetensors": "no tensors can be read from damaged.safetensors",
    "spectra adapter --base adapter/adapter_config.json": "is no .safetensors file",
    "spectra --before base --after adapter": "share no key",
    "cut adapter": "give one of --rank, --energy, --advice and --scale-intruders",
    "cut adapter --rank 2 --energy .5": "give one of --rank, --energy, --advice",
    "cut adapter --rank 0": "argument --rank: 0 must be at least 1",
    "cut adapter --rank 4": "--rank 4: must be less than the adapter's rank, which is 4 at most",
    "cut adapter --energy 1.5": "argument --energy: 1.5 must be more than 0 and at most 1",
    "cut adapter --rank 2 --to base": "--to base is not empty: give a new folder",
    "cut adapter --advice": "--advice: adapter has no advice.yaml; only a run has one",
    "cut adapter --scale-intruders 2 --base base": "2 must be at least 0 and less than 1",
    "cut adapter --scale-intruders .5": "--scale-intruders and --base go together",
    "cut adapter --scale-intruders .5 --base wrong.safetensors": "has no weight of the shape of",
    "cut wrong.safetensors --rank 1": "wrong.safetensors is no folder of PEFT or ours",
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
