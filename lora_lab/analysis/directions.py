"""Measures between directions: φ and angles of two subspaces, what W has in those of ΔW, intruders.

Pure functions of tensors, computed in float64. A set of directions is a matrix with orthonormal
columns: U, or V = Vhᵀ.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from lora_lab.analysis.spectra import SVD


def similarity(
    one: Float64[Tensor, "n p"], other: Float64[Tensor, "n q"]
) -> Float64[Tensor, "p q"]:
    """The similarity φ(i, j) = ‖Uᵢᵀ Vⱼ‖²_F / min(i, j) of two subspaces (Hu et al. 2021, eq. 4).

    Uᵢ is the first i columns of `one`, Vⱼ the first j of `other`; φ(i, j) is entry (i−1, j−1). It
    goes from 0, orthogonal spans, to 1, where the smaller span lies in the larger.
    """
    _check_directions(one=one, other=other)
    # ‖Uᵢᵀ Vⱼ‖²_F is the sum of the first i × j squared entries of UᵀV: sums along both axes.
    shared = (one.T @ other).square().cumsum(0).cumsum(1)  # (p, q)
    i, j = torch.arange(1, one.shape[1] + 1), torch.arange(1, other.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j).to(shared)


def principal_angles(
    one: Float64[Tensor, "n p"], other: Float64[Tensor, "n q"]
) -> Float64[Tensor, " k"]:
    """The k = min(p, q) angles between two spans in radians, ascending: arccos σ(UᵀV).

    Angles below 45° are computed from their sine: near 0 the cosine is flat and loses half of the
    digits (Björck & Golub 1973).
    """
    _check_directions(one=one, other=other)
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    cosine = torch.linalg.svdvals(one.T @ other).clamp(max=1)
    # The part of `other` outside of the span of `one` has the sines as singular values, descending.
    sine = torch.linalg.svdvals(other - one @ (one.T @ other)).flip(0).clamp(max=1)
    return torch.where(cosine > math.sqrt(0.5), sine.asin(), cosine.acos())


def grassmann_distance(one: Float64[Tensor, "n p"], other: Float64[Tensor, "n q"]) -> float:
    """The distance √Σθ² of two spans, over their principal angles θ."""
    return torch.linalg.vector_norm(principal_angles(one, other)).item()


def projection(W: Float[Tensor, "out rest"], delta: SVD) -> float:
    """‖Uᵀ W V‖_F: how much of W lies in the directions U, V of ΔW (Hu et al. 2021, table 7)."""
    return torch.linalg.matrix_norm(delta.U.T @ W.double() @ delta.Vh.T).item()


def amplification(W: Float[Tensor, "out rest"], delta: SVD) -> float:
    """The amplification factor ‖ΔW‖_F / ‖Uᵀ W V‖_F (Hu et al. 2021, section 7.3).

    How much larger ΔW is than what W already has in its directions: infinite where W has nothing
    there, 0 where ΔW is zero.
    """
    norm, norm_in_W = torch.linalg.vector_norm(delta.S).item(), projection(W, delta)
    return norm / norm_in_W if norm_in_W else (math.inf if norm else 0.0)


def is_intruder(
    before: Float64[Tensor, "out n"], after: Float64[Tensor, "out k"], cosine: float = 0.5
) -> Bool[Tensor, " k"]:
    """Which columns of `after` are intruder dimensions (Shuttleworth et al. 2024).

    An intruder is a left singular vector of W + ΔW (a column of `after`) whose |cos| with each left
    singular vector of W (the columns of `before`) is less than `cosine`.
    """
    _check_directions(before=before, after=after)
    return ((before.T @ after).abs() < cosine).all(0)


def _check_directions(**spans: Tensor) -> None:
    for name, U in spans.items():
        identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        if not torch.allclose(U.T @ U, identity, atol=1e-6):
            raise ValueError(f"{name} ({U.shape[0]} × {U.shape[1]}): columns are not orthonormal")
