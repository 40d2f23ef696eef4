"""Spectra of stored updates, and adapters made of them, against dense matrices.

Independent truth: numpy's SVD of the dense ΔW; for intruders PEFT's own
`reduce_intruder_dimension`; planted matrices whose singular values are known.
Run: make test ARGS=tests/analysis/test_stored_spectra.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.stored import StoredUpdate
from lora_lab.analysis import leading_svd, spectra
from lora_lab.analysis.cut import cut_update
from lora_lab.analysis.leading_svd import first_triples, left_vectors
from lora_lab.analysis.spectra import Spectrum
from lora_lab.analysis.stored_spectra import (
    Difference,
    measure_adapter,
    measure_difference,
    svd_of_update,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(out: int, rest: int, values: Tensor) -> Tensor:
    """A matrix with these singular values."""
    U, V = (torch.linalg.qr(randn(n, len(values), seed=n).double()).Q for n in (out, rest))
    return (U * values) @ V.T


UPDATES = {
    "lora": StoredUpdate(randn(3, 9), randn(7, 3, seed=1), 0.5),
    "negative scale": StoredUpdate(randn(3, 9), randn(7, 3, seed=1), -2.0),
    "more than full": StoredUpdate(randn(12, 9), randn(7, 12, seed=1), 0.5),
    "half": StoredUpdate(randn(3, 9).bfloat16(), randn(7, 3, seed=1).bfloat16(), 0.5),
    "kronecker": StoredUpdate(randn(3, 9), randn(7, 3, seed=1), 1.5, outer=randn(4, 5, seed=2)),
    "dora": StoredUpdate(randn(3, 9), randn(7, 3, seed=1), 0.5, magnitude=randn(7).abs()),
}


@pytest.mark.parametrize("name", UPDATES)
def test_a_stored_update_has_the_spectrum_of_its_dense_matrix(name: str):
    update = UPDATES[name]
    dense = update.product().numpy()
    sigma = np.linalg.svd(dense, compute_uv=False)
    ((site, svd),) = measure_adapter({"x": update})
    values = site.singular_values[: len(sigma)]
    np.testing.assert_allclose(values, sigma[: len(values)], atol=1e-12 * sigma[0])
    np.testing.assert_allclose(site.measures["frobenius"], np.linalg.norm(dense))
    np.testing.assert_allclose(site.measures["stable_rank"], np.sum(sigma**2) / sigma[0] ** 2)
    share = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert site.measures["energy_90"] == 1 + np.sum(share < 0.9)
    assert site.measures["numerical_rank"] == np.linalg.matrix_rank(dense)
    np.testing.assert_allclose(svd.cut(len(svd.S)).numpy(), dense, atol=1e-10 * sigma[0])
    assert ("without DoRA's magnitude" in site.note) == (name == "dora")


# More than 64 directions, which is as many as spectra.npz has of a site.
MANY: dict[str, StoredUpdate] = {
    "r = 70": StoredUpdate(randn(70, 90), 0.1 * randn(80, 70, seed=1), 0.5),
    "dora of 80 × 90": StoredUpdate(
        randn(3, 90), randn(80, 3, seed=1), 0.1, magnitude=10 + randn(80)
    ),
    "kronecker of rank 72": StoredUpdate(
        randn(9, 10), randn(9, 9, seed=1), 0.2, outer=randn(8, 9, seed=2)
    ),
}


@pytest.mark.parametrize("exact_up_to", [1024, 10])
@pytest.mark.parametrize("name", ["lora", "dora", *MANY])
def test_beside_the_base_as_the_formulas_say(
    name: str, exact_up_to: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leading_svd, "EXACT_UP_TO", exact_up_to)
    update = (UPDATES | MANY)[name]
    W = randn(*update.shape, seed=5)
    save_file({"model.x.weight": W}, "base.safetensors")
    ((site, svd),) = measure_adapter({"x": update}, Checkpoint(Path("base.safetensors")))
    W_dense, delta = W.double().numpy(), update.delta(W).numpy()
    U, sigma, Vh = np.linalg.svd(delta)
    k = np.sum(sigma > sigma[0] * max(delta.shape) * 1.2e-7)
    assert k > 64 or name not in MANY
    in_W = np.linalg.norm(U[:, :k].T @ W_dense @ Vh[:k].T)
    np.testing.assert_allclose(site.measures["amplification"], np.linalg.norm(delta) / in_W)
    relative = np.linalg.norm(delta) / np.linalg.norm(W_dense)
    np.testing.assert_allclose(site.measures["relative"], relative)
    before, after = (np.linalg.svd(matrix)[0] for matrix in (W_dense, W_dense + delta))
    cosines = np.abs(before.T @ after[:, :10]).max(0)
    assert site.measures["intruders"] == np.sum(cosines < 0.5)
    np.testing.assert_allclose(svd.S[:1], sigma[:1], rtol=1e-5)
    assert not site.note or exact_up_to == 10


def test_a_base_without_the_weight_is_said():
    save_file({"y.weight": randn(7, 9), "x.weight": randn(7, 8)}, "base.safetensors")
    ((site, _),) = measure_adapter({"x": UPDATES["lora"]}, Checkpoint(Path("base.safetensors")))
    assert site.note == "no such weight in the base"
    assert "amplification" not in site.measures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 300), (300, 60)])
def test_leading_triples_are_those_of_the_svd(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
):
    monkeypatch.setattr(leading_svd, "EXACT_UP_TO", 10)
    matrix = planted(*shape, torch.logspace(2, -2, 50, dtype=torch.float64)).to(dtype)
    svd, residual = first_triples(matrix, 5)
    assert residual is not None
    assert residual < 1e-5
    U, sigma, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(svd.S.numpy(), sigma[:5], rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.diag(U[:, :5].T @ svd.U.numpy())), 1, atol=1e-4)


def test_the_residual_bounds_the_error_of_a_flat_spectrum(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leading_svd, "EXACT_UP_TO", 10)
    monkeypatch.setattr(leading_svd, "MOST_ROUNDS", 2)
    matrix = randn(400, 400).double()
    svd, residual = first_triples(matrix, 4)
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert residual is not None
    assert 1e-4 < residual < 0.5
    nearest = np.abs(sigma[:, None] - svd.S.numpy()).min(0)
    assert (nearest <= residual * sigma[0]).all()
    # What the triples hold of the matrix is exact, converged or not.
    rest = np.linalg.norm(matrix.numpy() - svd.cut(4).numpy()) ** 2
    np.testing.assert_allclose(rest, np.sum(sigma**2) - np.sum(svd.S.numpy() ** 2), rtol=1e-9)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_left_vectors_are_those_of_the_svd(shape: tuple[int, int]):
    W = planted(*shape, torch.logspace(0.5, -3, 12, dtype=torch.float64)).float()
    vectors = left_vectors(W)
    assert vectors.shape == (shape[0], 12)
    U = np.linalg.svd(W.double().numpy(), full_matrices=False)[0][:, :12]
    np.testing.assert_allclose(np.abs(np.diag(U.T @ vectors.numpy())), 1, atol=1e-5)


def test_the_difference_of_two_checkpoints(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leading_svd, "EXACT_UP_TO", 40)
    large, small = planted(90, 120, 3 * 2.0 ** -torch.arange(20.0)), planted(6, 8, torch.ones(2))
    before = {
        **{"large": randn(90, 120), "small": randn(2, 3, 8).bfloat16(), "same": randn(3, 3)},
        **{"bias": torch.zeros(3), "shape": randn(2, 2), "old": randn(2, 2)},
        **{"count": torch.zeros(2, 2, dtype=torch.long), "cast": torch.ones(2, 2).bfloat16()},
    }
    after = before | {"bias": torch.full((3,), 2.0), "shape": randn(2, 3), "new": randn(2, 2)}
    after |= {"large": before["large"].double() + large, "count": before["count"] + 1}
    after["small"] = (before["small"].double() + small.view(2, 3, 8)).bfloat16()
    after["cast"] = before["cast"].float()
    del after["old"]
    save_file(before, "before.safetensors")
    save_file(after, "after.safetensors")
    difference = Difference(
        Checkpoint(Path("before.safetensors")), Checkpoint(Path("after.safetensors"))
    )
    sites = {s.site: s for s, _ in measure_difference(difference, difference.shared)}
    assert sites.keys() == {"large", "small"}
    changed = after["small"].double() - before["small"].double()
    expected = np.linalg.svd(changed.numpy().reshape(2, 24), compute_uv=False)
    np.testing.assert_allclose(sites["small"].singular_values, expected, rtol=1e-6)
    assert sites["large"].note.startswith("first 64 σ, each within")
    np.testing.assert_allclose(
        sites["large"].singular_values[:9], 3 * 2.0 ** -np.arange(9), rtol=1e-4
    )
    np.testing.assert_allclose(sites["large"].measures["frobenius"], 12**0.5, rtol=1e-5)
    np.testing.assert_allclose(sites["large"].measures["stable_rank"], 4 / 3, rtol=1e-5)
    assert sites["large"].measures["energy_90"] == 2  # 3/4, 15/16, …
    assert "effective_rank" not in sites["large"].measures
    lines = "\n".join(difference.lines())
    for part in ("left out: 2", "first: old", "second: new", "(2, 2) → (2, 3)", "bias 3.464"):
        assert part in lines
    assert "changed: count" in lines


def test_experts_in_two_checkpoints_are_measured_one_by_one():
    before = {"mlp.experts.down_proj": randn(3, 4, 5)}
    after = {key: tensor + randn(3, 4, 5) for key, tensor in before.items()}
    save_file(before, "before.safetensors")
    save_file(after, "after.safetensors")
    stored = [Checkpoint(Path(f"{name}.safetensors")) for name in ("before", "after")]
    difference = Difference(stored[0], stored[1])
    sites = {s.site: s for s, _ in measure_difference(difference, difference.shared)}
    for expert in range(3):
        change = after["mlp.experts.down_proj"] - before["mlp.experts.down_proj"]
        sigma = np.linalg.svd(change[expert].numpy(), compute_uv=False)
        values = sites.pop(f"mlp.experts.down_proj.{expert}").singular_values
        np.testing.assert_allclose(values, sigma, rtol=1e-5)
    assert not sites


@pytest.mark.parametrize("k", [1, 2])
def test_a_cut_is_the_nearest_matrix_of_its_rank(k: int):
    update = UPDATES["negative scale"]
    cut = cut_update("x", update, lambda *_: k)
    assert cut.update is not None
    U, sigma, Vh = np.linalg.svd(update.product().numpy(), full_matrices=False)
    nearest = (U[:, :k] * sigma[:k]) @ Vh[:k]
    np.testing.assert_allclose(cut.update.product().numpy(), nearest, atol=1e-6 * sigma[0])
    np.testing.assert_allclose(cut.kept, np.sum(sigma[:k] ** 2) / np.sum(sigma**2))
    norms = (torch.linalg.vector_norm(factor) for factor in (cut.update.A, cut.update.B))
    torch.testing.assert_close(*norms)  # balanced


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999, 1.0])
def test_energy_is_the_share_of_the_squared_norm(share: float):
    update = StoredUpdate(randn(6, 30), randn(20, 6, seed=1))
    cut = cut_update("x", update, lambda _, spectrum: spectrum.energy_rank(share))
    sigma = np.linalg.svd(update.product().numpy(), compute_uv=False)
    energy = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert cut.k == 1 + np.sum(energy[:6] < share * (1 - 1e-14))


def test_a_row_of_zeros_stays_zero():
    for row in range(7):
        A, B = randn(4, 9, seed=row), randn(7, 4, seed=7 + row)
        A[:, row], B[row] = 0, 0
        cut = cut_update("x", StoredUpdate(A, B), lambda *_: 2)
        assert cut.update is not None
        assert not cut.update.A[:, row].any()
        assert not cut.update.B[row].any()


def test_an_update_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"'x': A .* holds NaN or infinity"):
        list(measure_adapter({"x": StoredUpdate(randn(3, 9) * np.inf, randn(7, 3))}))


def test_the_python_function_takes_factors_and_matrices():
    A, B = randn(3, 9), randn(7, 3, seed=1)
    both: dict[str, Any] = {
        "factors": (A, B, 2.0),
        "dense": 2 * B @ A,
        "conv": (2 * B @ A).view(7, 3, 3),
    }
    measured = spectra.spectra_of_sites(both)
    assert [*measured] == [*both]
    expected = np.linalg.svd((2 * B @ A).numpy(), compute_uv=False)[:3]
    for spectrum in measured.values():
        assert isinstance(spectrum, Spectrum)
        np.testing.assert_allclose(spectrum.singular_values[:3], expected, rtol=1e-5)


def test_triples_of_a_kronecker_product_are_orthonormal_and_sorted():
    values, svd = svd_of_update(UPDATES["kronecker"])
    assert (values.diff() <= 0).all()
    for columns in (svd.U, svd.Vh.T):
        torch.testing.assert_close(columns.T @ columns, torch.eye(12, dtype=torch.float64))
