"""Spectra of ΔW: singular values, singular vectors, and the measures computed from them.

Pure functions of tensors, computed in float64.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

TRIPLES = 64
"""How many singular triples of each site spectra.npz stores, at most."""

INTRUDERS_AMONG = 10
"""How many of the first left singular vectors of W + ΔW are compared with W's for intruders."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ of one ΔW, in descending order, and the measures of its rank and size.

    `shape` is (out, rest), the shape of ΔW as a matrix. `eps` is the machine epsilon of the numbers
    that ΔW was computed from, for `numerical_rank`. All measures of the zero matrix are 0.
    """

    singular_values: Float64[Tensor, " k"]
    shape: tuple[int, int]
    eps: float

    @property
    def effective_rank(self) -> float:
        """exp(−Σ p ln p) with p = σ/Σσ, from 1 to the rank (Roy & Vetterli 2007)."""
        if not self.nuclear:
            return 0.0
        p = self.singular_values / self.nuclear
        return math.exp(-torch.special.xlogy(p, p).sum().item())

    @property
    def stable_rank(self) -> float:
        """Σσ² / σ₁²."""
        return (self.frobenius / self.sigma(1)) ** 2 if self.frobenius else 0.0

    @property
    def participation_ratio(self) -> float:
        """(Σσ²)² / Σσ⁴."""
        norm_4 = torch.linalg.vector_norm(self.singular_values, ord=4).item()
        return (self.frobenius / norm_4) ** 4 if norm_4 else 0.0

    @property
    def energy_90(self) -> int:
        """The least k whose σ₁² … σ_k² hold 90% of Σσ²."""
        return self.energy_rank(0.90)

    @property
    def energy_99(self) -> int:
        """The least k whose σ₁² … σ_k² hold 99% of Σσ²."""
        return self.energy_rank(0.99)

    @property
    def numerical_rank(self) -> int:
        """How many σ exceed σ₁ · max(out, rest) · eps."""
        return int((self.singular_values > self.sigma(1) * max(self.shape) * self.eps).sum())

    @property
    def frobenius(self) -> float:
        """√Σσ²."""
        return torch.linalg.vector_norm(self.singular_values).item()

    @property
    def nuclear(self) -> float:
        """Σσ."""
        return self.singular_values.sum().item()

    def sigma(self, i: int) -> float:
        """The i-th singular value, from 1; 0 past the last."""
        return self.singular_values[i - 1].item() if i <= len(self.singular_values) else 0.0

    def energy_rank(self, share: float) -> int:
        """The least k whose σ₁² … σ_k² hold `share` of Σσ²."""
        energy = self.singular_values.square().cumsum(0)  # (k,): of the first 1, 2, … k
        if not self.frobenius:
            return 0
        return int((energy < share * energy[-1]).sum()) + 1

    def measures(self) -> dict[str, float]:
        """All measures by name: `sigma_1` … `sigma_4`, `effective_rank` and so on."""
        names = ("effective_rank", "stable_rank", "participation_ratio", "energy_90", "energy_99")
        names += ("numerical_rank", "frobenius", "nuclear")
        return {
            **{f"sigma_{i}": self.sigma(i) for i in range(1, 5)},
            **{name: float(getattr(self, name)) for name in names},
        }


@dataclass(frozen=True)
class SVD:
    """The thin singular value decomposition U diag(S) Vh of a matrix, S descending.

    A leading dimension is that of the matrices of experts.
    """

    U: Float64[Tensor, "*experts out k"]
    S: Float64[Tensor, "*experts k"]
    Vh: Float64[Tensor, "*experts k rest"]

    @property
    def k(self) -> int:
        """The number of triples (left vector, value, right vector)."""
        return self.S.shape[-1]

    def cut(self, k: int) -> Float64[Tensor, "*experts out rest"]:
        """The matrix of rank k that is nearest to this one (Eckart & Young 1936)."""
        first = self.first(k)
        return (first.U * first.S[..., None, :]) @ first.Vh

    def first(self, k: int) -> "SVD":
        """The first k singular triples."""
        return SVD(self.U[..., :k], self.S[..., :k], self.Vh[..., :k, :])

    def matrices(self) -> "list[SVD]":
        """The decomposition of each expert's matrix, or this one."""
        if self.S.dim() == 1:
            return [self]
        return [SVD(*one) for one in zip(self.U, self.S, self.Vh, strict=True)]

    def above_rounding(self) -> "SVD":
        """The triples whose value is more than float32 rounding: σ > σ₁ · max(out, rest) · eps.

        The vectors of the others are those of the rounding error, not of the matrix.
        """
        relative = max(self.U.shape[0], self.Vh.shape[1]) * torch.finfo(torch.float32).eps
        return self.first(int((self.S[:1] * relative < self.S).sum()))


def singular_values(
    A: Float[Tensor, "*sites r rest"], B: Float[Tensor, "*sites out r"], scale: float = 1.0
) -> Float64[Tensor, "*sites k"]:
    """The singular values of scale · B A, without forming it, in O((out + rest) r² + r³).

    With QR(B) = Q_B R_B and QR(Aᵀ) = Q_A R_A, B A = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values of
    the small matrix R_B R_Aᵀ. Leading dimensions (sites) are a batch. Raises ValueError where a
    factor holds NaN or infinity.
    """
    _check_finite(A=A, B=B)
    R_B = torch.linalg.qr(B.detach().double(), mode="r").R  # (*, min(out, r), r)
    R_A = torch.linalg.qr(A.detach().double().mT, mode="r").R  # (*, min(rest, r), r)
    sigma = torch.linalg.svdvals(R_B @ R_A.mT)
    return abs(scale) * torch.where(sigma > _rounding(R_A, R_B)[..., None], sigma, 0)


def _rounding(R_A: Tensor, R_B: Tensor) -> Tensor:
    """The size below which a singular value of R_B R_Aᵀ is rounding error, and is set to 0.

    Before the first step B A − B₀ A₀, written as one product of stacked factors, cancels to zero
    exactly; what float64 leaves of it is of this size.
    """
    norms = torch.linalg.matrix_norm(R_A) * torch.linalg.matrix_norm(R_B)
    return 8 * torch.finfo(torch.float64).eps * norms


def spectrum_of_factors(
    A: Float[Tensor, "r rest"], B: Float[Tensor, "out r"], scale: float = 1.0
) -> Spectrum:
    """The spectrum of scale · B A. Raises as `singular_values` does."""
    return Spectrum(singular_values(A, B, scale).cpu(), (B.shape[0], A.shape[1]), _eps(A))


def spectrum_of_matrix(delta: Float[Tensor, "out rest"]) -> Spectrum:
    """The spectrum of a dense ΔW. Raises ValueError where it holds NaN or infinity."""
    _check_finite(delta=delta)
    sigma = torch.linalg.svdvals(delta.detach().double())
    return Spectrum(sigma.cpu(), (delta.shape[0], delta.shape[1]), _eps(delta))


Factors = tuple[Tensor, Tensor, float]
"""A (r, rest), B (out, r) and the scale of ΔW = scale · B A."""


def spectra_of_sites(sites: Mapping[str, Factors | Tensor]) -> dict[str, Spectrum]:
    """The spectrum of ΔW of each site, given by its factors or as a dense weight's change.

    Factors of one shape are stacked and decomposed in one call.
    """
    # One batched QR is much faster than a loop: 12 attention layers of the same shape are one
    # group, A (12, r, rest) and B (12, out, r).
    groups: dict[object, list[str]] = {}
    dense = {site: update for site, update in sites.items() if isinstance(update, Tensor)}
    for site in (site for site in sites if site not in dense):
        A, B, _ = sites[site]
        groups.setdefault((A.shape, B.shape, A.dtype, A.device), []).append(site)
    spectra = {site: spectrum_of_matrix(delta.flatten(1)) for site, delta in dense.items()}
    for names in groups.values():
        A, B = (torch.stack([sites[name][i] for name in names]) for i in (0, 1))  # pyright: ignore
        try:
            values = singular_values(A, B).cpu()  # (sites, k)
        except ValueError:
            for name in names:  # raises again, with the name of the site
                _check_finite(**{f"A of {name}": sites[name][0], f"B of {name}": sites[name][1]})
            raise
        for name, sigma in zip(names, values, strict=True):
            spectra[name] = Spectrum(abs(sites[name][2]) * sigma, (B.shape[1], A.shape[2]), _eps(A))
    return {site: spectra[site] for site in sites}


def spectrum_of_blocks(spectra: Iterable[Spectrum]) -> Spectrum:
    """The spectrum of the block-diagonal matrix of several updates: all their singular values."""
    blocks = list(spectra)
    sigma = torch.cat([s.singular_values for s in blocks]).sort(descending=True).values
    shape = (sum(s.shape[0] for s in blocks), sum(s.shape[1] for s in blocks))
    return Spectrum(sigma, shape, max(s.eps for s in blocks))


def svd_of_factors(
    A: Float[Tensor, "*experts r rest"], B: Float[Tensor, "*experts out r"], scale: float = 1.0
) -> SVD:
    """The SVD of scale · B A, without forming the product. Raises as `singular_values` does."""
    _check_finite(A=A, B=B)
    Q_B, R_B = torch.linalg.qr(B.detach().double())  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(A.detach().double().mT)  # (rest, r), (r, r)
    U, S, Vh = torch.linalg.svd(math.copysign(1, scale) * R_B @ R_A.mT, full_matrices=False)
    S = abs(scale) * torch.where(_rounding(R_A, R_B)[..., None] < S, S, 0)
    return SVD(Q_B @ U, S, Vh @ Q_A.mT)


def svd_of_matrix(matrix: Float[Tensor, "*experts out rest"]) -> SVD:
    """The thin SVD of a dense matrix. Raises ValueError where it holds NaN or infinity."""
    _check_finite(matrix=matrix)
    return SVD(*torch.linalg.svd(matrix.detach().double(), full_matrices=False))


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} ({' × '.join(map(str, tensor.shape))}) holds NaN or infinity")


def _eps(tensor: Tensor) -> float:
    # ΔW of bfloat16 factors is summed in float32. With bfloat16's eps, 2⁻⁷, the threshold of
    # `numerical_rank` would be σ₁ or more for a matrix of 128 rows, and the rank always 0.
    return torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
