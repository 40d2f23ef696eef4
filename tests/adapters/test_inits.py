"""Inits that start from the weight: their numbers, for small and for large weights.

The truth is a weight built from singular vectors and values that are known, its SVD in float64, and
PEFT where it has the init.
Run: make test ARGS=tests/adapters/test_inits.py
"""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import first_triples
from tests.adapters.cases import the_adapter

SPECTRA: dict[str, Any] = {
    "decaying": lambda i: i**-0.5,
    "a hundredth apart": lambda i: (-i / 100).exp(),
    "a thousandth apart": lambda i: 2 - i / 1000,
    "of rank 5": lambda i: (i <= 5) / i,
    "of one value": lambda i: i**0,
    "zero": lambda i: i * 0,
    "equal about r": lambda i: torch.where(i <= 4, 3.0, torch.where(i <= 12, 2.0, 1 / i)),
}
CONVERGING = ("decaying", "a hundredth apart", "of rank 5")


def weight(shape: tuple[int, int], spectrum: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight and its singular vectors, as columns, and values: in float64."""
    generator = torch.Generator().manual_seed(1)
    k = min(shape)
    draws = [torch.randn(n, k, generator=generator, dtype=torch.float64) for n in shape]
    U, V = (torch.linalg.qr(draw).Q for draw in draws)
    S = SPECTRA[spectrum](torch.arange(1, k + 1).double()) + torch.zeros(k, dtype=torch.float64)
    return (U * S) @ V.T, U, S, V


def angle(columns: Tensor, exact: Tensor) -> float:
    """The sine of the largest principal angle between the spans of two sets of columns."""
    Q = torch.linalg.qr(columns.double()).Q
    return torch.linalg.matrix_norm(Q - exact @ (exact.T @ Q), 2).item()


@pytest.mark.parametrize(
    ("shape", "spectrum"), [*product([(520, 600)], SPECTRA), ((600, 520), "decaying")]
)
def test_first_triples_of_a_large_weight(shape: tuple[int, int], spectrum: str):
    W, U, S, V = weight(shape, spectrum)
    W, r = W.float(), 4 if spectrum == "of rank 5" else 8
    ours = first_triples.first_triples(W, r, torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(ours[1].double(), S[:r], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(W @ ours[2].T, ours[0] * ours[1], rtol=0, atol=1e-3)
    if spectrum == "equal about r":
        return  # any 4 of the 8 directions with the value 2 are the first ones
    if spectrum not in CONVERGING:  # the SVD's own, bit for bit
        assert torch.equal(ours[0], exact[0][:, :r])
        assert torch.equal(ours[2], exact[2][:r])
        return
    assert not torch.equal(ours[0], exact[0][:, :r])
    assert max(angle(ours[0], U[:, :r]), angle(ours[2].T, V[:, :r])) < 1e-3
    for vectors in (ours[0].T, ours[2]):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(r), rtol=0, atol=1e-4)


def test_pissa_of_a_large_weight_is_that_of_its_svd():
    """Eckart and Young: what is left of W after scale · B A has the other singular values."""
    W, U, S, V = weight((530, 520), "decaying")
    layer = nn.Linear(520, 530, bias=False)
    layer.weight.data.copy_(W)
    adapters.attach(layer, r=6, alpha=3, init="pissa", over_rank="error")
    adapter = the_adapter(layer)
    expected = (U[:, :6] * S[:6]) @ V[:, :6].T
    start = adapter.scale * (adapter.B @ adapter.A).double()
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        adapter.A.norm(dim=1).double(), (S[:6] / adapter.scale).sqrt(), rtol=1e-4, atol=0
    )
    adapters.detach(layer)
    adapters.attach(layer, r=6, alpha=3, init="pissa")
    assert torch.equal(the_adapter(layer).A, adapter.A)


def test_triples_of_a_small_weight_are_those_of_the_svd():
    W = torch.randn(512, 600, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    ours = first_triples.first_triples(W, 3, torch.Generator())
    assert torch.equal(ours[0], U[:, :3])
    assert torch.equal(ours[2], Vh[:3])


def test_mica_is_pefts():
    """The same B up to the signs of its columns, and the same of the two trains."""
    model, r = nn.Sequential(nn.Linear(9, 7)), 3
    config = LoraConfig(r=r, lora_alpha=6, target_modules=["0"], init_lora_weights="mica")
    theirs: Any = get_peft_model(copy.deepcopy(model), config).get_submodule("base_model.model.0")
    adapters.attach(model, r=r, alpha=6, init="mica", trains="zero")
    ours = the_adapter(model)
    theirs_B, B = theirs.lora_B["default"].weight, ours.B
    torch.testing.assert_close((B.T @ theirs_B).abs(), torch.eye(r), rtol=0, atol=1e-5)
    assert not ours.A.any()
    assert not theirs.lora_A["default"].weight.any()
    assert (ours.A.requires_grad, B.requires_grad) == (True, False)
    assert (theirs.lora_A["default"].weight.requires_grad, theirs_B.requires_grad) == (True, False)
