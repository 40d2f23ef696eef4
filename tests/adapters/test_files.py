"""Adapters saved and loaded, and the errors for files that do not fit.

The truth is the model that was saved (outputs equal bit for bit), and the files read back with
safetensors and json.

Run: make test ARGS=tests/adapters/test_files.py
"""

import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Target, adaptable, files
from lora_lab.adapters.linear import LinearAdapter
from tests.adapters.cases import CASES, Case, every_case, move


@every_case
def test_saved_and_loaded_is_the_same(case: Case, tmp_path: Path):
    model, x = case.plain(), case.inputs()
    adapters.attach(model, "all", **case.how, dropout=0.25)
    move(model)
    adapters.save(model.eval(), tmp_path)
    fresh = case.plain().eval()
    adapters.load(fresh, tmp_path)
    assert torch.equal(fresh(*x), model(*x))
    theirs = adapters.attached(model)
    for site, ours in adapters.attached(fresh).items():
        assert (ours.recipe, ours.scale) == (theirs[site].recipe, theirs[site].scale)
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@every_case
def test_a_checkpoint_of_what_trains_alone_is_enough(case: Case):
    model, x = case.build(), case.inputs()
    fresh = case.build(trained=False)
    state = adapters.adapter_state_dict(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad or n.endswith("_merged")}
    assert set(state) == names
    _, unexpected = fresh.load_state_dict(state, strict=False)
    assert unexpected == []
    assert torch.equal(fresh(*x), model(*x))


def test_only_the_adapter_is_stored(tmp_path: Path):
    model = CASES[0].build()
    adapters.merge(model)
    adapters.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter.safetensors")) == {"site.A", "site.B"}
    about = json.loads((tmp_path / "adapter.json").read_text())
    adapters.unmerge(model)
    assert about["base"] == adapters.weights_hash(adapters.base_state_dict(model))


def test_the_scale_is_stored_and_not_derived_again(tmp_path: Path):
    model, x = CASES[0].build(), CASES[0].inputs()
    adapters.save(model, tmp_path)
    path = tmp_path / "adapter.json"
    about = json.loads(path.read_text())
    about["sites"]["site"]["scale"] *= 2
    path.write_text(json.dumps(about))
    fresh = CASES[0].plain()
    adapters.load(fresh, tmp_path)
    base = fresh.eval()(*x) - CASES[0].plain()(*x)
    torch.testing.assert_close(base, 2 * (model(*x) - CASES[0].plain()(*x)))


def test_a_folder_of_before_there_were_forms_is_lora(tmp_path: Path):
    model, x = CASES[0].build(), CASES[0].inputs()
    adapters.save(model, tmp_path)
    path = tmp_path / "adapter.json"
    about = json.loads(path.read_text())
    del about["sites"]["site"]["form"]
    path.write_text(json.dumps(about))
    fresh = CASES[0].plain()
    adapters.load(fresh, tmp_path)
    assert torch.equal(fresh(*x), model(*x))


def test_one_of_several_is_saved_by_its_name_and_loaded_under_another(tmp_path: Path):
    model, x = CASES[0].build(), CASES[0].inputs()
    y = model(*x)
    adapters.attach(model, r=3, alpha=1, name="other")
    adapters.save(model, tmp_path, name="default")
    with pytest.raises(adapters.AdapterError, match="no adapter 'third'; on the model: default, o"):
        adapters.save(model, tmp_path, name="third")
    adapters.load(model, tmp_path, name="again")
    assert adapters.names(model) == ["default", "other", "again"]
    assert torch.equal(model(*x), y)


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
    remaining = {k: v for k, v in tensors.items() if v is not None}
    save_file(remaining, tmp_path / "adapter.safetensors")
    path = tmp_path / "adapter.json"
    about = json.loads(path.read_text())
    del about["sha256"]  # as in folders of earlier versions
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"site.A": None}, r"'A': \[1, 7\], 'B': \[5, 1\]}, they are {'B': \[5, 1\]}"),
        ({"site.Z": torch.zeros(1)}, "unknown tensor site.Z"),
        ({"site.A": torch.zeros(2, 3)}, r"they are \{'A': \[2, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, changes: dict, says: str):
    model = saved(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(adapters.AdapterError, match=says):
        adapters.load(model, tmp_path)
    assert not adapters.attached(model)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("sight", "linear", "'sight': there is no such site; nearest: site"),
        ("site", "conv", "'site': is of kind linear, the adapter's was conv"),
    ],
)
def test_a_site_that_does_not_fit_is_named(tmp_path: Path, name: str, kind: str, says: str):
    model = saved(tmp_path)
    path = tmp_path / "adapter.json"
    about = json.loads(path.read_text())
    about["sites"] = {name: {**about["sites"]["site"], "kind": kind}}
    path.write_text(json.dumps(about))
    with pytest.raises(adapters.AdapterError, match=says):
        adapters.load(model, tmp_path)
    assert not adapters.attached(model)


def test_two_adapters_on_one_tied_weight_are_refused(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    adapters.attach(model, r=1)
    adapters.save(model, tmp_path)
    adapters.detach(model)
    model[1].weight = model[0].weight
    with pytest.raises(adapters.AdapterError, match="'0' and '1' are one weight by its different"):
        adapters.load(model, tmp_path)
    assert not adapters.attached(model)


def test_sites_are_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    walks, walk = [], adaptable.candidate_sites
    monkeypatch.setattr(
        adaptable, "candidate_sites", lambda m, **b: walks.append(m) or walk(m, **b)
    )
    model = seeded_layers()
    adapters.attach(model, r=1)
    adapters.save(model, tmp_path / "ours")
    adapters.save_peft(model, tmp_path / "peft")
    for use in (
        lambda: adapters.load(model, tmp_path / "ours", "a"),
        lambda: adapters.load_peft(model, tmp_path / "peft", "b"),
        lambda: adapters.combine(model, {"a": 1.0, "b": 1.0}, "c"),
    ):
        use()
        assert len(walks) == 1
        walks.clear()


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


def test_a_change_of_the_padding_token_is_refused(tmp_path: Path):
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=1))
    adapters.attach(model, "all", r=1, alpha=1)
    adapters.attached(model)["0"].A.data += 1
    adapters.save(model, tmp_path)
    adapters.detach(model)
    with pytest.raises(adapters.AdapterError, match="'0': A changes the padding token 1"):
        adapters.load(model, tmp_path)


SAVES = {"ours": (adapters.save, adapters.load), "peft": (adapters.save_peft, adapters.load_peft)}


@pytest.mark.parametrize("kept", ["json", "safetensors"])
@pytest.mark.parametrize("format", SAVES)
def test_two_files_of_different_saves_are_refused(format: str, kept: str, tmp_path: Path):
    """One of the files is of a save with alpha 1, the other of the next one, with alpha 8."""
    save, load = SAVES[format]
    for alpha in (1, 8):
        model: Any = nn.Sequential(nn.Linear(4, 3))
        model[0].weight.data.fill_(1)
        model[0].bias.data.fill_(0)
        adapters.attach(model, r=2, alpha=alpha)
        adapters.attached(model)["0"].B.data.fill_(alpha)
        older = {path: path.read_bytes() for path in tmp_path.iterdir()}
        save(model, tmp_path)
    adapters.detach(model)
    load(model, tmp_path)
    assert adapters.attached(model)["0"].scale == 4
    adapters.detach(model)
    for path, content in older.items():
        if path.suffix == f".{kept}":
            path.write_bytes(content)
    with pytest.raises(adapters.AdapterError, match=r"another save|lora_alpha=.* not of one save"):
        load(model, tmp_path)
    assert not adapters.attached(model)


@pytest.mark.parametrize("format", SAVES)
def test_a_save_that_ends_between_its_files_leaves_none_that_can_be_read(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save, load = SAVES[format]
    model = CASES[0].build()
    write = files.write_atomic

    def write_tensors(path: Path, content: Any) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(files, "write_atomic", write_tensors)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    adapters.detach(model)
    with pytest.raises(adapters.AdapterError, match="can be read from"):
        load(model, tmp_path)


def test_one_adapter_is_one_file(tmp_path: Path):
    """The order of PEFT's metadata is by chance in safetensors: 20 times one of two orders."""
    model = CASES[0].build()
    contents = set()
    for _ in range(20):
        adapters.save_peft(model, tmp_path)
        contents.add((tmp_path / "adapter_model.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.keys()) == 2


def test_the_checksum_is_that_of_the_file(tmp_path: Path):
    saved(tmp_path)
    content = (tmp_path / "adapter.safetensors").read_bytes()
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert about["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of tests, where jaxtyping raises no error before ours."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


SCALARS = {
    "numpy": (np.int64, np.float64, np.bool_),
    "numpy32": (np.int32, np.float32, np.bool_),
    "array": (np.array, np.array, np.array),
    "torch": (torch.tensor, torch.tensor, torch.tensor),
    "torch-of-one": (lambda n: torch.tensor([n]),) * 3,
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("integer", "number", "flag"), SCALARS.values(), ids=SCALARS)
def test_settings_that_are_scalars_of_numpy_or_torch_are_pythons(
    integer: Any, number: Any, flag: Any, tmp_path: Path
):
    def build(integer: Any, number: Any, flag: Any, folder: Path) -> nn.Sequential:
        model = seeded_layers()
        targets = {
            "rest": Target(match="[01]"),
            "last": Target(match="2", r=integer(1), alpha=number(4.0), dropout=number(0.5)),
        }
        settings: dict[str, Any] = {"r": integer(3), "alpha": number(8.0), "dropout": number(0.25)}
        settings |= {"dora": flag(False), "seed": integer(3)}
        patterns: dict[str, Any] = {
            "rank_pattern": {"0": integer(2)},
            "alpha_pattern": {"0": integer(5)},
        }
        adapters.attach(model, targets, **settings, **patterns)
        adapters.save(model, folder)
        adapters.save_peft(model, folder / "peft", base_model=Path("base"))
        return model

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    build(integer, number, flag, ours)
    build(int, float, bool, theirs)
    for name in ("adapter.json", "adapter.safetensors", "peft/adapter_config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def seeded_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "setting",
    [
        *({"alpha": "16"}, {"alpha": torch.ones(2)}, {"alpha": True}),
        *({"alpha": Decimal(16)}, {"dropout": "0.1"}, {"dropout": np.ones(2)}),
        *({"r": np.float32(2)}, {"r": np.ones(2, int)}, {"dora": 1}, {"dora": "no"}),
        *({"seed": 1.5}, {"seed": "1"}, {"seed": torch.ones(2)}),
    ],
)
def test_settings_that_are_no_numbers_are_refused_at_once(setting: dict[str, Any]):
    model = seeded_layers()
    (key,) = setting
    with pytest.raises(adapters.AdapterError, match=f"^{key}="):
        adapters.attach(model, **{"r": 2, "alpha": 2, **setting})
    assert not adapters.names(model)


class OfAnotherName(nn.Linear):
    pass


def test_an_adapter_of_before_subclasses_were_known_is_loaded(tmp_path: Path, monkeypatch):
    """There a subclass of nn.Linear had its adapter where the weight is read."""
    model, other = (nn.Sequential(OfAnotherName(5, 4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    with monkeypatch.context() as before:
        before.setattr(LinearAdapter, "fits", classmethod(lambda _, layer: False))
        (site,) = adapters.attach(model, "all", r=2, alpha=2)
        assert site.name == "0.weight"
        nn.init.normal_(adapters.attached(model)["0.weight"].B)
        adapters.save(model, tmp_path / "adapter")
        x = torch.randn(3, 5)
        expected = model(x)
    adapters.load(other, tmp_path / "adapter")
    assert torch.equal(other(x), expected)


EYE = torch.eye(4)
BUFFERS: dict[str, Callable[[float], Tensor]] = {
    "coo": lambda n: (n * EYE).to_sparse(),
    "csr": lambda n: (n * EYE).to_sparse_csr(),
    "csc": lambda n: (n * EYE).to_sparse_csc(),
    "bsr": lambda n: (n * EYE).to_sparse_bsr((2, 2)),
    "bsc": lambda n: (n * EYE).to_sparse_bsc((2, 2)),
    "quantized": lambda n: torch.quantize_per_tensor(n * EYE, 0.5, 1, torch.qint8),
    "quantized by row": lambda n: torch.quantize_per_channel(
        EYE, n * torch.ones(4), torch.zeros(4), 0, torch.qint8
    ),
    "nested": lambda n: torch.nested.nested_tensor([n * torch.ones(2), torch.ones(3)]),
    "jagged": lambda n: torch.nested.nested_tensor(
        [n * torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "conjugate": lambda n: (n * 1j * torch.ones(3)).conj(),
    "negative": lambda n: (n * 1j * torch.ones(3)).conj().imag,
    "float8": lambda n: (n * EYE).to(torch.float8_e4m3fn),
    "expanded": lambda n: torch.tensor(n).expand(4),
    "empty": lambda n: torch.empty(int(n), 0),
}


class Odd(nn.Module):
    """A layer beside a buffer, and a state that is no tensor, as layers in float8 have."""

    def __init__(self, buffer: Tensor):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("odd", buffer)

    def get_extra_state(self) -> Any:
        return {"amax": 1.0}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore")  # torch's, that these kinds of tensors are not finished
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_base_with_any_kind_of_buffer_is_known_by_it(kind: str, tmp_path: Path):
    build = BUFFERS[kind]
    model, same, other = Odd(build(1.0)), Odd(build(1.0)), Odd(build(2.0))
    adapters.attach(model, r=2, alpha=2)
    adapters.save(model, tmp_path / "unmerged")
    adapters.save_peft(model, tmp_path / "peft")
    adapters.merge(model)
    adapters.save(model, tmp_path / "merged")
    adapters.unmerge(model)
    about = [(tmp_path / name / "adapter.json").read_text() for name in ("unmerged", "merged")]
    assert about[0] == about[1]
    adapters.load(same, tmp_path / "merged")
    with pytest.raises(adapters.AdapterError, match="belongs to another base"):
        adapters.load(other, tmp_path / "merged")
