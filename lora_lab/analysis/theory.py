"""Closed forms of what experiments measure, for comparing theory with a run.

Pure functions of tensors, computed in float64. W is out × d, the rows of X are samples, Δ is the
change planted in W by a data set. A loss is the mean squared error over all elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """The value that theory predicts for a metric, with its standard error.

    A `standard_error` of 0: the formula is exact for this data set and this adapter.
    """

    value: float
    standard_error: float = 0.0


@dataclass(frozen=True)
class LeastSquaresFit:
    """The best ΔW that an adapter can reach on a data set, `delta`, and the `loss` it leaves.

    `is_unique`: no other ΔW within reach has so small a loss.
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
    """The ΔW of rank at most `r` (None: any rank) with the least squares error of Y ≈ X ΔWᵀ.

    This is reduced-rank regression (Izenman 1975). Its loss is
    (‖Y‖² − Σ_{i≤r} σ_i²(P_X Y)) / (n · out), with P_X the projector on the columns of X.

    With `A`, the rows of ΔW must lie in the row space of A, as where A is frozen. With `B`, its
    columns must lie in the column space of B. With `start`, all these conditions are on
    ΔW + start, as where ΔW = s (B A − B₀ A₀) and start = s B₀ A₀.
    """
    X, Y = X.double(), Y.double()
    if start is not None:
        of_sum = least_squares(X, Y + X @ start.double().T, r, A, B)
        return replace(of_sum, delta=of_sum.delta - start)
    # Frozen A: ΔW = M A, so Y ≈ (X Aᵀ) Mᵀ is the same problem with r features in place of d.
    features = X if A is None else X @ A.double().T  # (n, d or r)
    U, S, Vh = torch.linalg.svd(features, full_matrices=False)
    rank = int((S / S[0] > max(features.shape) * torch.finfo(S.dtype).eps).sum())
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    # Frozen B: what ΔW gives lies in the column space of B, whose orthonormal basis is Q.
    Q = None if B is None else torch.linalg.qr(B.double()).Q  # (out, r)
    # UᵀY are the targets in the orthonormal basis U of the features' columns. Their best
    # approximation of rank r is the first r singular triples; (Vhᵀ/S) takes it back to weights.
    L, sigma, Rh = torch.linalg.svd(U.T @ (Y if Q is None else Y @ Q), full_matrices=False)
    first = sigma[:r]
    weights = Vh.T / S @ (L[:, : len(first)] * first) @ Rh[: len(first)]  # (features, out or r)
    delta = (weights if A is None else A.double().T @ weights).T  # (out or r, d)
    delta = delta if Q is None else Q @ delta  # (out, d)
    # Unique where the first value that is cut is clearly smaller than the last one that is not
    # (of two equal ones either could be cut), or is rounding.
    rest = sigma[len(first) :]
    has_gap = not len(rest) or rest[0] < (1 - 1e-9) * first[-1] or rest[0] < 1e-6 * sigma[0]
    # The same number as the docstring's formula, which loses digits where the loss is near 0.
    loss = (Y - X @ delta.T).square().mean().item()
    return LeastSquaresFit(loss, delta, bool(rank == features.shape[1] and has_gap))


def frozen_share(trains: str, r: int, out: int, d: int) -> float:
    """The share of ‖Δ‖² that a partly frozen adapter cannot learn, in the mean over its draws.

    That is the mean of ‖Δ − its best fit‖² / ‖Δ‖² over random frozen factors, for white inputs.
    It depends on what `trains`. B: 1 − r/d (LoRA-FA). A: 1 − r/out. core: 1 − r²/(out · d)
    (LoRA-XS).
    """
    return 1 - {"B": r / d, "A": r / out, "core": r * r / (out * d)}[trains]


def excess_loss(n: int, d: int, out: int, k: int, r: int, noise: float, draws: int = 200) -> float:
    """The mean loss on new rows, less noise², of the best fit of rank r ≥ k, the rank of Δ.

    noise²/out · [k d/(n−d−1) + k (out−k)/(n−k−1) + (n−1)/((n−k−1)(n−d−1)) · Σ_{j≤r−k} E σ_j²(G)],
    for `n` Gaussian rows and a strong Δ. The terms are the error of the k outputs that are learned
    on all inputs, that of the other outputs on the k inputs of Δ, and what the r − k spare
    directions learn from noise alone. G is Gaussian, (out−k) × (d−k); E σ_j²(G) is a mean over
    `draws` samples of it.
    """
    rng = torch.Generator().manual_seed(0)
    G = torch.randn(draws, out - k, d - k, generator=rng, dtype=torch.float64)
    energy = torch.linalg.svdvals(G).square().mean(0)  # (min(out, d) − k,)
    spurious = (out - k) * (d - k) * (energy[: r - k].sum() / energy.sum()).item()
    wide, narrow = n - d - 1, n - k - 1
    terms = k * d / wide + k * (out - k) / narrow + spurious * (n - 1) / (narrow * wide)
    return noise**2 / out * terms


def noisy_sigma(s: float, out: int, d: int, tau: float) -> float:
    """The first singular value of s u vᵀ plus noise, out × d iid entries of deviation `tau`.

    √((s² + τ² out)(s² + τ² d)) / s where s is above `threshold`, else the edge of the noise,
    τ (√out + √d) (Benaych-Georges & Nadakuditi 2012). For ΔW learned by least squares from n
    samples of white inputs, τ = noise/√n.
    """
    if s <= threshold(out, d, tau):
        return tau * (math.sqrt(out) + math.sqrt(d))
    return math.sqrt((s**2 + tau**2 * out) * (s**2 + tau**2 * d)) / s


def threshold(out: int, d: int, tau: float) -> float:
    """τ (out · d)^¼, the least strength that is visible in an out × d matrix of noise.

    The noise has iid entries of deviation `tau`. A weaker direction leaves its singular values and
    vectors as they are (Benaych-Georges & Nadakuditi 2012).
    """
    return tau * (out * d) ** 0.25


def intruders(strengths: list[float], out: int, d: int, tau: float, top: int = 10) -> int | None:
    """The number of intruder dimensions among the first `top` left singular vectors of W + ΔW.

    An intruder is one whose |cos| with each left singular vector of W is less than ½. W has iid
    entries of deviation `tau`, ΔW the singular values `strengths`. A strength above `threshold`
    brings a new singular vector; one below it leaves those of W as they are.

    None where the count is not certain. By measurement, W must be at least 192 × 256 and no
    strength within a factor of 2 of the threshold; then all of 20 draws have this count.
    """
    limit = threshold(out, d, tau)
    small = min(out, d) < 192 or max(out, d) < 256
    if small or any(limit / 2 < s < 2 * limit for s in strengths):
        return None
    return min(top, sum(s > limit for s in strengths))


def tap_weights(kernel_size: int, height: int, width: int) -> Float64[Tensor, "k k"]:
    """The share of positions at which each tap of a convolution reads the image, not its padding.

    (H−|δi|)(W−|δj|) / (HW) for the tap at offset (δi, δj) from the center of an odd kernel. In
    white images it is the mean square of what the tap reads.
    """
    shift = (torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2).abs()
    rows, columns = (height - shift).clamp(min=0), (width - shift).clamp(min=0)
    return rows[:, None] * columns / (height * width)


def group_sigma(sizes: Sequence[int], shifts: Float[Tensor, "g d"]) -> Float64[Tensor, " k"]:
    """The singular values of Σ_g 1_g c_gᵀ, a table in which groups of tokens move together.

    The `sizes[g]` tokens of group g move by c_g, row g of `shifts` (g, d). The values are those of
    the small matrix with rows √sizes[g] · c_g.
    """
    roots = torch.tensor(sizes, dtype=torch.float64).sqrt()
    return torch.linalg.svdvals(roots[:, None] * shifts.double())


def similarity(i: int, j: int, d: int, k: int = 0) -> Prediction:
    """φ = ‖U_iᵀ V_j‖²_F / min(i, j) of two bases of R^d that share their first k directions.

    φ is the subspace similarity of Hu et al. 2021, section 7.2. The directions that are not shared
    are random. The mean is [min(k,i,j) + (i−k)₊(j−k)₊/(d−k)] / min(i,j); with none shared it is
    max(i,j)/d. For p and q random directions of R^D, ‖U_pᵀ V_q‖²_F has variance
    2pq(D−p)(D−q) / (D²(D−1)(D+2)).
    """
    p, q, D = max(i - k, 0), max(j - k, 0), d - k
    trace = p * q / D if D else 0.0
    variance = 2 * trace * (D - p) * (D - q) / (D * (D - 1) * (D + 2)) if D > 1 else 0.0
    return Prediction((min(k, i, j) + trace) / min(i, j), math.sqrt(variance) / min(i, j))


MOMENTS = {"kaiming": (1 / 3, -2 / 15), "gaussian": (1.0, 0.0)}
"""Init → variance and fourth cumulant of the iid entries of A; Kaiming's times d and d²."""


def _moments(init: str, d: int) -> tuple[float, float]:
    """Variance and fourth cumulant of an entry of A with `d` inputs."""
    variance, cumulant = MOMENTS[init]
    return (variance / d, cumulant / d**2) if init == "kaiming" else (variance, cumulant)


def gradient_ratio(G: Float[Tensor, "out d"], r: int, scale: float, init: str) -> Prediction:
    """‖∇_B‖ / ‖G‖ before the first step, where B is zero and G is the gradient of the full weight.

    ∇_B = scale · G Aᵀ, so the root mean square over draws of A is scale · √(r v), with v the
    variance of an entry of A: scale · √(r/3d) for Kaiming's. The standard error is that of one
    draw, to first order.
    """
    v, cumulant = _moments(init, G.shape[1])
    M = G.double().T @ G.double()  # (d, d)
    variance = 2 * v**2 * M.square().sum() + cumulant * M.diag().square().sum()  # of aᵀ M a
    value = scale * math.sqrt(r * v)
    return Prediction(value, value / (2 * v * M.trace().item()) * math.sqrt(variance.item() / r))


def descent(G: Float[Tensor, "out d"], r: int, scale: float, init: str) -> Prediction:
    """The descent ⟨−G, ΔW⟩ / (lr Σ_o ‖G_o‖) of Adam's first step, which moves entries of B by lr.

    G_o is row o of the gradient of the full weight, a_j row j of A. The descent is
    scale · Σ_oj |G_o · a_j| / Σ_o ‖G_o‖, with mean scale · r √(2v/π): scale · r √(2/π) / √(3d) for
    Kaiming's A. G_o · a_j is taken as normal, as it is for many inputs.
    """
    v, _ = _moments(init, G.shape[1])
    norms = torch.linalg.vector_norm(G.double(), dim=1)
    unit = G.double() / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    rho = (unit @ unit.T).clamp(-1, 1)  # (out, out): cosines of the rows of G
    # The covariance of |x| and |y| for standard normal x and y with correlation ρ.
    covariance = 2 / math.pi * (rho * rho.asin() + (1 - rho.square()).sqrt() - 1)
    share = norms / norms.sum()
    error = scale * math.sqrt(r * v * (share @ covariance @ share).item())
    return Prediction(scale * r * math.sqrt(2 * v / math.pi), error)
