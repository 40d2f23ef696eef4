"""The adapter of a full fine-tune, in both formats.

Independent truth: numpy's SVD of W − W₀, matrix by matrix; PEFT loads PEFT's folder, and our `load`
ours, at full rank to the weights after. Run: make test ARGS=tests/analysis/test_extract.py
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.analysis.extract import Extracted, Format, extract
from lora_lab.analysis.layers import model_of_names, sites_by_key
from lora_lab.analysis.stored_spectra import Difference
from tests.cli.peft_folders import gpt2, llama, mixtral

TOKENS = torch.arange(12).view(2, 6)
FULL = 1000


class Layers(nn.Module):
    """One layer of each kind, with what PEFT takes for another."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.fc = nn.Linear(8, 6)
        self.grouped = nn.Conv1d(6, 4, 3, groups=2, padding=1)
        self.dilated = nn.Conv1d(4, 4, 3, dilation=2, padding=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.positions = nn.Parameter(torch.randn(6, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.grouped(self.fc(self.table(tokens)).mT)
        x = self.dilated(x).mT + self.positions
        return self.attention(x, x, x)[0]


def layers() -> Any:
    torch.manual_seed(0)
    return Layers().eval()


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def tied_gpt2() -> Any:
    return gpt2(tie_word_embeddings=True)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "layers": (
        layers,
        {
            "dilated.weight": "PEFT's A is not dilated",
            "attention.in_proj_weight": "cannot adapt this weight of MultiheadAttention",
            "attention.out_proj.weight": "computes otherwise",
            "positions": "cannot adapt this weight of Layers",
        },
    ),
    "llama, tied": (tied_llama, {}),
    "gpt2, tied": (
        tied_gpt2,
        {"transformer.wte.weight": "as the table is not called embed_tokens"},
    ),
    "mixtral": (mixtral, {}),
}
"""How a model is made, and which of its weights PEFT cannot hold, with a part of the reason."""


@torch.no_grad()
def tuned(make: Callable[[], Any]) -> Any:
    """The model after a fine-tune: all of its parameters are others."""
    model = make()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    if isinstance(model, Layers):
        model.table.weight[0] = make().table.weight[0]  # no gradient reaches a padding token
    return model


def write(model: nn.Module, folder: str) -> Checkpoint:
    """The checkpoint of a model's state dict, a tied weight once."""
    state = dict(model.state_dict(keep_vars=True))
    once = {id(tensor): key for key, tensor in reversed(state.items())}
    Path(folder).mkdir()
    save_file({key: state[key].detach() for key in once.values()}, f"{folder}/model.safetensors")
    return Checkpoint(Path(folder))


def extracted(make: Callable[[], Any], format: Format, **asked: Any) -> Extracted:
    """Extracts the fine-tune of a model to the folder `adapter`."""
    difference = Difference(write(make(), "before"), write(tuned(make), "after"))
    model = make().to("meta")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return extract(difference, difference.shared, Path("adapter"), model, format, **asked)


def nearest(change: Tensor, key: str, k: int) -> Tensor:
    """The change with each of its matrices at rank k, by numpy."""
    if ".experts." in key:
        matrices = change.double().numpy()  # (E, out, in)
    elif key == "attention.in_proj_weight":
        matrices = change.double().view(3, -1, change.shape[1]).numpy()
    else:
        matrices = change.double().flatten(1)[None].numpy()
    U, S, Vh = np.linalg.svd(matrices, full_matrices=False)
    return torch.from_numpy((U[..., :k] * S[..., None, :k]) @ Vh[..., :k, :]).view(change.shape)


@torch.no_grad()
def expected(make: Callable[[], Any], k: int, not_held: dict[str, str]) -> tuple[Any, float]:
    """The base with the changes of rank k that are held, and the share of ‖W − W₀‖² in them."""
    model, after = make(), tuned(make)
    held = total = 0.0
    for key, parameter in model.named_parameters():
        change = after.get_parameter(key) - parameter
        total += change.square().sum().item()
        if change.dim() > 1 and key not in not_held:
            cut = nearest(change, key, k)
            held += cut.square().sum().item()
            parameter.add_(cut)
    return model, held / total


def output(model: Any) -> Tensor:
    result = model(TOKENS)
    return result if isinstance(result, Tensor) else result.logits


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_peft_gives_the_outputs_of_the_cut_change(name: str):
    make, reasons = MODELS[name]
    result = extracted(make, "peft", rank=2)
    assert result.not_held.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in result.not_held[key]
    model, share = expected(make, 2, reasons)
    assert result.held_energy / result.energy == pytest.approx(share, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.PeftModel.from_pretrained(make(), "adapter").eval()
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)
    ours = make()
    adapters.load_peft(ours, "adapter")
    torch.testing.assert_close(output(ours), output(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_our_load_gives_the_weights_after_at_full_rank(name: str):
    make, _ = MODELS[name]
    result = extracted(make, "lora_lab", rank=FULL)
    assert result.not_held == {}
    assert all(one.k == min(one.site.shape) for one in result.sites)
    base, model, after = make().state_dict(), make(), tuned(make).state_dict()
    adapters.load(model, "adapter")
    adapters.merge(model)
    for key, weight in model.state_dict().items():
        if "lora" not in key.split("."):
            wanted = after[key] if weight.dim() > 1 else base[key]
            torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6, msg=key)


def test_an_adapter_of_names_alone_loads_on_the_model():
    def make() -> nn.Module:
        torch.manual_seed(0)
        convs = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6, padding=1))
        return nn.Sequential(convs, nn.Flatten(), nn.Linear(54, 4)).eval()

    difference = Difference(write(make(), "before"), write(tuned(make), "after"))
    results = {
        name: extract(difference, difference.shared, Path(name), model, name, rank=FULL)
        for name in ("peft", "lora_lab")
        if (model := model_of_names(difference.before.shapes))
    }
    assert results["lora_lab"].not_held == {}
    assert results["peft"].not_held == {"0.1.weight": "its name does not tell what layer it is of"}
    x = torch.randn(2, 3, 3, 3)
    for name, load in (("lora_lab", adapters.load), ("peft", adapters.load_peft)):
        model, wanted = make(), expected(make, FULL, results[name].not_held)[0]
        load(model, name)
        torch.testing.assert_close(model(x), wanted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layers", "gpt2, tied", "mixtral"])
@torch.no_grad()
def test_our_load_gives_the_outputs_of_the_cut_change(name: str):
    make, _ = MODELS[name]
    result = extracted(make, "lora_lab", rank=2)
    model, share = expected(make, 2, {})
    assert result.held_energy / result.energy == pytest.approx(share, rel=1e-5)
    ours = make()
    adapters.load(ours, "adapter")
    torch.testing.assert_close(output(ours), output(model), rtol=1e-5, atol=1e-5)


def test_experts_have_the_rank_that_the_share_of_one_needs():
    share = 0.8
    result = extracted(mixtral, "peft", energy=share)
    (site,) = (one for one in result.sites if one.site.name.endswith("experts.down_proj"))
    change = tuned(mixtral).get_parameter(site.site.key) - mixtral().get_parameter(site.site.key)
    squares = np.linalg.svd(change.detach().numpy(), compute_uv=False) ** 2  # (E, rank)
    shares = squares.cumsum(1) / squares.sum(1, keepdims=True)
    assert site.k == (shares < share).sum(1).max() + 1
    assert site.kept == pytest.approx(squares[:, : site.k].sum() / squares.sum(), rel=1e-5)


def test_a_weight_that_both_files_have_twice_counts_once():
    states = {"before": tied_gpt2().state_dict(), "after": tuned(tied_gpt2).state_dict()}
    files = []
    for name, state in states.items():
        save_file({k: v.clone() for k, v in state.items()}, f"{name}.safetensors")
        files.append(Checkpoint(Path(f"{name}.safetensors")))
    model = tied_gpt2().to("meta")
    model.tie_weights()

    def run() -> Extracted:
        difference = Difference(*files)
        return extract(difference, difference.shared, Path("adapter"), model, "lora_lab", rank=2)

    result = run()
    assert result.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert [one.site.name for one in result.sites].count("transformer.wte") == 1
    share = expected(tied_gpt2, 2, {})[1]
    assert result.held_energy / result.energy == pytest.approx(share, rel=1e-5)
    states["after"]["lm_head.weight"] = states["after"]["lm_head.weight"] + 1
    save_file({k: v.clone() for k, v in states["after"].items()}, "after.safetensors")
    with pytest.raises(ValueError, match="are one weight in the model, and two in after"):
        run()


def test_our_format_needs_all_weights_of_the_base():
    write(tuned(layers), "after")
    state = load_file("after/model.safetensors")
    save_file({k: v for k, v in state.items() if k != "fc.bias"}, "before.safetensors")
    difference = Difference(Checkpoint(Path("before.safetensors")), Checkpoint(Path("after")))
    with pytest.raises(ValueError, match=r"lacks 'fc\.bias'"):
        extract(difference, [], Path("adapter"), layers().to("meta"), "lora_lab", rank=1)
    assert not Path("adapter").exists()


def test_the_vector_of_a_padding_token_stays():
    write(layers(), "before")
    state = write(tuned(layers), "after").path / "model.safetensors"
    tensors = load_file(state)
    tensors["table.weight"][0] += 1  # as weight decay changes it
    save_file(tensors, state)
    difference = Difference(Checkpoint(Path("before")), Checkpoint(Path("after")))
    model, to = layers().to("meta"), Path("adapter")
    result = extract(difference, ["table.weight"], to, model, "lora_lab", rank=FULL)
    assert result.not_held == {"table.weight": "of the padding token 0 alone, whose vector stays"}
    assert result.energy - result.held_energy > 7
    ours = layers()
    adapters.load(ours, "adapter")
    (delta,) = adapters.deltas(ours).values()
    change = tensors["table.weight"] - layers().table.weight
    torch.testing.assert_close(delta[1:], change[1:], rtol=1e-5, atol=1e-6)
    assert not delta[0].any()
    tensors["table.weight"][1:] = layers().table.weight[1:]  # now it alone has changed
    save_file(tensors, state)
    with pytest.raises(ValueError, match=r"no matrix changed .*of the padding token 0 alone"):
        extract(difference, ["table.weight"], Path("none"), layers().to("meta"), rank=FULL)
    assert not Path("none").exists()


SHAPES: dict[str, tuple[tuple[int, ...], str, tuple[int, int]]] = {
    "fc.weight": ((6, 4), "linear", (6, 4)),
    "fc.inner.weight": ((6, 5), "linear", (6, 5)),
    "tok_embeddings.weight": ((9, 4), "embedding", (9, 4)),
    "conv.weight": ((6, 4, 3), "conv", (6, 12)),
    "stem.0.weight": ((6, 4, 3, 2), "conv", (6, 24)),
    "block.experts.down_proj": ((2, 4, 5), "experts", (4, 5)),
    "positions": ((1, 3, 4), "weight", (1, 12)),
    "depthwise.weight": ((6, 1, 3, 3), "weight", (6, 9)),
}
"""Key → shape, and what is told of it: the kind of its site and the shape of its matrices."""


def test_layers_are_told_by_names_and_shapes():
    others = {"fc.bias": (6,), "norm.weight": (4,), "norm.num_batches_tracked": ()}
    shapes = {**others, **{key: shape for key, (shape, *_) in SHAPES.items()}}
    model = model_of_names(shapes)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == shapes
    sites = sites_by_key(model)
    assert sites.keys() == SHAPES.keys()
    for key, (_, kind, shape) in SHAPES.items():
        (site,) = sites[key]
        assert (site.key, site.kind, site.shape) == (key, kind, shape)
