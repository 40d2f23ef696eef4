"""Spectra against float64 SVDs and spectra that are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.spectra import Spectrum, from_factors, from_matrix


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
def test_from_factors_is_the_svd_of_the_product(made: tuple[torch.Tensor, torch.Tensor, float]):
    A, B, scale = made
    expected = torch.linalg.svdvals(scale * B.double() @ A.double())[: A.shape[0]]
    got = from_factors(A, B, scale).singular_values
    seen = expected > 1e-6 * expected[0]
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-5, atol=0)
    assert got.shape == (A.shape[0],)


def test_from_matrix_is_the_svd():
    W = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(from_matrix(W).singular_values, expected)


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
    assert from_factors(A, B).numerical_rank == 4
    A[4] = A[0] * 2
    A[3] = A[0] - 3 * A[4]
    assert from_factors(A, B).numerical_rank == from_matrix(B @ A).numerical_rank == 3


@pytest.mark.parametrize(
    "zero", [spectrum(0.0, 0.0), from_factors(torch.ones(2, 5), torch.zeros(4, 2))]
)
def test_every_measure_of_zero_is_zero(zero: Spectrum):
    assert set(zero.measures().values()) == {0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_errors_that_name_the_factor(bad: float):
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    A[0, 0] = bad
    with pytest.raises(ValueError, match=r"A \(2 × 3\) holds NaN or infinity"):
        from_factors(A, B)
    with pytest.raises(ValueError, match="delta"):
        from_matrix(A)


def test_bfloat16_has_a_numerical_rank():
    A, B = torch.randn(3, 2000).bfloat16(), torch.randn(1000, 3).bfloat16()
    assert from_factors(A, B).numerical_rank == 3
