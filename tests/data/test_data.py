"""Data sets: what is drawn, that seed, phase and epoch alone decide it, and the known best ΔW.

Truth: the definition of each data set written out, counts, plain least squares in float64.

Run: make test ARGS=tests/data/test_data.py
"""

from collections import Counter
from functools import partial
from math import log
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F

from lora_lab import adapters
from lora_lab.config.options import options
from lora_lab.data.bytes import Bytes
from lora_lab.data.digits import Digits
from lora_lab.data.group_shift import GroupShift
from lora_lab.data.module import Batches, Data
from lora_lab.data.planted_conv import PlantedConv
from lora_lab.data.planted_embedding import PlantedEmbedding
from lora_lab.data.planted_linear import PlantedLinear
from lora_lab.data.shift import Shift
from lora_lab.models.bigram import Bigram
from lora_lab.models.conv import Conv
from lora_lab.models.embedding import Embedding
from lora_lab.models.linear import Linear
from lora_lab.models.transformer import Transformer

small_shift = partial(
    Shift, samples=64, in_features=6, out_features=5, shift=2.0, batch_size=10, seed=0
)
small_bytes = partial(Bytes, size=5000, context=16, held_out=0.25, batch_size=32, seed=0)
PLANTED = {
    "planted_linear": partial(
        PlantedLinear,
        **{"samples": 16, "in_features": 8, "out_features": 7, "sigma": [3.0, 2.0, 1.0]},
        **{"spread": 0.3, "correlation": 0.5, "whiten": True, "noise": 0.1, "expects": "end"},
        **{"steps": 3, "seed": 0},
    ),
    "planted_conv": partial(
        PlantedConv,
        **{"samples": 32, "in_features": 2, "out_features": 5, "kernel_size": 3, "size": 4},
        **{"sigma": [3.0, 2.0, 1.0], "whiten": True, "noise": 0.1, "steps": 3, "seed": 0},
    ),
    "planted_embedding": partial(
        PlantedEmbedding,
        **{"samples": 60, "in_features": 20, "out_features": 6, "sigma": [3.0, 2.0, 1.0]},
        **{"zipf": 1.5, "noise": 0.1, "steps": 3, "seed": 0},
    ),
    "group_shift": partial(
        GroupShift,
        **{"in_features": 20, "out_features": 6, "groups": [8, 5, 3], "shift": 1.0},
        **{"noise": 0.1, "steps": 3, "seed": 0},
    ),
}
EVERY = {
    **PLANTED,
    "shift": small_shift,
    "digits": partial(Digits, batch_size=32, seed=0),
    "bytes": small_bytes,
}
"""Every data set that reads no file of a user, small."""


def ready(make, **changes) -> Data:
    data = make(**changes)
    data.setup("fit")
    return data


def batches(data: Data, epoch: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader = data.train_dataloader()
    if data.batch_size is not None:
        loader.sampler.set_epoch(epoch)  # pyright: ignore
    return list(loader)


def same(one, two) -> bool:
    return all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_table_has_every_data_set():
    assert {*EVERY, "docstrings", "images", "language", "text", "words"} == {*options()["data"]}


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
@pytest.mark.parametrize("phase", ["base", "adapt"])
def test_seed_phase_and_epoch_alone_decide(make, phase: str):
    data = ready(make, phase=phase)
    first, all_rows = batches(data), data.batch_size is None
    torch.manual_seed(torch.seed() % 1000)
    assert same(first, batches(ready(make, phase=phase)))
    assert same(first, batches(ready(make, phase=phase), epoch=1)) == all_rows
    assert not same(first[:1], batches(ready(make, phase=phase, seed=1))[:1])


def test_the_phases_have_orders_of_their_own():
    orders = [
        list(ready(small_shift, phase=phase).train_dataloader().sampler)
        for phase in ("base", "adapt")
    ]
    assert not torch.equal(orders[0][0], orders[1][0])


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
def test_loading_draws_nothing_from_the_global_stream(make):
    data = ready(make, phase="adapt")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(data)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
def test_validation_is_every_row_once(make):
    data = ready(make, phase="adapt")
    data.eval_rows = 7
    x = torch.cat([x for x, _ in data.val_dataloader()])
    assert torch.equal(x, data.val.tensors[0])  # pyright: ignore


@pytest.mark.parametrize("differ_in", ["batch", "epoch"])
def test_batches_are_drawn_without_replacement(differ_in):
    rows = list(Batches(25, 10, differ_in, ("key",)))
    assert [len(batch) for batch in rows] == [10, 10]
    assert all(len(set(batch.tolist())) == 10 for batch in rows)
    distinct = len(set(torch.cat(rows).tolist()))
    assert distinct == 20 if differ_in == "epoch" else distinct <= 20


def test_rows_drawn_within_a_batch_alone_come_again_in_the_next():
    rows = list(Batches(20, 10, "batch", ("key",)))
    assert len(set(torch.cat(rows).tolist())) < 20


def test_every_row_is_as_likely_as_every_other():
    sampler, counts = Batches(10, 3, "batch", (0,)), torch.zeros(10)
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        for batch in sampler:
            counts[batch] += 1
    # 3000 batches of 3 of 10 rows: 900 each, with a standard deviation of √(3000·0.3·0.7) = 25.
    assert (counts - 900).abs().max() < 4 * 25.1


def test_shift_moves_every_entry_and_draws_x_afresh():
    base, adapt = (ready(small_shift, phase=phase) for phase in ("base", "adapt"))
    x, y = (t.double() for t in base.train.tensors)  # pyright: ignore
    x2, y2 = (t.double() for t in adapt.train.tensors)  # pyright: ignore
    theta, theta2 = torch.linalg.lstsq(x, y).solution, torch.linalg.lstsq(x2, y2).solution
    torch.testing.assert_close(theta2 - theta, torch.full_like(theta, 2.0), rtol=1e-5, atol=1e-5)
    assert not torch.equal(x, x2)
    assert abs(x.mean()) < 4 * x.numel() ** -0.5


def test_shift_is_standard_normal_at_size():
    data = ready(small_shift, phase="base", samples=4000, in_features=50)
    x = data.train.tensors[0]  # pyright: ignore
    assert abs(x.mean()) < 4 * x.numel() ** -0.5
    assert abs(x.std() - 1) < 4 * x.numel() ** -0.5


def test_digits_base_knows_five_and_the_rest_come_later():
    base, adapt = (ready(EVERY["digits"], phase=phase) for phase in ("base", "adapt"))
    for data, digits in ((base, range(5)), (adapt, range(10))):
        for part in (data.train, data.val):
            x, y = part.tensors  # pyright: ignore
            assert set(y.tolist()) == set(digits)
            assert (x.min(), x.max()) == (0, 1)
    sizes = [len(part) for part in (adapt.train, adapt.val)]  # pyright: ignore
    assert sum(sizes) == 1797
    assert sizes[1] == 360
    for part in (adapt.train, adapt.val):
        y = part.tensors[1]  # pyright: ignore
        shares = torch.bincount(y) / len(y)
        assert (shares - 0.1).abs().max() < 0.005  # as in the full set
    # What the base trained on is in the training part of the adaptation, never in its validation.
    learned = {tuple(row.tolist()) for row in base.train.tensors[0]}  # pyright: ignore
    assert not learned & {tuple(row.tolist()) for row in adapt.val.tensors[0]}  # pyright: ignore


def test_bytes_are_code_and_then_prose_each_followed_by_the_next():
    base, adapt = (ready(small_bytes, phase=phase) for phase in ("base", "adapt"))
    texts = []
    for data in (base, adapt):
        x, y = (torch.cat([data.train.tensors[i], data.val.tensors[i]]) for i in (0, 1))  # pyright: ignore
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
        assert x.shape == (312, 16)  # ⌊4999 / 16⌋ windows
        assert len(data.val) == 78  # pyright: ignore
        texts.append(bytes(x.flatten().tolist()).decode())
    assert "import os as _os" in texts[0]
    assert "\n".join(topics[name] for name in sorted(topics)).startswith(texts[1])
    not_held_out = ready(small_bytes, phase="adapt", held_out=0)
    assert not_held_out.val is not_held_out.train


def test_a_bigrams_floor_is_the_entropy_of_the_next_byte():
    data = ready(small_bytes, phase="adapt", held_out=0)
    x, y = (t.flatten().tolist() for t in data.train.tensors)  # pyright: ignore
    pairs, current = Counter(zip(x, y, strict=True)), Counter(x)
    floor = sum(n * log(current[i] / n) for (i, _), n in pairs.items()) / len(x)
    model = Bigram(256, 256)
    assert data.predicted_metrics(model)["val/loss"].value == pytest.approx(floor)
    with torch.no_grad():
        logits = torch.full((256, 256), -1e9)
        for (i, j), n in pairs.items():
            logits[i, j] = log(n)
        assert F.cross_entropy(logits[x], torch.tensor(y)).item() == pytest.approx(floor)

    r = len(current)  # a ΔW of this rank can be anything on the rows that occur
    for rank, trains, dropout, known in (
        (r, "both", 0.0, True),
        (r - 1, "both", 0.0, False),
        (r, "zero", 0.0, False),
        (r, "both", 0.1, False),
    ):
        adapters.attach(model, "embedding", r=rank, alpha=8, trains=trains, dropout=dropout)
        assert bool(data.predicted_metrics(model)) == known, (rank, trains, dropout)
        adapters.detach(model)
    assert not ready(small_bytes, phase="adapt").predicted_metrics(model)
    assert not data.predicted_metrics(Transformer(256, 256, width=8, heads=1, layers=1, context=16))


@pytest.mark.parametrize("make", list(PLANTED.values()), ids=list(PLANTED))
def test_all_the_rows_are_every_batch(make):
    data = ready(make, phase="adapt")
    assert len(batches(data)) == 3
    assert all(same([batch], [data.train.tensors]) for batch in batches(data))  # pyright: ignore


def adapted(data: Data, **recipe) -> torch.nn.Module:
    """A model in float64 that is not quite the base, with an adapter of that recipe or none."""
    one_of = {PlantedLinear: Linear, PlantedConv: Conv}
    torch.manual_seed(0)
    model = one_of.get(type(data), Embedding)(**data.sizes).double()  # pyright: ignore
    if recipe:
        adapters.attach(model, "all", r=2, alpha=4, seed=0, **recipe)
    return model


def learn(model: torch.nn.Module, data: Data) -> float:
    """The loss that LBFGS reaches."""
    x, y = (t.double() if t.is_floating_point() else t for t in data.train.tensors)  # pyright: ignore
    optimizer = torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad],
        max_iter=1000,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore
    return F.mse_loss(model(x), y).item()


LEARNERS = {
    "lora": {"init": "kaiming"},
    "full": {},
    "lora_fa": {"trains": "zero"},
    "lora_xs": {"trains": "core", "init": "svd"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "mica": {"init": "mica", "trains": "zero"},
}


@pytest.mark.parametrize("recipe", list(LEARNERS.values()), ids=list(LEARNERS))
@pytest.mark.parametrize("make", list(PLANTED.values()), ids=list(PLANTED))
def test_what_is_expected_is_what_training_reaches(make, recipe):
    data = ready(make, phase="adapt")
    model = adapted(data, **recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = data.predicted_metrics(model)
    loss = learn(model, data)
    assert loss == pytest.approx(expected.pop("val/loss").value, rel=1e-5)
    deltas = adapters.deltas(model) or {
        name.rpartition(".")[0]: p - before[name] for name, p in model.named_parameters()
    }
    ((site, delta),) = deltas.items()
    sigma = torch.linalg.svdvals(delta.detach().flatten(1))
    # Tokens that never come move as the factors from the weight do, and no formula says how.
    start = adapters.INITS[recipe.get("init", "kaiming")]
    never = isinstance(data, PlantedEmbedding) and start.starts_nonzero
    assert bool(expected) != never
    for i in range(4):
        if (prediction := expected.pop(f"spectra/{site}/sigma_{i + 1}", None)) is not None:
            assert sigma[i].item() == pytest.approx(prediction.value, rel=1e-3)
    assert not expected


@pytest.mark.parametrize("make", list(PLANTED.values()), ids=list(PLANTED))
def test_nothing_is_expected_of_what_theory_does_not_reach(make):
    data = ready(make, phase="adapt")
    assert data.predicted_metrics(adapted(data, dora=True)) == {}
    assert data.predicted_metrics(adapted(data, dropout=0.1)) == {}
    many = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 7))
    assert data.predicted_metrics(many) == {}


@pytest.mark.parametrize("phase", ["base", "adapt"])
def test_whitened_inputs_have_the_covariance_itself(phase: str):
    x = ready(PLANTED["planted_linear"], phase=phase).train.tensors[0].double()  # pyright: ignore
    covariance = [[0.5 ** abs(i - j) for i in range(8)] for j in range(8)]
    torch.testing.assert_close(x.T @ x / 16, torch.tensor(covariance).double(), rtol=0, atol=1e-6)
    images = ready(PLANTED["planted_conv"], phase=phase).train.tensors[0]  # pyright: ignore
    x = images.flatten(1).double()
    torch.testing.assert_close(x.T @ x / 32, torch.eye(32).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["planted_linear", "planted_conv", "planted_embedding"])
def test_the_change_has_the_planted_singular_values(name: str):
    base, adapt = (ready(PLANTED[name], phase=phase, noise=0.0) for phase in ("base", "adapt"))
    learned = [adapted(data) for data in (base, adapt)]
    for model, data in zip(learned, (base, adapt), strict=True):
        assert learn(model, data) < 1e-10
    (W,), (moved,) = ([*model.parameters()] for model in learned)
    change = (moved - W).detach().flatten(1)
    if name == "planted_embedding":
        seen = base.train.tensors[0].unique()  # pyright: ignore
        unseen = torch.ones(20).bool().index_fill(0, seen, False)
        assert unseen.any()
        assert not change[unseen].any()
        change = change + torch.where(unseen[:, None], base.delta, 0)  # pyright: ignore
    sigma = torch.linalg.svdvals(change)
    torch.testing.assert_close(sigma[:3], torch.tensor([3.0, 2, 1]).double(), rtol=1e-4, atol=0)
    assert sigma[3] < 1e-4


def test_tokens_come_in_zipf_proportions():
    counts = ready(PLANTED["planted_embedding"], phase="base").counts()  # pyright: ignore
    assert counts.sum() == 60
    share = torch.tensor([60 / v**1.5 for v in range(1, 21)]).double()
    share = share / share.sum() * 60
    assert (counts - share).abs().max() < 1
    left = share - share.floor()
    assert left[counts > share].min() > left[counts < share].max()
    assert 0 in counts
    tokens = ready(PLANTED["planted_embedding"], phase="adapt").train.tensors[0]  # pyright: ignore
    assert torch.equal(tokens.bincount(minlength=20), counts)


def test_a_group_moves_by_one_vector():
    base, adapt = (ready(PLANTED["group_shift"], phase=p, noise=0.0) for p in ("base", "adapt"))
    change = adapt.train.tensors[1] - base.train.tensors[1]  # pyright: ignore
    for group in change.split([8, 5, 3, 4]):
        torch.testing.assert_close(group, group[:1].expand_as(group), rtol=0, atol=1e-6)
    assert not change[16:].any()
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 3


def test_what_else_a_planted_linear_map_expects():
    make = partial(PLANTED["planted_linear"], phase="adapt", noise=0.0, correlation=0.0)
    first = ready(make, expects="first_step")
    assert set(first.predicted_metrics(adapted(first, init="gaussian"))) == {
        "first_step/gradient_ratio",
        "first_step/descent",
    }
    assert first.predicted_metrics(adapted(first, init="orthogonal")) == {}
    assert first.predicted_metrics(adapted(first)) == {}
    large = {"samples": 256, "in_features": 256, "out_features": 192, "spread": 1 / 16}
    over = ready(make, expects="intruders", sigma=[5.0, 4.0, 0.1], **large)
    theta = (over.train.tensors[1].T @ over.train.tensors[0] / 256).double()  # pyright: ignore
    model = adapted(over, init="kaiming")
    model.linear._parameters["weight"].data = theta - over.delta  # pyright: ignore
    assert over.predicted_metrics(model)["spectra/linear/intruders"].value == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("planted_linear", {"samples": 7}, "samples=7: whiten needs in_features=8"),
        ("planted_linear", {"sigma": [1.0] * 8}, "8 singular values, and 7 × 8 has 7"),
        ("planted_conv", {"samples": 31}, "samples=31: whiten needs an image a pixel, 32"),
        ("planted_conv", {"kernel_size": 2}, "kernel_size=2: must be odd"),
        ("planted_embedding", {"sigma": [1.0] * 7}, "7 singular values, and 20 × 6 has 6"),
        ("group_shift", {"groups": [20, 1]}, "21 tokens, and in_features=20"),
    ],
)
def test_what_cannot_be_planted_is_an_error(name: str, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PLANTED[name](phase="base", **change)
