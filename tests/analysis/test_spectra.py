"""Spectra, SVDs, their measures, and the comparisons of subspaces.

Truth: float64 SVDs of the dense product, spectra with measures known in closed form, and angles
that are built in.

Run: make test ARGS=tests/analysis/test_spectra.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.analysis.directions import (
    amplification,
    grassmann_distance,
    is_intruder,
    principal_angles,
    projection,
    similarity,
)
from lora_lab.analysis.spectra import (
    SVD,
    Spectrum,
    spectra_of_sites,
    spectrum_of_blocks,
    spectrum_of_factors,
    spectrum_of_matrix,
    svd_of_factors,
    svd_of_matrix,
)


@st.composite
def factors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A and B of any shape, with singular values over six decades, in any dtype."""
    out, rest = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    r = draw(st.integers(1, min(out, rest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    decades = torch.logspace(0, -draw(st.integers(0, 6)), r, dtype=torch.float64)
    if draw(st.booleans()):
        decades[:] = 1.0  # repeated values
    U, _ = torch.linalg.qr(torch.randn(out, r, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(rest, r, generator=generator, dtype=torch.float64))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    scale = draw(st.sampled_from([1.0, 0.125, -3.0]))
    return (decades.sqrt()[:, None] * V.T).to(dtype), (U * decades.sqrt()).to(dtype), scale


@settings(deadline=None, max_examples=300)
@given(factors())
def test_spectrum_of_factors_is_that_of_the_product(
    drawn: tuple[torch.Tensor, torch.Tensor, float],
):
    A, B, scale = drawn
    expected = torch.linalg.svdvals(scale * B.double() @ A.double())[: A.shape[0]]
    sigma = spectrum_of_factors(A, B, scale).singular_values
    seen = expected > 1e-6 * expected[0]
    torch.testing.assert_close(sigma[seen], expected[seen], rtol=1e-5, atol=0)
    assert sigma.shape == (A.shape[0],)


def test_from_matrix_is_the_svd():
    W = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(spectrum_of_matrix(W).singular_values, expected)


def spectrum(*sigma: float) -> Spectrum:
    values = torch.tensor(sigma, dtype=torch.float64)
    return Spectrum(values, (100, 50), torch.finfo(torch.float32).eps)


def test_measures_of_equal_values_are_their_number():
    even = spectrum(2.0, 2.0, 2.0, 2.0)
    assert even.effective_rank == pytest.approx(4)
    assert even.stable_rank == pytest.approx(4)
    assert even.energy_90 == 4
    assert even.energy_99 == 4
    assert even.numerical_rank == 4
    assert even.frobenius == pytest.approx(4)
    assert even.nuclear == pytest.approx(8)


def test_measures_of_a_known_spectrum():
    known = spectrum(3.0, 1.0, 0.0)
    p = (0.75, 0.25)
    assert known.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert known.stable_rank == pytest.approx(10 / 9)
    assert (known.energy_90, known.energy_99, known.numerical_rank) == (1, 2, 2)
    assert known.measures()["sigma_2"] == 1.0
    eps = known.eps
    assert spectrum(1.0, 101 * eps, 99 * eps).numerical_rank == 2  # 100 × 50: max is 100


def test_energy_ranks_hold_their_share_and_no_less_does():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sigma = torch.rand(20, generator=generator, dtype=torch.float64).sort(descending=True)[0]
        energy = sigma.square()
        for share in (0.1, 0.5, 0.9, 0.99):
            k = spectrum(*sigma.tolist()).energy_rank(share)
            assert energy[:k].sum() >= share * energy.sum()
            assert energy[: k - 1].sum() < share * energy.sum()


def test_numerical_rank_of_rounded_factors_is_their_rank():
    torch.manual_seed(0)
    A, B = torch.randn(5, 300), torch.randn(200, 5)
    B[:, 4] = B[:, 0] + B[:, 1]
    assert spectrum_of_factors(A, B).numerical_rank == 4
    A[4] = A[0] * 2
    A[3] = A[0] - 3 * A[4]
    assert spectrum_of_factors(A, B).numerical_rank == spectrum_of_matrix(B @ A).numerical_rank == 3


@pytest.mark.parametrize(
    "zero", [spectrum(0.0, 0.0), spectrum_of_factors(torch.ones(2, 5), torch.zeros(4, 2))]
)
def test_every_measure_of_zero_is_zero(zero: Spectrum):
    assert set(zero.measures().values()) == {0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_errors_that_name_the_factor(bad: float):
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    A[0, 0] = bad
    with pytest.raises(ValueError, match=r"A \(2 × 3\) holds NaN or infinity"):
        spectrum_of_factors(A, B)
    with pytest.raises(ValueError, match="delta"):
        spectrum_of_matrix(A)


def test_bfloat16_has_a_numerical_rank():
    A, B = torch.randn(3, 2000).bfloat16(), torch.randn(1000, 3).bfloat16()
    assert spectrum_of_factors(A, B).numerical_rank == 3


def orthonormal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q


@settings(deadline=None, max_examples=200)
@given(factors())
def test_svd_of_factors_is_the_product(drawn: tuple[torch.Tensor, torch.Tensor, float]):
    A, B, scale = drawn
    product = scale * B.double() @ A.double()
    svd = svd_of_factors(A, B, scale)
    torch.testing.assert_close(svd.cut(A.shape[0]), product, rtol=1e-9, atol=1e-12)
    identity = torch.eye(len(svd.S), dtype=torch.float64)
    torch.testing.assert_close(svd.U.T @ svd.U, identity)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, identity)
    assert (svd.S.diff() <= 0).all()
    dense = svd_of_matrix(product)
    k = len(svd.S) // 2
    error = torch.linalg.matrix_norm(product - svd.cut(k))
    best = torch.linalg.vector_norm(dense.S[k:])
    torch.testing.assert_close(error, best, rtol=1e-6, atol=1e-12)


def test_sites_of_one_shape_in_one_call_are_the_sites_one_by_one():
    torch.manual_seed(0)
    shapes = [(3, 8, 5), (3, 8, 5), (2, 8, 5), (3, 8, 5), (3, 5, 8)]
    sites = {
        f"site{i}": (torch.randn(r, rest), torch.randn(out, r), 0.5 + i)
        for i, (r, out, rest) in enumerate(shapes)
    }
    stacked = spectra_of_sites(sites)
    assert list(stacked) == list(sites)
    for site, factors_of_site in sites.items():
        single = spectrum_of_factors(*factors_of_site)
        torch.testing.assert_close(stacked[site].singular_values, single.singular_values)
        assert stacked[site].shape == single.shape


def test_together_is_the_block_diagonal_matrix():
    torch.manual_seed(0)
    blocks = [torch.randn(4, 3), torch.randn(2, 6)]
    dense = spectrum_of_matrix(torch.block_diag(*blocks))
    of_blocks = spectrum_of_blocks(spectrum_of_matrix(block) for block in blocks)
    values = dense.singular_values
    torch.testing.assert_close(of_blocks.singular_values, values[: len(of_blocks.singular_values)])
    assert of_blocks.shape == dense.shape
    assert of_blocks.effective_rank == pytest.approx(dense.effective_rank)


def test_energies_are_of_90_and_99_percent():
    assert spectrum(0.88**0.5, 0.12**0.5).energy_90 == 2
    assert spectrum(0.91**0.5, 0.09**0.5).energy_90 == 1
    assert spectrum(0.992**0.5, 0.008**0.5).energy_99 == 1
    assert spectrum(0.985**0.5, 0.015**0.5).energy_99 == 2


def test_the_coarser_rounding_is_that_of_several_sites():
    one = spectrum(1.0)
    double = Spectrum(one.singular_values, one.shape, torch.finfo(torch.float64).eps)
    assert spectrum_of_blocks([one, double]).eps == spectrum_of_blocks([double, one]).eps == one.eps


def test_participation_ratio():
    assert spectrum(3.0, 1.0).participation_ratio == pytest.approx(100 / 82)
    assert spectrum(2.0, 2.0, 0.0).participation_ratio == pytest.approx(2)


def test_similarity_is_its_definition_and_blind_to_signs_and_turns():
    frame, V = orthonormal(20, 20), orthonormal(20, 6, seed=1)
    U, rest = frame[:, :4], frame[:, 4:8]
    phi = similarity(U, V)
    for i in range(1, 5):
        for j in range(1, 7):
            expected = torch.linalg.matrix_norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
            torch.testing.assert_close(phi[i - 1, j - 1], expected)
    torch.testing.assert_close(similarity(-U, V), phi)
    turn = orthonormal(4, 4, seed=2)
    torch.testing.assert_close(similarity(U @ turn, V)[-1], phi[-1])
    torch.testing.assert_close(similarity(U, U).diag(), torch.ones(4, dtype=torch.float64))
    assert similarity(U, rest).abs().max() < 1e-12


def test_similarity_of_random_subspaces_is_the_larger_over_all():
    d, draws = (
        40,
        [
            similarity(orthonormal(40, 3, seed=2 * i), orthonormal(40, 5, seed=2 * i + 1))[-1, -1]
            for i in range(300)
        ],
    )
    values = torch.stack(draws)
    assert values.mean() == pytest.approx(5 / d, abs=3 * float(values.std()) / 300**0.5)


def test_principal_angles_are_those_two_spans_were_made_with():
    angles = torch.tensor([1e-9, 1e-4, 0.3, 1.2], dtype=torch.float64)
    frame = orthonormal(30, 8, seed=3)
    one, away = frame[:, :4], frame[:, 4:]
    other = (one * angles.cos() + away * angles.sin()) @ orthonormal(4, 4, seed=4)
    computed = principal_angles(one, other)
    torch.testing.assert_close(computed, angles, rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(principal_angles(other, one), angles, rtol=1e-6, atol=1e-15)
    assert grassmann_distance(one, other) == pytest.approx(float(angles.norm()))
    phi = similarity(one, other)[-1, -1]
    assert float(phi) == pytest.approx(float(angles.cos().square().mean()))
    inside = principal_angles(one, one[:, :2])
    torch.testing.assert_close(inside, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_directions_must_be_orthonormal():
    with pytest.raises(ValueError, match=r"other \(5 × 2\): columns are not orthonormal"):
        similarity(orthonormal(5, 2), torch.ones(5, 2, dtype=torch.float64))


def test_amplification_of_directions_that_w_has():
    frame, V = orthonormal(12, 12), orthonormal(9, 3, seed=1)
    U = frame[:, :3]
    sigma = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
    W = (U * sigma) @ V.T
    delta = svd_of_matrix(3.0 * U[:, 1:2] @ V[:, 1:2].T).first(1)
    assert projection(W, delta) == pytest.approx(2.0)
    assert amplification(W, delta) == pytest.approx(1.5)
    beside = svd_of_matrix(frame[:, 3:4] @ V[:, :1].T).first(1)
    assert amplification(W, beside) > 1e12
    assert amplification(W, svd_of_matrix(0 * W)) == 0
    assert amplification(0 * W, delta) == math.inf


def test_projection_on_random_directions_is_the_share_of_their_number():
    """‖Uᵀ W V‖ ≈ ‖W‖ r / √(m d)."""
    W = torch.randn(60, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = []
    for seed in range(100):
        U, V = orthonormal(60, 4, seed=2 * seed), orthonormal(80, 4, seed=2 * seed + 1)
        delta = SVD(U, torch.ones(4, dtype=torch.float64), V.T)
        squares.append(projection(W, delta) ** 2)
    mean = torch.tensor(squares).mean().sqrt()
    assert float(mean) == pytest.approx(float(W.norm()) * 4 / math.sqrt(60 * 80), rel=0.05)


def test_intruders_are_directions_that_w_has_not():
    frame = orthonormal(20, 20)
    before = frame[:, :12]
    same = torch.stack([before[:, 3], -before[:, 0]], 1)
    assert is_intruder(before, same).tolist() == [False, False]
    new = torch.stack([frame[:, 15], before[:, 0]], 1)
    assert is_intruder(before, new).tolist() == [True, False]
    # Spread over five of W's directions: |cos| = 0.447 with each.
    spread = before[:, :5].sum(1, keepdim=True) / math.sqrt(5)
    assert is_intruder(before, spread).sum() == 1
    assert is_intruder(before, spread, cosine=0.44).sum() == 0
