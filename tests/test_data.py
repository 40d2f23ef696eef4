"""Data modules: what is drawn, and that seed, phase and epoch alone decide it."""

from functools import partial

import pytest
import torch

from lora_lab.data import Batches, Data
from lora_lab.data.digits import Digits
from lora_lab.data.shift import Shift
from lora_lab.options import options

small_shift = partial(
    Shift, samples=64, in_features=6, out_features=5, shift=2.0, batch_size=10, seed=0
)
EVERY = {"shift": small_shift, "digits": partial(Digits, batch_size=32, seed=0)}
"""Every data set, small."""


def ready(make, **changes) -> Data:
    data = make(**changes)
    data.setup("fit")
    return data


def batches(data: Data, epoch: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # pyright: ignore
    return list(loader)


def same(one, two) -> bool:
    return all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_table_has_every_data_set():
    assert sorted(EVERY) == sorted(options()["data"])


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
@pytest.mark.parametrize("phase", ["base", "adapt"])
def test_seed_phase_and_epoch_alone_decide(make, phase: str):
    first = batches(ready(make, phase=phase))
    torch.manual_seed(torch.seed() % 1000)
    assert same(first, batches(ready(make, phase=phase)))
    assert not same(first, batches(ready(make, phase=phase), epoch=1))
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
        assert (shares - 0.1).abs().max() < 0.005  # as in the whole set
    # What the base trained on is in the training part of the adaptation, never in its validation.
    learned = {tuple(row.tolist()) for row in base.train.tensors[0]}  # pyright: ignore
    assert not learned & {tuple(row.tolist()) for row in adapt.val.tensors[0]}  # pyright: ignore
