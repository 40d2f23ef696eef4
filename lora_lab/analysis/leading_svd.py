"""The first singular triples of a large matrix, with a bound on their error; and exact SVDs."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lab.analysis.spectra import SVD, svd_of_matrix

EXACT_UP_TO = 1024
"""The smaller side of the largest matrix that is decomposed in full, in about a second."""

EXACT_ENTRIES = 2**23
"""The entries of the largest matrix that is decomposed in full: 64 MB in float64."""

TOLERANCE = 1e-6
"""The residual over σ₁ at which the iteration ends."""

MOST_ROUNDS = 16
"""Of a flat spectrum the triples do not converge: their span holds nearly the most it can."""


def is_decomposed_in_full(shape: tuple[int, int]) -> bool:
    """Whether a matrix of this shape is small enough for its full SVD in float64."""
    return min(shape) <= EXACT_UP_TO and shape[0] * shape[1] <= EXACT_ENTRIES


def first_triples(matrix: Float[Tensor, "out rest"], k: int) -> tuple[SVD, float | None]:
    """At least the first k singular triples, and None; or the residual where they are iterated.

    A matrix that is small enough is decomposed in full.
    """
    if is_decomposed_in_full((matrix.shape[0], matrix.shape[1])):
        return svd_of_matrix(matrix), None
    return leading_svd(matrix, k)


def leading_svd(matrix: Float[Tensor, "out rest"], k: int) -> tuple[SVD, float]:
    """The first k singular triples by subspace iteration (Halko et al. 2011), and the residual.

    The residual is the largest ‖Mᵀuᵢ − σᵢvᵢ‖ over σ₁: each σᵢ is that close to a singular value of
    M. M vᵢ = σᵢuᵢ holds exactly, so that Σσᵢ² is what U diag(σ) Vᵀ holds of ‖M‖²_F, converged or
    not. The products are in the dtype of `matrix`, of which no copy is made.
    """
    if not matrix.isfinite().all():
        raise ValueError(f"a matrix ({' × '.join(map(str, matrix.shape))}) holds NaN or infinity")
    size = min(2 * k + 16, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64)
    Q = _orthonormal(matrix @ start.to(matrix))  # (out, size)
    Z = matrix.mT @ Q.to(matrix)  # (rest, size)
    rounds = 0
    while True:
        P = _orthonormal(Z)  # (rest, size)
        Q, R = torch.linalg.qr((matrix @ P.to(matrix)).double())
        U, S, Vh = torch.linalg.svd(R)  # M P = Q R, so the triples of M P Pᵀ are (Q U, S, P V)
        Z = matrix.mT @ Q.to(matrix)
        right = P @ Vh.mT
        errors = torch.linalg.vector_norm(Z.double() @ U - right * S, dim=0)[:k]
        residual = (errors.max() / S[0]).item() if S[0] else 0.0
        rounds += 1
        if residual < TOLERANCE or rounds == MOST_ROUNDS:
            return SVD((Q @ U)[:, :k], S[:k], right.mT[:k]), residual


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns.double()).Q


def left_vectors(W: Float[Tensor, "out rest"]) -> Float[Tensor, "out k"]:
    """All left singular vectors of W whose value is more than float32 rounding.

    From the eigenvectors of W Wᵀ or Wᵀ W, whichever is smaller, in float64: several times faster
    than the SVD, and as exact for values above σ₁ · 1e-8.
    """
    W = W.double()
    is_wide = W.shape[0] <= W.shape[1]
    values, vectors = torch.linalg.eigh(W @ W.mT if is_wide else W.mT @ W)  # ascending
    limit = max(W.shape) * torch.finfo(torch.float32).eps
    kept = vectors[:, values > values[-1] * limit**2].flip(1)
    return kept if is_wide else torch.linalg.qr(W @ kept).Q


def squared_norm(matrix: Tensor) -> float:
    """‖M‖²_F, summed in float64 over some rows at a time."""
    return sum(rows.double().square().sum().item() for rows in matrix.split(4096))
