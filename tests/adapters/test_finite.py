"""Changes that are not finite, or that the weight's dtype cannot hold, are refused everywhere.

The truth is IEEE arithmetic: float16 ends at 65504, and a sum with inf or NaN is none.

Run: make test ARGS=tests/adapters/test_finite.py
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lab import adapters

INF, NAN = float("inf"), float("nan")

ACTIONS: dict[str, Callable[[Any, Path], Any]] = {
    "merge": lambda model, path: adapters.merge(model),
    "merged": lambda model, path: adapters.merged(model),
    "save": adapters.save,
    "save_peft": adapters.save_peft,
    "combine": lambda model, path: adapters.combine(model, {"default": 1.0}, "sum"),
}


def build(dtype: torch.dtype = torch.float16, entry: float = 0.1, **how: Any) -> Any:
    """Two layers and a bias that trains in full; ΔW of the second layer is 3 · `entry`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    adapters.attach(model, r=3, alpha=3, also_train="2.bias", **how)
    adapter = adapters.attached(model)["2"]
    adapter.A.data.fill_(1)
    adapter.B.data.fill_(entry)
    return model


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (3e4, "'2': it takes numbers up to 9e+04, and float16 ends at 65504"),
        (-INF, "'2': the change to the weight is not finite"),
        (NAN, "'2': the change to the weight is not finite"),
        (3e38, "'2': the change to the weight is not finite"),  # the sum of three is over float32's
    ],
)
def test_a_change_that_is_not_finite_is_refused(
    action: str, entry: float, says: str, tmp_path: Path
):
    model = build(entry=entry)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(adapters.AdapterError, match=f"^{re.escape(says)}"):
        ACTIONS[action](model, tmp_path / "files")
    assert not (tmp_path / "files").exists()
    assert adapters.names(model) == ["default"]
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), state[key].nan_to_num(7))
    adapters.switch(model, "default")  # raises where anything is merged


@pytest.mark.parametrize("action", ACTIONS)
def test_a_parameter_trained_in_full_is_named_too(action: str, tmp_path: Path):
    model = build(entry=NAN)
    adapters.also_trained(model)["2.bias"].value.data[1] = INF
    with pytest.raises(adapters.AdapterError, match=r"'2': .*; '2\.bias': .*not finite"):
        ACTIONS[action](model, tmp_path)


def test_a_sum_over_the_range_is_refused_although_both_terms_are_within():
    model = build(entry=2e4)
    model[2]._parameters["weight"].data.fill_(3e4)
    with pytest.raises(adapters.AdapterError, match="'2': it takes numbers up to"):
        adapters.merge(model)
    assert (adapters.base_state_dict(model)["2.weight"] == 3e4).all()


def test_doras_gain_is_asked_too(tmp_path: Path):
    model = build(dora=True)
    adapters.attached(model)["2"].magnitude.data.fill_(1e6)  # pyright: ignore
    with pytest.raises(adapters.AdapterError, match=r"'2': it takes numbers up to .*float16"):
        adapters.save(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_in_range_is_taken_beside_infinite_weights(
    action: str, dtype: torch.dtype, tmp_path: Path
):
    """A base may have infinite entries, as a mask: they are its own."""
    model = build(dtype, entry=2e4)  # ΔW = 6e4
    model[2]._parameters["weight"].data[0, 0] = -INF
    ACTIONS[action](model, tmp_path)


@pytest.mark.parametrize("share", [NAN, INF, -INF])
def test_a_share_is_a_finite_number(share: float):
    model = build()
    with pytest.raises(adapters.AdapterError, match=f"share of 'default' is {share}"):
        adapters.combine(model, {"default": share}, "sum")
    assert adapters.names(model) == ["default"]
