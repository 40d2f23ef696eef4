"""The closed forms of analysis/theory.py.

Truth: gradient descent, plain loops, brute force and means over draws, never the formula again.

Run: make test ARGS=tests/analysis/test_theory_formulas.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from lora_lab.analysis import theory
from lora_lab.analysis.theory import Prediction


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def trained(loss, *parameters: torch.Tensor) -> float:
    """The loss that LBFGS reaches from where the parameters are."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=400,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore
    return loss().item()


X = normal(40, 9) @ normal(9, 9, seed=1)
Y = X @ normal(9, 7, seed=2) + normal(40, 7, seed=3)
START = normal(7, 2, seed=4) @ normal(2, 9, seed=5)
"""Correlated inputs, noise, and what an adapter that starts from the weight starts from."""


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("start", [None, START], ids=["zero", "weight"])
def test_fit_is_what_training_of_both_factors_reaches(r: int, start: torch.Tensor | None):
    A, B = normal(r, 9, seed=6), normal(7, r, seed=7)
    zero = torch.zeros(7, 9, dtype=torch.float64) if start is None else start
    loss = trained(lambda: F.mse_loss(X @ (B @ A - zero).T, Y), A, B)
    fit = theory.least_squares(X, Y, r, start=start)
    assert fit.loss == pytest.approx(loss, rel=1e-7)
    torch.testing.assert_close(fit.delta, (B @ A - zero).detach(), rtol=1e-3, atol=1e-4)
    assert fit.is_unique


def test_fit_with_frozen_factors_is_what_training_of_the_rest_reaches():
    A, B = normal(3, 9, seed=6), normal(7, 3, seed=7)
    for frozen in ({"A": A}, {"B": B}, {"A": A, "B": B}):
        free = {"A": A.clone(), "B": B.clone()}
        core = torch.zeros(3, 3, dtype=torch.float64)
        trains = [free[name] for name in free if name not in frozen] or [core]

        def delta(free=free, core=core, frozen=frozen) -> torch.Tensor:
            return free["B"] @ (core if len(frozen) == 2 else torch.eye(3).double()) @ free["A"]

        loss = trained(lambda delta=delta: F.mse_loss(X @ delta().T, Y), *trains)
        fit = theory.least_squares(X, Y, A=frozen.get("A"), B=frozen.get("B"))
        assert fit.loss == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(fit.delta, delta().detach(), rtol=1e-4, atol=1e-5)


def test_fit_of_any_rank_is_least_squares():
    solution = torch.linalg.lstsq(X, Y)
    fit = theory.least_squares(X, Y)
    torch.testing.assert_close(fit.delta, solution.solution.T)
    assert fit.loss == pytest.approx((X @ solution.solution - Y).square().mean().item())


def test_fit_knows_when_it_is_not_the_only_one():
    few = X[:5]
    assert not theory.least_squares(few, Y[:5], 2).is_unique
    assert theory.least_squares(few, Y[:5]).loss == pytest.approx(0, abs=1e-18)
    never = X.clone()
    never[:, 4] = 0
    fit = theory.least_squares(never, Y, 2)
    assert not fit.is_unique
    assert fit.delta[:, 4].abs().max() < 1e-12
    square = torch.eye(4).double()
    assert not theory.least_squares(square, square, 2).is_unique  # any two of four equal directions


def test_whitened_inputs_leave_the_planted_values_that_do_not_fit():
    white = orthonormal(64, 12, 1) * 8
    sigma = torch.tensor([4.0, 3, 2, 1]).double()
    delta = orthonormal(10, 4, 2) * sigma @ orthonormal(12, 4, 3).T
    floors = [theory.least_squares(white, white @ delta.T, r).loss * 10 for r in range(1, 5)]
    assert floors == pytest.approx([14, 5, 1, 0], abs=1e-9)


@pytest.mark.parametrize("trains", ["A", "B", "core"])
def test_frozen_share_is_the_mean_over_frozen_factors(trains: str):
    out, d, r, X = 12, 16, 3, torch.eye(16).double()
    delta = normal(out, 2, seed=1) @ normal(2, d, seed=2)
    shares = []
    for seed in range(400):
        held = {"A": normal(r, d, seed=1000 + seed), "B": normal(out, r, seed=2000 + seed)}
        frozen = {n: t for n, t in held.items() if trains == "core" or n != trains}
        left = theory.least_squares(X, X @ delta.T, A=frozen.get("A"), B=frozen.get("B")).loss
        shares.append(left / delta.square().mean().item())
    shares = torch.tensor(shares)
    error = shares.std().item() / 20
    assert error < 0.01
    assert theory.frozen_share(trains, r, out, d) == pytest.approx(
        shares.mean().item(), abs=4 * error
    )


@pytest.mark.parametrize("r", [2, 5, 10])
def test_excess_loss_is_that_of_fits_on_new_rows(r: int):
    n, d, out, k, noise = 60, 14, 10, 2, 0.3
    delta = 5 * orthonormal(out, k, 1) @ orthonormal(d, k, 2).T
    excess = []
    for seed in range(150):
        X = normal(n, d, seed=100 + seed)
        Y = X @ delta.T + noise * normal(n, out, seed=900 + seed)
        missed = theory.least_squares(X, Y, r).delta - delta
        excess.append(missed.square().sum().item() / out)  # the mean over new white rows
    measured = torch.tensor(excess)
    error = measured.std().item() / math.sqrt(len(excess))
    assert theory.excess_loss(n, d, out, k, r, noise) == pytest.approx(
        measured.mean().item(), abs=4 * error
    )


def test_noisy_sigma_and_its_threshold_are_those_of_large_matrices():
    out, d, tau = 400, 600, 0.04
    threshold = theory.threshold(out, d, tau)
    U, V = orthonormal(out, 2, 1), orthonormal(d, 2, 2)
    sigma = torch.tensor([2.5 * threshold, 1.5 * threshold]).double()
    noise = tau * normal(out, d, seed=3)
    measured = torch.linalg.svdvals(U * sigma @ V.T + noise)[:3]
    expected = [theory.noisy_sigma(s, out, d, tau) for s in (*sigma.tolist(), 0.5 * threshold)]
    assert measured.tolist() == pytest.approx(expected, rel=0.02)
    just = (theory.noisy_sigma(x * threshold, out, d, tau) for x in (1 - 1e-6, 1 + 1e-6))
    assert next(just) == pytest.approx(next(just))


def test_intruders_are_the_strengths_over_the_threshold():
    out, d, tau = 192, 256, 0.5
    for seed, ratios in enumerate([(4, 3, 2.1, 0.4), (0.5, 0.3), (5, 4, 3, 2.5, 2.1, 0.4, 0.3)]):
        strengths = torch.tensor(ratios).double() * theory.threshold(out, d, tau)
        W = tau * normal(out, d, seed=seed)
        U, V = (orthonormal(size, len(ratios), 9 + seed) for size in (out, d))
        before, after = (torch.linalg.svd(M)[0] for M in (W, W + U * strengths @ V.T))
        count = sum(bool((before.T @ u).abs().max() < 0.5) for u in after.T[:10])
        assert theory.intruders(strengths.tolist(), out, d, tau) == count
    assert theory.intruders([100.0] * 12, 192, 256, 0.5) == 10
    assert theory.intruders([100.0], 128, 256, 0.5) is None
    assert theory.intruders([1.9 * theory.threshold(192, 256, 0.5)], 192, 256, 0.5) is None


@pytest.mark.parametrize("size", [(6, 6), (3, 7)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_tap_weights_are_what_taps_see_of_ones(size: tuple[int, int], k: int):
    ones = torch.ones(1, 1, *size, dtype=torch.float64)
    seen = F.unfold(ones, k, padding=k // 2)[0].mean(1).view(k, k)
    torch.testing.assert_close(theory.tap_weights(k, *size), seen)


def test_with_tap_weights_the_floor_is_that_of_padded_white_images():
    C, H, W, k, out = 2, 4, 5, 3, 6
    images = (orthonormal(C * H * W, C * H * W, 1) * math.sqrt(C * H * W)).view(-1, C, H, W)
    delta = normal(out, C * k * k, seed=2)
    y = F.conv2d(images, delta.view(out, C, k, k), padding=1)
    patches = F.unfold(images, k, padding=1).mT.flatten(0, 1)
    weights = theory.tap_weights(k, H, W).sqrt().flatten().repeat(C)
    sigma = torch.linalg.svdvals(delta * weights)
    for r in (1, 3, 6):
        floor = theory.least_squares(patches, y.flatten(2).mT.flatten(0, 1), r).loss
        assert floor * out == pytest.approx(sigma[r:].square().sum().item(), abs=1e-12)


def test_group_sigma_is_that_of_the_whole_table():
    sizes, shifts = (5, 1, 9), normal(3, 6)
    table = torch.cat([shifts[g].expand(size, -1) for g, size in enumerate(sizes)])
    full = torch.linalg.svdvals(table)
    torch.testing.assert_close(theory.group_sigma(sizes, shifts), full[:3])
    assert full[3] < 1e-12


@pytest.mark.parametrize(("i", "j"), [(2, 3), (4, 6), (8, 8)])
@pytest.mark.parametrize("k", [0, 3])
def test_similarity_is_the_mean_over_bases_that_share_directions(i: int, j: int, k: int):
    d, overlaps = 20, []
    for seed in range(300):
        bases = []
        for size, key in ((i, 2 * seed), (j, 2 * seed + 1)):
            shared = torch.eye(d, k, dtype=torch.float64)
            bases.append(
                torch.linalg.qr(torch.cat([shared, normal(d, 8, seed=key)], 1)).Q[:, :size]
            )
        overlaps.append((bases[0].T @ bases[1]).square().sum().item() / min(i, j))
    measured = torch.tensor(overlaps)
    error = measured.std().item() / math.sqrt(300)
    prediction = theory.similarity(i, j, d, k)
    assert prediction.value == pytest.approx(measured.mean().item(), abs=4 * error + 1e-6)
    assert prediction.standard_error == pytest.approx(measured.std().item(), rel=0.15, abs=1e-6)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("r", [2, 8])
def test_the_first_step_is_that_of_plain_adam_over_draws_of_A(init: str, r: int):
    d, out, scale, lr = 256, 24, 2.0, 1e-3
    X, Y = normal(64, d, seed=1), normal(64, out, seed=2) @ normal(out, out, seed=3)
    W = torch.zeros(out, d, dtype=torch.float64, requires_grad=True)
    (G,) = torch.autograd.grad(F.mse_loss(X @ W.T, Y), W)
    ratios, descents = [], []
    for seed in range(200):
        uniform = torch.rand(r, d, generator=draws(seed), dtype=torch.float64) * 2 - 1
        A = uniform / d**0.5 if init == "kaiming" else normal(r, d, seed=100 + seed)
        A.requires_grad_()
        B = torch.zeros(out, r, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([A, B], lr=lr)
        F.mse_loss(X @ (scale * B @ A).T, Y).backward()
        ratios.append((B.grad.norm() / G.norm()).item())  # pyright: ignore
        optimizer.step()
        moved = (-G * (scale * B @ A)).sum() / (lr * G.norm(dim=1).sum())
        descents.append(moved.item())
    for form, values in ((theory.gradient_ratio, ratios), (theory.descent, descents)):
        expected, measured = form(G, r, scale, init), torch.tensor(values)
        assert isinstance(expected, Prediction)
        assert expected.standard_error == pytest.approx(measured.std().item(), rel=0.2)
        # The root of a mean square is over the mean by half its squared relative error.
        bias = expected.standard_error**2 / expected.value
        mean = measured.mean().item()
        assert mean == pytest.approx(
            expected.value, abs=4 * expected.standard_error / 200**0.5 + bias
        )


def test_the_gradient_ratio_varies_less_where_one_input_makes_it():
    G = normal(6, 40)
    G[:, 0] *= 50  # its one entry of each of A's rows decides: a uniform's tails, not a normal's
    draws_of_A = (torch.rand(4000, 8, 40, generator=draws(), dtype=torch.float64) * 2 - 1) / 40**0.5
    ratios = torch.linalg.matrix_norm(G @ draws_of_A.mT) / torch.linalg.matrix_norm(G)
    expected = theory.gradient_ratio(G, 8, 1.0, "kaiming")
    assert expected.standard_error == pytest.approx(ratios.std().item(), rel=0.1)
