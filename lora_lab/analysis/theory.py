"""Closed forms that a measured curve is held against: tensors in, numbers out, in float64.

W is out × d, rows of X are samples, Δ the change planted in W; a loss is a mean over all elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What theory says a metric will be: `value`, give or take a standard error.

    `standard_error` 0: the formula is exact for the very data and adapter at hand.
    """

    value: float
    standard_error: float = 0.0


@dataclass(frozen=True)
class LeastSquaresFit:
    """The ΔW of a class that fits a data set best, and the loss that it leaves.

    `is_unique`: no other ΔW of the class leaves as little.
    """

    loss: float
    delta: Float64[Tensor, "out d"]
    is_unique: bool


def least_squares(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n out"],
    r: int | None = None,
    A: Float[Tensor, "r d"] | None = None,
    B: Float[Tensor, "out r"] | None = None,
    start: Float[Tensor, "out d"] | None = None,
) -> LeastSquaresFit:
    """The least squares of Y ≈ X ΔWᵀ over all ΔW of rank `r` at most (None: any).

    Reduced-rank regression (Izenman 1975): (‖Y‖² − Σ_{i≤r} σ_i²(P_X Y)) / (n · out), with P_X the
    projector on X's columns. With `A` the rows of ΔW are in the row space of A, as where A is
    frozen; with `B` its columns are in the column space of B. With `start` all this is asked of
    ΔW + start, as where ΔW = s (B A − B₀ A₀).
    """
    X, Y = X.double(), Y.double()
    if start is not None:
        of_sum = least_squares(X, Y + X @ start.double().T, r, A, B)
        return replace(of_sum, delta=of_sum.delta - start)
    features = X if A is None else X @ A.double().T
    U, S, Vh = torch.linalg.svd(features, full_matrices=False)
    rank = int((S / S[0] > max(features.shape) * torch.finfo(S.dtype).eps).sum())
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    Q = None if B is None else torch.linalg.qr(B.double()).Q  # (out, r)
    L, sigma, Rh = torch.linalg.svd(U.T @ (Y if Q is None else Y @ Q), full_matrices=False)
    kept = sigma[:r]
    weights = Vh.T / S @ (L[:, : len(kept)] * kept) @ Rh[: len(kept)]  # (features, out or r)
    delta = (weights if A is None else A.double().T @ weights).T
    delta = delta if Q is None else Q @ delta
    cut = sigma[len(kept) :]
    # What is cut must be apart from what is kept, or be rounding.
    gap = not len(cut) or cut[0] < (1 - 1e-9) * kept[-1] or cut[0] < 1e-6 * sigma[0]
    loss = (Y - X @ delta.T).square().mean().item()  # of the formula, without its cancellation
    return LeastSquaresFit(loss, delta, bool(rank == features.shape[1] and gap))


def frozen_share(trains: str, r: int, out: int, d: int) -> float:
    """The mean of ‖Δ − its best fit‖² / ‖Δ‖² over random frozen factors, for white inputs.

    `trains` B: 1 − r/d (LoRA-FA); A: 1 − r/out; core: 1 − r²/(out · d) (LoRA-XS).
    """
    return 1 - {"B": r / d, "A": r / out, "core": r * r / (out * d)}[trains]


def excess_loss(n: int, d: int, out: int, k: int, r: int, noise: float, draws: int = 200) -> float:
    """The mean loss on new rows above noise², at a rank r ≥ k, the rank of Δ.

    noise²/out · [k d/(n−d−1) + k (out−k)/(n−k−1) + (n−1)/((n−k−1)(n−d−1)) · Σ_{j≤r−k} E σ_j²(G)],
    for n Gaussian rows and a strong Δ: k outputs learned on all inputs, the others on Δ's inputs,
    and what is read from noise alone. G is Gaussian, (out−k) × (d−k); the share of its first
    singular values is a mean over `draws`.
    """
    G = torch.randn(
        draws, out - k, d - k, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    energy = torch.linalg.svdvals(G).square().mean(0)
    spurious = (out - k) * (d - k) * (energy[: r - k].sum() / energy.sum()).item()
    wide, narrow = n - d - 1, n - k - 1
    found = k * d / wide + k * (out - k) / narrow + spurious * (n - 1) / (narrow * wide)
    return noise**2 / out * found


def noisy_sigma(s: float, out: int, d: int, tau: float) -> float:
    """The singular value of s u vᵀ plus an out × d matrix of iid entries of deviation `tau`.

    √((s² + τ² out)(s² + τ² d)) / s over the threshold, else the edge of the noise (Benaych-Georges
    & Nadakuditi 2012). ΔW learned by least squares from white inputs has τ = noise/√n.
    """
    if s <= threshold(out, d, tau):
        return tau * (math.sqrt(out) + math.sqrt(d))
    return math.sqrt((s**2 + tau**2 * out) * (s**2 + tau**2 * d)) / s


def threshold(out: int, d: int, tau: float) -> float:
    """τ (out · d)^¼: a weaker direction cannot be seen in noise of deviation `tau`."""
    return tau * (out * d) ** 0.25


def intruders(
    strengths: Sequence[float], out: int, d: int, tau: float, top: int = 10
) -> int | None:
    """How many of the first `top` left singular vectors of W + ΔW are like none of W's (|cos| < ½).

    W has iid entries of deviation `tau`, ΔW singular values `strengths`: one over the threshold
    leaves the noise with a vector of its own, one under it leaves W's vectors as they are. None
    where that is not sure: measured, W must be 192 × 256 at least, and no strength within a factor
    of 2 of the threshold; then each of 20 draws has this count.
    """
    limit = threshold(out, d, tau)
    small = min(out, d) < 192 or max(out, d) < 256
    if small or any(limit / 2 < s < 2 * limit for s in strengths):
        return None
    return min(top, sum(s > limit for s in strengths))


def tap_weights(kernel_size: int, height: int, width: int) -> Float64[Tensor, "k k"]:
    """The share of places where a tap of an odd convolution sees the image, not its zero padding.

    (H−|δi|)(W−|δj|) / (HW) at tap (δi, δj): the mean square of what it sees in white images.
    """
    shift = (torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2).abs()
    rows, columns = (height - shift).clamp(min=0), (width - shift).clamp(min=0)
    return rows[:, None] * columns / (height * width)


def group_sigma(sizes: Sequence[int], shifts: Float[Tensor, "g d"]) -> Float64[Tensor, " k"]:
    """The singular values of Σ_g 1_g c_gᵀ, which moves the `sizes[g]` tokens of group g by c_g."""
    roots = torch.tensor(sizes, dtype=torch.float64).sqrt()
    return torch.linalg.svdvals(roots[:, None] * shifts.double())


def similarity(i: int, j: int, d: int, k: int = 0) -> Prediction:
    """φ = ‖U_iᵀ V_j‖²_F / min(i, j) of two bases of R^d that share their first k directions.

    The rest are random: [min(k,i,j) + (i−k)₊(j−k)₊/(d−k)] / min(i,j) in the mean; with none shared,
    max(i,j)/d. Of p and q random directions of R^D the trace has variance
    2pq(D−p)(D−q) / (D²(D−1)(D+2)). φ is that of Hu et al. 2021, section 7.2.
    """
    p, q, D = max(i - k, 0), max(j - k, 0), d - k
    trace = p * q / D if D else 0.0
    variance = 2 * trace * (D - p) * (D - q) / (D * (D - 1) * (D + 2)) if D > 1 else 0.0
    return Prediction((min(k, i, j) + trace) / min(i, j), math.sqrt(variance) / min(i, j))


MOMENTS = {"kaiming": (1 / 3, -2 / 15), "gaussian": (1.0, 0.0)}
"""By init: variance and fourth cumulant of A's iid entries; Kaiming's in units of 1/d, 1/d²."""


def _moments(init: str, d: int) -> tuple[float, float]:
    variance, cumulant = MOMENTS[init]
    return (variance / d, cumulant / d**2) if init == "kaiming" else (variance, cumulant)


def gradient_ratio(G: Float[Tensor, "out d"], r: int, scale: float, init: str) -> Prediction:
    """‖∇_B‖ / ‖G‖ before the first step, G the loss's gradient to the weight and B zero.

    ∇_B = scale · G Aᵀ, so √E of the square is scale · √(r v), v the variance of A's entries:
    scale · √(r/3d) for Kaiming's. The error is over draws of A, to first order.
    """
    v, cumulant = _moments(init, G.shape[1])
    M = G.double().T @ G.double()
    variance = 2 * v**2 * M.square().sum() + cumulant * M.diag().square().sum()  # of aᵀ M a
    value = scale * math.sqrt(r * v)
    return Prediction(value, value / (2 * v * M.trace().item()) * math.sqrt(variance.item() / r))


def descent(G: Float[Tensor, "out d"], r: int, scale: float, init: str) -> Prediction:
    """⟨−G, ΔW⟩ / (lr Σ_o ‖G_o‖) after Adam's first step, which moves each entry of B by lr.

    scale · Σ_oj |G_o · a_j| / Σ_o ‖G_o‖, of mean scale · r √(2v/π): scale · r √(2/π) / √(3d) for
    Kaiming's A. G_o · a_j is taken as normal, as it is for many inputs.
    """
    v, _ = _moments(init, G.shape[1])
    norms = torch.linalg.vector_norm(G.double(), dim=1)
    unit = G.double() / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    rho = (unit @ unit.T).clamp(-1, 1)
    covariance = 2 / math.pi * (rho * rho.asin() + (1 - rho.square()).sqrt() - 1)
    share = norms / norms.sum()
    error = scale * math.sqrt(r * v * (share @ covariance @ share).item())
    return Prediction(scale * r * math.sqrt(2 * v / math.pi), error)
