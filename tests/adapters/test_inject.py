"""Targets: what they pick, and what is said when they pick nothing that can be meant."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import RankError, Site, Target, TargetError


def model() -> Any:
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(6, 8), relu1=nn.ReLU(), fc2=nn.Linear(8, 8), head=nn.Linear(8, 3))
    )


def test_sites_are_in_the_models_order_with_their_matrix():
    sites = adapters.find(model(), {"linear": Target("linear")})
    assert sites == [
        Site("fc1", "linear", (8, 6)),
        Site("fc2", "linear", (8, 8)),
        Site("head", "linear", (3, 8)),
    ]


def test_find_works_on_the_meta_device():
    with torch.device("meta"):
        assert len(adapters.find(model(), {"linear": Target("linear")}, r=3)) == 3


@pytest.mark.parametrize(
    ("match", "names"), [("fc*", ["fc1", "fc2"]), ("*2", ["fc2"]), ("head", ["head"])]
)
def test_globs(match: str, names: list[str]):
    sites = adapters.find(model(), {match: Target(match=match)})
    assert [site.name for site in sites] == names


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target(match="fcc*"), "picks no layer; nearest names: fc2, fc1"),
        (Target(match="relu*"), "picks no Linear layer, only relu1 (ReLU)"),
    ],
)
def test_a_target_that_picks_nothing_is_an_error(target: Target, says: str):
    with pytest.raises(TargetError) as error:
        adapters.find(model(), {"mine": target})
    assert says in str(error.value)


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(TargetError, match="the model has no Linear layer"):
        adapters.find(nn.Sequential(nn.ReLU()), {"linear": Target("linear")})


def test_two_targets_on_one_layer_are_an_error():
    targets = {"linear": Target("linear"), "fc*": Target(match="fc*")}
    with pytest.raises(TargetError, match=r"'linear' and 'fc\*' both pick layer 'fc1'"):
        adapters.find(model(), targets)


def test_a_tied_weight_is_an_error():
    tied = model()
    tied.fc2.weight = tied.fc1.weight = nn.Parameter(torch.randn(8, 8))
    with pytest.raises(TargetError, match=r"fc1\.weight = fc2\.weight"):
        adapters.find(tied, {"linear": Target("linear")})


@pytest.mark.parametrize("r", [4, 100])
def test_a_rank_over_the_weights_is_an_error(r: int):
    rule = f"r={r} exceeds the rank of 'head' (weight 3 × 8): at most 3"
    with pytest.raises(RankError) as error:
        adapters.attach(model(), {"head": Target(match="head")}, r=r, alpha=1)
    assert str(error.value) == rule


@pytest.mark.parametrize("r", [0, -2])
def test_no_rank_is_an_error(r: int):
    with pytest.raises(RankError, match="at least 1"):
        adapters.attach(model(), r=r, alpha=1)


def test_an_error_leaves_the_model_untouched():
    untouched = model()
    with pytest.raises(RankError):
        adapters.attach(untouched, r=5, alpha=1)
    assert not adapters.attached(untouched)
    assert all(p.requires_grad for p in untouched.parameters())


def test_a_layer_takes_one_adapter_and_the_others_can_follow():
    twice = model()
    adapters.attach(twice, {"head": Target(match="head")}, r=1, alpha=1)
    with pytest.raises(adapters.AdapterError, match="have an adapter already: head"):
        adapters.attach(twice, r=1, alpha=1)
    adapters.attach(twice, {"fc": Target(match="fc*")}, r=1, alpha=1)
    assert {n.split(".")[0] for n, p in twice.named_parameters() if p.requires_grad} == {
        "fc1",
        "fc2",
        "head",
    }
    adapters.detach(twice)
    assert all(p.requires_grad for p in twice.parameters())


def test_a_subclass_with_its_own_forward_is_no_plain_linear():
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(TargetError):
        adapters.find(nn.Sequential(Doubled(3, 3)), {"linear": Target("linear")})


def test_weights_tied_by_their_storage_are_an_error():
    tied = model()
    tied.fc2 = nn.Linear(6, 8)
    tied.fc2.weight = nn.Parameter(tied.fc1.weight.data)
    with pytest.raises(TargetError, match=r"fc1\.weight = fc2\.weight"):
        adapters.find(tied, {"linear": Target("linear")})


def test_a_merged_model_takes_no_further_adapter():
    merged = model()
    adapters.attach(merged, {"head": Target(match="head")}, r=1, alpha=1)
    adapters.merge(merged)
    with pytest.raises(adapters.AdapterError, match="merged: head; unmerge"):
        adapters.attach(merged, {"fc": Target(match="fc*")}, r=1, alpha=1)


def test_detach_from_an_outer_model_thaws():
    inner = model()
    outer = nn.Sequential(inner, nn.Linear(3, 3))
    adapters.attach(inner, r=1, alpha=1)
    adapters.detach(outer)
    assert all(p.requires_grad for p in outer.parameters())


def test_a_module_of_that_name_is_an_error():
    taken = nn.Sequential(OrderedDict(lora=nn.Linear(3, 3), fc=nn.Linear(3, 3)))
    with pytest.raises(adapters.AdapterError, match="has the name of an adapter"):
        adapters.attach(taken, r=1, alpha=1)
    assert all(p.requires_grad for p in taken.parameters())


def test_a_computed_weight_is_an_error():
    normed = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)))
    with pytest.raises(TargetError, match="is no parameter but computed"):
        adapters.attach(normed, r=1, alpha=1)


@pytest.mark.parametrize("how", [{"init": "zeros"}, {"scaling": "2"}])
def test_an_unknown_variant_is_an_error(how: dict):
    with pytest.raises(adapters.AdapterError, match="must be one of"):
        adapters.attach(model(), r=1, alpha=1, **how)
