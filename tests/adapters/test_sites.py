"""Which sites targets pick, with which recipe, and the errors where they pick none.

The truth is small models whose sites, shapes and numbers of parameters are written out by hand.

Run: make test ARGS=tests/adapters/test_sites.py
"""

import copy
import json
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import RankError, Recipe, Target, TargetError, linear_trial
from lora_lab.adapters.attention import attention_names
from lora_lab.adapters.sites import candidate_sites
from tests.all_layer_kinds import AllLayerKinds


def model() -> Any:
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(6, 8), relu1=nn.ReLU(), fc2=nn.Linear(8, 8), head=nn.Linear(8, 3))
    )


def test_sites_are_in_the_models_order_with_their_matrix():
    sites = adapters.find_sites(model(), {"linear": Target("linear")})
    assert [(site.name, site.kind, site.shape) for site in sites] == [
        ("fc1", "linear", (8, 6)),
        ("fc2", "linear", (8, 8)),
        ("head", "linear", (3, 8)),
    ]


def test_find_sites_works_on_the_meta_device():
    with torch.device("meta"):
        assert len(adapters.find_sites(model(), {"linear": Target("linear")}, Recipe(3, 1.0))) == 3


@pytest.mark.parametrize(
    ("match", "names"), [("fc*", ["fc1", "fc2"]), ("*2", ["fc2"]), ("head", ["head"])]
)
def test_globs(match: str, names: list[str]):
    sites = adapters.find_sites(model(), {match: Target(match=match)})
    assert [site.name for site in sites] == names


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target(match="fcc*"), "picks no weight: 'fcc*' fits none; nearest names: fc2, fc1"),
        (
            Target(match="f"),
            "fits none; nearest names: fc2, fc1, head; last names of its weights: fc1, fc2, head",
        ),
        (Target("conv"), "picks nothing: the model has no conv weight"),
        (Target("conv", match="fc*"), "the model has no conv weight"),
        (Target(match="fc*", exclude="fc?"), "its exclude leaves out all that its match picks"),
        (
            Target("lineal"),
            "kind='lineal': must be one of linear, conv, embedding, experts, weight",
        ),
        (Target(exclude="hed"), "target 'mine': 'hed' fits no site; nearest: head"),
        (Target(match=["fc1", "typo"]), "target 'mine': 'typo' fits no site; nearest:"),
        (Target(match="relu*"), "picks no weight, only relu1 (ReLU)"),
    ],
)
def test_a_target_that_picks_nothing_is_an_error(target: Target, says: str):
    with pytest.raises(TargetError) as error:
        adapters.find_sites(model(), {"mine": target})
    assert says in str(error.value)


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(TargetError, match="the model has no linear weight"):
        adapters.find_sites(nn.Sequential(nn.ReLU()), {"linear": Target("linear")})


def test_two_targets_on_one_layer_are_an_error():
    targets = {"linear": Target("linear"), "fc*": Target(match="fc*")}
    with pytest.raises(TargetError, match=r"'linear' and 'fc\*' both pick 'fc1'"):
        adapters.find_sites(model(), targets)


def tied_model() -> Any:
    tied = model()
    tied.fc2.weight = tied.fc1.weight = nn.Parameter(torch.randn(8, 8))
    return tied


def test_a_tied_weight_is_left_out_and_this_is_said(caplog: pytest.LogCaptureFixture):
    sites = adapters.attach(tied_model(), "linear", r=2)
    assert [site.name for site in sites] == ["head"]
    weights = "fc1.weight = fc2.weight"
    text = f"left out: the weight of 'fc1' is tied ({weights}); 'fc2' is tied ({weights}): an"
    assert text in caplog.text
    assert "leaves it out" not in caplog.text
    assert "target.linear.tied=true adapts it once" in caplog.text


@pytest.mark.parametrize("match", ["fc1", "fc?"])
def test_a_target_that_names_a_tied_weight_or_has_no_other_is_an_error(match: str):
    with pytest.raises(TargetError, match=r"fc1\.weight = fc2\.weight"):
        adapters.find_sites(tied_model(), {"linear": Target("linear", match)})


OVER = {"one": Target(match="head"), "two": Target(match="fc*")}


@pytest.mark.parametrize("r", [4, 100])
def test_a_rank_over_the_weights_is_an_error(r: int):
    rule = f"r={r} exceeds the rank of 'head' (weight 3 × 8): at most 3; over_rank=clip takes that"
    with pytest.raises(RankError) as error:
        adapters.find_sites(model(), {"head": Target(match="head")}, Recipe(r, 1))
    assert str(error.value) == rule


def test_an_error_names_all_sites():
    with pytest.raises(RankError) as error:
        adapters.find_sites(model(), OVER, Recipe(9, 1))
    assert [
        part.partition(":")[0] for part in str(error.value).split("; ") if "exceeds" in part
    ] == [
        "r=9 exceeds the rank of 'fc1' (weight 8 × 6)",
        "r=9 exceeds the rank of 'fc2' (weight 8 × 8)",
        "r=9 exceeds the rank of 'head' (weight 3 × 8)",
    ]
    alike = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    with pytest.raises(RankError, match=r"rank of '0', '1', '2' and 3 more \(weight 4 × 4\)"):
        adapters.find_sites(alike, {"all": Target(match="?")}, Recipe(9, 1))


@pytest.mark.parametrize("scaling", adapters.SCALINGS)
def test_a_clipped_rank_keeps_the_scale(scaling: str, caplog: pytest.LogCaptureFixture):
    clipped = model()
    sites = adapters.attach(clipped, OVER, r=16, alpha=8, scaling=scaling)
    assert [site.recipe.r for site in sites if site.recipe] == [6, 8, 3]
    scales = {adapter.scale for adapter in adapters.attached(clipped).values()}
    assert [*scales] == pytest.approx([adapters.SCALINGS[scaling](8, 16)] * len(scales))
    assert "r=16 exceeds the rank of 'head' (weight 3 × 8), where r is 3" in caplog.text


def test_a_rank_over_the_weights_may_be_allowed():
    allowed = model()
    adapters.attach(allowed, OVER, r=16, alpha=8, over_rank="allow")
    shapes = {n: (*a.A.shape, *a.B.shape) for n, a in adapters.attached(allowed).items()}
    assert shapes == {"fc1": (16, 6, 8, 16), "fc2": (16, 8, 8, 16), "head": (16, 8, 3, 16)}
    x = torch.randn(5, 6)
    for adapter in adapters.attached(allowed).values():
        nn.init.normal_(adapter.B)
    adapted = allowed(x)
    adapters.merge(allowed)
    torch.testing.assert_close(allowed(x), adapted)
    for init in ("pissa", "olora", "svd", "orthogonal"):
        with pytest.raises(RankError, match="has at most"):
            adapters.attach(model(), OVER, r=16, alpha=8, init=init, over_rank="allow")
    with pytest.raises(adapters.AdapterError, match="over_rank='cut': must be one of"):
        adapters.attach(model(), r=2, over_rank="cut")


class Parameters(nn.Module):
    """Some layers, and a parameter that no layer holds."""

    def __init__(self, layers: nn.ModuleDict):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.theta = nn.Parameter(torch.zeros(3, 3))


def test_parameters_of_one_row_are_picked_by_name_only():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(8, 8)

    names = [site.name for site in adapters.find_sites(Tokens(), {"all": Target()})]
    assert names == ["fc"]
    assert adapters.find_sites(Tokens(), {"one": Target(match="token")})[0].shape == (1, 8)


@pytest.mark.parametrize("r", [0, -2])
def test_no_rank_is_an_error(r: int):
    with pytest.raises(adapters.AdapterError, match="at least 1"):
        adapters.attach(model(), r=r, alpha=1)


def test_an_error_leaves_the_model_untouched():
    untouched = model()
    with pytest.raises(RankError):
        adapters.attach(untouched, r=5, alpha=1, over_rank="error")
    assert not adapters.attached(untouched)
    assert all(p.requires_grad for p in untouched.parameters())


def test_a_layer_takes_one_adapter_and_the_others_can_follow():
    twice = model()
    adapters.attach(twice, {"head": Target(match="head")}, r=1, alpha=1)
    with pytest.raises(adapters.AdapterError, match="adapter 'default' sits on head: detach it"):
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

    subclass = nn.Sequential(Doubled(3, 3))
    assert [site.kind for site in adapters.find_sites(subclass, {"all": Target()})] == ["weight"]
    with pytest.raises(TargetError):
        adapters.find_sites(subclass, {"linear": Target("linear")})


def test_weights_tied_by_their_storage_are_found():
    tied = model()
    tied.fc2 = nn.Linear(6, 8)
    tied.fc2.weight = nn.Parameter(tied.fc1.weight.data)
    with pytest.raises(TargetError, match=r"fc1\.weight = fc2\.weight"):
        adapters.find_sites(tied, {"linear": Target("linear", "fc2")})


def test_a_merged_model_takes_no_further_adapter():
    merged = model()
    adapters.attach(merged, {"head": Target(match="head")}, r=1, alpha=1)
    adapters.merge(merged)
    with pytest.raises(adapters.AdapterError, match="merged into head: unmerge"):
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


def names(target: Target, recipe: Recipe | None = None) -> list[str]:
    return [site.name for site in adapters.find_sites(AllLayerKinds(5, 3), {"it": target}, recipe)]


def test_every_kind_and_group_of_sites():
    gates = [f"lstm.weight_{io}_l0_{gate}" for io in ("ih", "hh") for gate in "ifgo"]
    blocks = [f"attn.in_proj_weight_{block}" for block in "qkv"]
    assert names(Target("linear")) == ["fc", "head"]
    assert names(Target("conv")) == ["conv"]
    assert names(Target("embedding")) == ["embed"]
    assert names(Target("attention")) == [*blocks, "attn.out_proj.weight"]
    assert names(Target("weight")) == ["mix", *blocks, "attn.out_proj.weight", *gates]
    assert names(Target("experts")) == ["experts.up_proj"]
    assert len(names(Target("all"))) == 4 + 13 + 1


@pytest.mark.parametrize(
    ("target", "picked"),
    [
        (Target(match="*weight_[qv]"), ["attn.in_proj_weight_q", "attn.in_proj_weight_v"]),
        (Target(match="attn.in_proj_weight", exclude="*_[kv]"), ["attn.in_proj_weight_q"]),
        (Target(match=["fc", "head"], exclude=["h*"]), ["fc"]),
        (Target(match="attn.out_proj"), ["attn.out_proj.weight"]),
        (Target("linear", exclude="fc"), ["head"]),
        (Target(match="mix"), ["mix"]),
    ],
)  # fmt: skip
def test_matches_and_excludes(target: Target, picked: list[str]):
    assert names(target) == picked


def test_only_the_chosen_block_changes():
    attention = AllLayerKinds(5, 3)
    adapters.attach(attention, {"v": Target(match="*_v")}, r=2, alpha=2)
    nn.init.normal_(adapters.attached(attention)["attn.in_proj_weight_v"].B)
    adapters.merge(attention)
    moved = (
        attention.attn.in_proj_weight != adapters.base_state_dict(attention)["attn.in_proj_weight"]
    )
    assert moved[16:].all()
    assert not moved[:16].any()


def test_a_targets_own_settings_and_patterns_over_them():
    targets = {
        "body": Target("linear", match="fc*", r=2, alpha=8.0, dropout=0.5, init="gaussian"),
        "head": Target("linear", match="head"),
    }
    sites = adapters.attach(
        one := model(),
        targets,
        r=3,
        alpha=6,
        rank_pattern={"fc2": 4, "fc*": 5},
        alpha_pattern={"h*": 1.5},
    )
    assert [(s.name, s.recipe and (s.recipe.r, s.recipe.alpha)) for s in sites] == [
        ("fc1", (5, 8.0)),
        ("fc2", (4, 8.0)),
        ("head", (3, 1.5)),
    ]
    attached = adapters.attached(one)
    assert [a.scale for a in attached.values()] == [8 / 5, 2.0, 0.5]
    assert [a.recipe.dropout for a in attached.values()] == [0.5, 0.5, 0.0]
    assert [a.recipe.init for a in attached.values()] == ["gaussian", "gaussian", "kaiming"]
    assert [s.trainable_parameters for s in sites] == [5 * 14, 4 * 16, 3 * 11]
    counted = {n: sum(p.numel() for p in a.parameters()) for n, a in attached.items()}
    assert counted == {s.name: s.trainable_parameters for s in sites}


@pytest.mark.parametrize("trains", adapters.TRAINS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_site_counts_what_trains(trains: str, dora: bool):
    one = nn.ModuleDict({"e": nn.Embedding(9, 5), "l": nn.Linear(4, 7), "c": nn.Conv2d(3, 4, 2)})
    sites = adapters.attach(one, "all", r=2, alpha=1, init="svd", trains=trains, dora=dora)
    for site in sites:
        parameters = adapters.attached(one)[site.name].parameters()
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert site.trainable_parameters == trained, site


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(TargetError, match="rank_pattern: 'fcc' fits no site; nearest: fc2, fc1"):
        adapters.attach(model(), r=2, alpha=1, rank_pattern={"fcc": 1})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"trains": "core"},
            "trains=core with init=kaiming: .* take an init from the weight: pissa",
        ),
        ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and less than 1"),
        ({"trains": "A"}, "trains='A': must be one of both, zero, core"),
        ({"name": "a.b"}, "name='a.b': must be a plain word"),
        ({"name": "keys"}, "name='keys': must be a plain word"),
        ({"name": "active"}, "name='active': must be a plain word"),
        ({"alpha": 0}, "alpha=0: must be more than 0"),
        ({"alpha": float("nan")}, "alpha=nan: must be more than 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_an_error(how: dict, says: str):
    one = model()
    with pytest.raises(adapters.AdapterError, match=says):
        adapters.attach(one, **{"r": 1, "alpha": 1, **how})
    assert not adapters.attached(one)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            {"all": Target()},
            "dora=true: 'theta', 'lstm.weight_ih_l0_i', 'lstm.weight_ih_l0_f' and 6 more are of "
            "kind weight, and DoRA is for linear, conv, embedding: dora=false, or "
            "'target.all.exclude=[theta,lstm]'",
        ),
        (
            {"fc": Target(match="fc"), "gates": Target(match="lstm", exclude="*hh*")},
            "and 1 more are of kind weight, and DoRA is for linear, conv, embedding: dora=false, "
            "or leave out the target 'gates'",
        ),
        (
            {"t": Target(match=["theta", "fc"])},
            "dora=true: 'theta' is of kind weight, and DoRA is for linear, conv, embedding: "
            "dora=false, or target.t.exclude=theta",
        ),
    ],
)
def test_dora_is_not_for_every_kind(targets: dict[str, Target], says: str):
    mixed = nn.ModuleDict({"lstm": nn.LSTM(3, 3), "fc": nn.Linear(3, 3)})
    model = Parameters(mixed)
    with pytest.raises(adapters.AdapterError) as error:
        adapters.attach(model, targets, r=1, alpha=1, dora=True)
    assert str(error.value).endswith(says)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Embedding(5, 3, max_norm=1.0), "its max_norm rewrites the base's weight"),
        (nn.EmbeddingBag(5, 3, max_norm=1.0), "its max_norm rewrites the base's weight"),
        (nn.EmbeddingBag(5, 3, sparse=True), "a sparse gradient cannot pass"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(layer: nn.Module, why: str):
    with pytest.raises(TargetError, match=f"'0(.weight)?' cannot be adapted: {why}"):
        adapters.attach(nn.Sequential(layer), "all", r=1, alpha=1)


def test_what_is_no_weight_is_left_alone():
    class Odd(nn.Sequential):
        def __init__(self):
            super().__init__(nn.LazyLinear(3), nn.Linear(3, 3))
            self.counts = nn.Parameter(torch.arange(12).view(3, 4), requires_grad=False)
            self.table = nn.Parameter(torch.randn(3, 4))

    assert [site.name for site in adapters.find_sites(Odd(), {"all": Target()})] == ["1"]


def test_a_model_without_its_weights_is_an_error():
    with pytest.raises(adapters.AdapterError, match="on the meta device"):
        adapters.attach(nn.Linear(3, 3, device="meta"), r=1, alpha=1)


GLOBS = "must be a glob on names, or a list of globs"
TARGETS = (
    "must be one of linear, conv, embedding, experts, weight, attention, all, or {'label': Target"
)
INTEGER, NUMBER, BOOL = (
    "must be an integer of at least 1",
    "must be a number",
    "must be True or False",
)
INIT, PATTERN, WORD = (
    "must be one of kaiming",
    "must be {glob on names: value}",
    "must be a plain word",
)
WRONG = {
    "targets=3": f"targets=3: {TARGETS}",
    "targets=['fc']": f"targets=['fc']: {TARGETS}",
    "targets={'a': 3}": f"targets={{'a': 3}}: {TARGETS}",
    "targets={'a': '*fc'}": f"targets={{'a': '*fc'}}: {TARGETS}",
    "targets={1: Target('conv')}": "targets={1: Target(kind='conv'",
    "targets='lin'": "target 'lin': kind='lin': must be one of linear",
    "targets={}": "targets={}: picks nothing, and also_train is empty too",
    "kind=3": "target 'a': kind=3: must be one of linear",
    "kind=['conv']": "target 'a': kind=['conv']: must be one of linear",
    "match=None": f"target 'a': match=None: {GLOBS}",
    "match=['fc', 2]": f"target 'a': match=['fc', 2]: {GLOBS}",
    "match={'fc': 1}": f"target 'a': match={{'fc': 1}}: {GLOBS}",
    "match=b'fc'": f"target 'a': match=b'fc': {GLOBS}",
    "match=[]": "target 'a': match=[]: must have a glob",
    "exclude=[1, 'x']": f"target 'a': exclude=[1, 'x']: {GLOBS}",
    "exclude=1": f"target 'a': exclude=1: {GLOBS}",
    "tied=1": f"target 'a': tied=1: {BOOL}",
    "Target(r='8')": f"target 'a': r='8': {INTEGER}",
    "Target(alpha=True)": f"target 'a': alpha=True: {NUMBER}",
    "Target(dropout='0')": f"target 'a': dropout='0': {NUMBER}",
    "Target(init=['svd'])": f"target 'a': init=['svd']: {INIT}",
    "r='8'": f"r='8': {INTEGER}",
    "r=8.0": f"r=8.0: {INTEGER}",
    "r=[8]": f"r=[8]: {INTEGER}",
    "alpha=True": f"alpha=True: {NUMBER}",
    "alpha='1'": f"alpha='1': {NUMBER}",
    "dropout=None": f"dropout=None: {NUMBER}",
    "init={}": f"init={{}}: {INIT}",
    "scaling=[]": "scaling=[]: must be one of alpha/r",
    "trains=None": "trains=None: must be one of both",
    "dora=1": f"dora=1: {BOOL}",
    "rank_pattern={1: 2, 'fc': 2}": f"rank_pattern={{1: 2, 'fc': 2}}: {PATTERN}",
    "rank_pattern={'fc': '2'}": f"rank_pattern={{'fc': '2'}}: r='2': {INTEGER}",
    "rank_pattern='fc'": f"rank_pattern='fc': {PATTERN}",
    "alpha_pattern={None: 2}": f"alpha_pattern={{None: 2}}: {PATTERN}",
    "alpha_pattern={'fc': True}": f"alpha_pattern={{'fc': True}}: alpha=True: {NUMBER}",
    "also_train=3": f"also_train=3: {GLOBS}",
    "also_train=[1, 'fc']": f"also_train=[1, 'fc']: {GLOBS}",
    "over_rank=['clip']": "over_rank=['clip']: must be one of error, clip, allow",
    "seed='1'": "seed='1': must be an integer",
    "name=3": f"name=3: {WORD}",
    "name=['a']": f"name=['a']: {WORD}",
}
"""An argument of `attach`, or of a target 'a', and how the error begins."""


def test_arguments_of_a_wrong_type_are_errors():
    """In another process: here jaxtyping would raise an error first."""
    program = """
import json, sys, torch
from torch import nn
from lora_lab import adapters
from lora_lab.adapters import Target
messages = {}
for argument in json.loads(sys.argv[1]):
    model = nn.ModuleDict({"fc": nn.Linear(3, 4)})
    if argument.startswith("Target"):
        text = f"targets={{'a': {argument}}}"
    elif argument.partition("=")[0] in ("kind", "match", "exclude", "tied"):
        text = f"targets={{'a': Target({argument})}}"
    else:
        text = argument
    try:
        eval(f"adapters.attach(model, **{{'r': 1, **dict({text})}})")
    except adapters.AdapterError as error:
        messages[argument] = str(error)
    assert all(p.requires_grad for p in model.parameters()), argument
adapters.attach(model, r=1)
for share in (["default"], {}):
    try:
        adapters.combine(model, share, "b")
    except adapters.AdapterError as error:
        messages[str(share)] = str(error)
print(json.dumps(messages))
"""
    command = [sys.executable, "-c", program, json.dumps([*WRONG])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    shares = "must be {adapter's name: share}"
    expected = {
        **WRONG,
        "['default']": f"weights=['default']: {shares}",
        "{}": f"weights={{}}: {shares}",
    }
    starts = {key: messages.get(key, "no error")[: len(says)] for key, says in expected.items()}
    assert starts == expected


class Bracketed(nn.Module):
    """With names that are globs, each of which fits another name."""

    def __init__(self):
        super().__init__()
        for name in ("blocks[0]", "blocks0", "block?", "blocks"):
            self.add_module(name, nn.Linear(3, 3))
        self.add_module("list[1]", nn.ModuleDict({"fc": nn.Linear(3, 3)}))
        self.list1 = nn.ModuleDict({"fc": nn.Linear(3, 3)})


@pytest.mark.parametrize(
    ("target", "picked"),
    [
        (Target(match="blocks[0]"), ["blocks[0]"]),
        (Target(match="blocks[0].weight"), ["blocks[0]"]),
        (Target(match=["block?", "blocks0"]), ["blocks0", "block?"]),
        (Target(match="blocks*", exclude="blocks[0]"), ["blocks0", "blocks"]),
        (Target(match="block[s?]"), ["block?", "blocks"]),
        (Target(match="list[1].fc"), ["list[1].fc"]),
        (Target(match="list[1].*"), ["list1.fc"]),
    ],
)
def test_a_glob_that_is_a_name_stands_for_it_alone(target: Target, picked: list[str]):
    sites = adapters.find_sites(Bracketed(), {"it": target})
    assert [site.name for site in sites] == picked


def test_patterns_and_also_train_take_names_before_globs():
    bracketed = Bracketed()
    sites = adapters.attach(
        bracketed, "linear", r=2, rank_pattern={"blocks[0]": 1, "blocks*": 3}, also_train="list[1]"
    )
    ranks = {site.name: site.recipe.r for site in sites if site.recipe}
    assert ranks == {"blocks[0]": 1, "blocks0": 3, "block?": 2, "blocks": 3, "list1.fc": 2}
    also = ["list[1].fc.weight", "list[1].fc.bias"]
    assert [*adapters.also_trained(bracketed)] == also
    tied: Any = Bracketed()
    tied._modules["blocks[0]"].weight = tied.blocks0.weight
    with pytest.raises(TargetError, match=r"'blocks\[0\]' is tied"):
        adapters.find_sites(tied, {"it": Target(match=["blocks[0]", "blocks"])})


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ("list[1]", r"only list\[1\] \(ModuleDict\); 'list\[\[]1\]\.\*' picks those within"),
        ("list1", r"only list1 \(ModuleDict\); 'list1\.\*' picks those within"),
        ("block[7]", r"write '\[\[\]' for it"),
    ],
)
def test_a_name_that_picks_nothing_has_a_way_out(match: str, says: str):
    with pytest.raises(TargetError, match=says):
        adapters.find_sites(Bracketed(), {"it": Target(match=match)})


class Renamed(nn.Linear):
    pass


class Written(nn.Linear):
    """As FalconLinear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Noisy(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.training * torch.randn(self.weight.shape[0])


class Inverted(nn.Linear):
    """Plain where it is called in training."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if self.training else -input)


class InvertedInTraining(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(-input if self.training else input)


class Biased(nn.Linear):
    """Plain where it has a bias."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (
            super().forward(input) if self.bias is not None else self.weight.sum() * input[..., :4]
        )


class Halved(nn.Linear):
    """Plain in other dtypes than half precision."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if input.dtype != torch.float16 else input / 2)


class Clamped(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).clamp(-100, 100)


class Rarely(nn.Linear):
    """Draws from the streams of Python and numpy, and almost never computes otherwise for it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        draws = random.random() + np.random.rand()
        return super().forward(input if draws < 1.999 else 0 * input)


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(input)


class Logged(nn.Linear):
    """Counts and keeps what it is called with, and holds what cannot be copied."""

    forwards = 0
    """Of all layers of the class."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls, self.log, self.cache = 0, [], {"shapes": set()}
        self.lock, self.inner = threading.Lock(), [nn.Linear(3, 3), self.weight]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        Logged.forwards += 1
        self.calls, self.last = self.calls + 1, input
        self.log.append(output := super().forward(input))
        self.cache["shapes"].add(input.shape)
        return output


class Locked(Logged):
    """Computes with what cannot be copied."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return super().forward(input)


class Gated(nn.Linear):
    """A plain map only as long as its gate is 1."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.gate


class Table(nn.Embedding):
    pass


class ScaledTable(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class Filter(nn.Conv1d):
    pass


class Standardized(nn.Conv1d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (Renamed(6, 4), "linear"),
        (Written(6, 4), "linear"),
        (Written(6, 4, bias=False), "linear"),
        (Doubled(6, 4), "weight"),
        (Noisy(6, 4), "weight"),
        (Gated(6, 4), "weight"),
        (Inverted(6, 4), "weight"),
        (InvertedInTraining(6, 4), "weight"),
        (Biased(6, 4), "linear"),
        (Biased(6, 4, bias=False), "weight"),
        (Halved(6, 4), "weight"),
        (Clamped(6, 4), "weight"),
        (Scaled(6, 4), "linear"),
        (Logged(6, 4), "linear"),
        (Locked(6, 4), "weight"),
        (Table(6, 4), "embedding"),
        (ScaledTable(6, 4), "weight"),
        (Filter(6, 4, 2), "conv"),
        (Standardized(6, 4, 2), "weight"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_subclass_is_of_its_kind_where_it_keeps_the_meaning(layer: nn.Module, kind: str):
    """Whatever its kind, the adapted layer computes what the merged one does."""
    stream = torch.random.get_rng_state()
    model = nn.Sequential(layer).double()
    (site,) = adapters.attach(model, "all", r=2, alpha=2)
    assert site.kind == kind
    assert torch.equal(stream, torch.random.get_rng_state())
    (adapter,) = adapters.attached(model).values()
    for factor in (adapter.A, adapter.B):
        nn.init.normal_(factor)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    if isinstance(layer, nn.Embedding):
        x = torch.tensor([0, 5, 2])
    elif isinstance(layer, nn.Linear):
        x = x.mT
    for train in (True, False):
        model.train(train)
        with torch.random.fork_rng():
            adapted = model(x)
        adapters.merge(model)
        with torch.random.fork_rng():
            torch.testing.assert_close(model(x), adapted)
        adapters.unmerge(model)


def kind_of(layer: nn.Module) -> str:
    return adapters.adapter_class(layer).kind


def test_a_layer_is_tried_once_and_stays_as_it_was():
    layer = Logged(6, 4)
    before = {**vars(layer), "log": [*layer.log], "cache": copy.deepcopy(layer.cache)}
    assert kind_of(layer) == "linear"
    assert vars(layer) == before
    forwards = Logged.forwards
    model = nn.Sequential(layer, Logged(6, 4), Logged(8, 9))
    assert len(adapters.attach(model, "linear", r=2)) == 3
    assert Logged.forwards == forwards
    model[0](torch.randn(2, 6))
    assert kind_of(layer) == "linear"  # with tensors in its log


def test_a_trial_takes_no_random_numbers():
    # Python's stream is looked at within: what checks types in tests draws from it too.
    python = random.getstate()
    with linear_trial._random_numbers_kept():
        random.random()
    assert random.getstate() == python
    noisy, rarely = Noisy(6, 4), Rarely(6, 4)
    linear_trial._results.clear()
    before = torch.random.get_rng_state().tolist(), str(np.random.get_state())
    assert (kind_of(noisy), kind_of(rarely)) == ("weight", "weight")
    assert (torch.random.get_rng_state().tolist(), str(np.random.get_state())) == before


def test_a_layer_is_tried_with_the_attributes_that_it_has():
    layer: Any = Scaled(6, 4)
    kinds = []
    for layer.scale in (1.0, 2.0, 1.0, torch.tensor(3.0), [1.0]):
        kinds.append(kind_of(layer))
    assert kinds == ["linear", "weight", "linear", "weight", "weight"]


class Single(nn.Linear):
    """For float32 alone."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert input.dtype == torch.float32
        return super().forward(input)


class Widening(nn.Linear):
    """For bfloat16 alone, and gives float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert input.dtype == torch.bfloat16
        return super().forward(input).float()


@pytest.mark.parametrize(
    ("Layer", "dtype", "kind"),
    [
        (Single, torch.float32, "linear"),
        (Single, torch.float64, "weight"),
        (Single, torch.bfloat16, "weight"),
        (Widening, torch.bfloat16, "weight"),
    ],
)
def test_a_layer_for_one_dtype_is_tried_in_that(
    Layer: type[nn.Linear], dtype: torch.dtype, kind: str
):
    assert kind_of(Layer(6, 4).to(dtype)) == kind


class Attention(nn.Module):
    """As in diffusers."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])


class TransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.ff = Attention(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


class CrossAttnDownBlock2D(nn.Module):
    def __init__(self):
        super().__init__()
        self.attentions, self.time = nn.ModuleList([TransformerBlock()]), nn.Linear(4, 4)


class SelfAttention(nn.Module):
    """As in BERT, with a table of positions."""

    def __init__(self):
        super().__init__()
        self.query, self.positions = nn.Linear(4, 4), nn.Embedding(4, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(5, 2))


class BertLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention()})
        self.temporal = SelfAttention()
        self.c_attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (CrossAttnDownBlock2D, ["attentions.0.attn1.to_q", "attentions.0.attn1.to_out.0"]),
        (BertLike, ["attention.self.query", "temporal.query", "c_attn"]),
    ],
)
def test_attention_is_what_a_module_is_and_not_where_it_lies(
    block: type[nn.Module], names: list[str]
):
    sites = adapters.find_sites(nn.Sequential(block()), {"attention": Target("attention")})
    assert [site.name.removeprefix("0.") for site in sites] == names


def linear(count: int) -> list[nn.Linear]:
    return [nn.Linear(4, 4) for _ in range(count)]


class Projections(nn.Module):
    """Attention of which neither class nor name says so."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(3)


class BertLikeAttention(nn.Module):
    """Attention, and what projects its result."""

    def __init__(self):
        super().__init__()
        self.self, self.output = SelfAttention(), nn.Sequential(*linear(1))


class AttentionClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = SelfAttention(), nn.Linear(4, 2)


class MultiHeadAttention(nn.Module):
    """With a module for each head."""

    def __init__(self):
        super().__init__()
        self.attention_heads = nn.ModuleList([SelfAttention(), SelfAttention()])
        self.out = nn.Linear(4, 4)


class AttentionBlock(nn.Module):
    def __init__(self, attn: nn.Module):
        super().__init__()
        self.attn, self.mlp = attn, nn.Sequential(*linear(2))


class SequentialAttention(nn.Sequential):
    pass


class AttentionList(nn.ModuleList):
    pass


class AttentionDict(nn.ModuleDict):
    pass


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (SelfAttention(), "query"),
        (nn.MultiheadAttention(4, 2),
         "in_proj_weight_q in_proj_weight_k in_proj_weight_v out_proj"),
        (BertLikeAttention(), "self.query output.0"),
        (MultiHeadAttention(), "attention_heads.0.query attention_heads.1.query out"),
        (AttentionClassifier(), "attn.query"),
        (SequentialAttention(*linear(2)), "0 1"),
        (AttentionList(linear(2)), "0 1"),
        (AttentionDict({"q": nn.Linear(4, 4)}), "q"),
        (nn.Sequential(SequentialAttention(*linear(2)), *linear(1)), "0.0 0.1"),
        (AttentionList([TransformerBlock()]), "0.attn1.to_q 0.attn1.to_out.0"),
        (nn.Sequential(SelfAttention(), *linear(1)), "0.query"),
        (nn.ModuleDict({"attn": nn.Sequential(*linear(2)), "mlp": linear(1)[0]}), "attn.0 attn.1"),
        (nn.ModuleDict({"attentions": nn.ModuleList([Projections()])}), ""),
        (nn.ModuleDict({"attn_blocks": nn.ModuleList([TransformerBlock()])}),
         "attn_blocks.0.attn1.to_q attn_blocks.0.attn1.to_out.0"),
        (AttentionBlock(SelfAttention()), "attn.query"),
        (AttentionBlock(BertLikeAttention()), "attn.self.query attn.output.0"),
        (AttentionBlock(MultiHeadAttention()),
         "attn.attention_heads.0.query attn.attention_heads.1.query attn.out"),
        (AttentionBlock(nn.ModuleDict({"q": linear(1)[0], "v": linear(1)[0]})), "attn.q attn.v"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)  # fmt: skip
def test_attention_is_found_at_the_root_and_in_containers(model: nn.Module, names: str):
    sites = [site for site in candidate_sites(model) if site.attention]
    assert [site.name.removesuffix(".weight") for site in sites] == names.split()


def test_blocks_that_share_their_attention_are_still_blocks():
    shared = SelfAttention()
    model = nn.Sequential(AttentionBlock(shared), AttentionBlock(shared))
    assert attention_names(model) == {"0.attn", "1.attn"}
