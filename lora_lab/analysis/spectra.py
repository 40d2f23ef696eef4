"""What an update looks like: its singular values and directions, and the measures read from them.

Pure functions of tensors, computed in float64. Directions are columns, orthonormal.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one ΔW, in descending order, and what they say.

    `shape` is the matrix's (out × rest); `eps` the rounding of the numbers it was read from. Every
    measure of the zero matrix is 0.
    """

    singular_values: Float64[Tensor, " k"]
    shape: tuple[int, int]
    eps: float

    @property
    def effective_rank(self) -> float:
        """exp(−Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007)."""
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
        fourth = torch.linalg.vector_norm(self.singular_values, ord=4).item()
        return (self.frobenius / fourth) ** 4 if fourth else 0.0

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
        energy = self.singular_values.square().cumsum(0)
        if not self.frobenius:
            return 0
        return int((energy < share * energy[-1]).sum()) + 1

    def measures(self) -> dict[str, float]:
        """Every measure by its name, with σ₁ … σ₄."""
        names = ("effective_rank", "stable_rank", "participation_ratio", "energy_90", "energy_99")
        names += ("numerical_rank", "frobenius", "nuclear")
        return {
            **{f"sigma_{i}": self.sigma(i) for i in range(1, 5)},
            **{name: float(getattr(self, name)) for name in names},
        }


@dataclass(frozen=True)
class SVD:
    """A matrix as U diag(S) Vh, S descending."""

    U: Float64[Tensor, "out k"]
    S: Float64[Tensor, " k"]
    Vh: Float64[Tensor, "k rest"]

    def cut(self, k: int) -> Float64[Tensor, "out rest"]:
        """The best approximation of rank k (Eckart & Young 1936)."""
        return (self.U[:, :k] * self.S[:k]) @ self.Vh[:k]

    def first(self, k: int) -> "SVD":
        """The first k triples."""
        return SVD(self.U[:, :k], self.S[:k], self.Vh[:k])

    def above_rounding(self) -> "SVD":
        """The triples above rounding in single precision: the directions that are the matrix's."""
        size = max(self.U.shape[0], self.Vh.shape[1]) * torch.finfo(torch.float32).eps
        return self.first(int((self.S[:1] * size < self.S).sum()))


def singular_values(
    A: Float[Tensor, "*sites r rest"], B: Float[Tensor, "*sites out r"], scale: float = 1.0
) -> Float64[Tensor, "*sites k"]:
    """Those of scale · B A, without forming it: O((out + rest) r² + r³).

    With QR(B) = Q_B R_B and QR(Aᵀ) = Q_A R_A they are those of R_B R_Aᵀ (r × r). Raises ValueError
    where a factor holds NaN or infinity.
    """
    _check_finite(A=A, B=B)
    R_B = torch.linalg.qr(B.detach().double(), mode="r").R  # (*, min(out, r), r)
    R_A = torch.linalg.qr(A.detach().double().mT, mode="r").R  # (*, min(rest, r), r)
    sigma = torch.linalg.svdvals(R_B @ R_A.mT)
    return abs(scale) * torch.where(sigma > _rounding(R_A, R_B)[..., None], sigma, 0)


def _rounding(R_A: Tensor, R_B: Tensor) -> Tensor:
    """What is left of singular values where the product cancels: B A − B₀ A₀ before a step."""
    sizes = torch.linalg.matrix_norm(R_A) * torch.linalg.matrix_norm(R_B)
    return 8 * torch.finfo(torch.float64).eps * sizes


def spectrum_of_factors(
    A: Float[Tensor, "r rest"], B: Float[Tensor, "out r"], scale: float = 1.0
) -> Spectrum:
    """The spectrum of scale · B A. Raises as `singular_values` does."""
    sigma = singular_values(A, B, scale)
    return Spectrum(sigma.cpu(), (B.shape[0], A.shape[1]), _eps(A))


def spectrum_of_matrix(delta: Float[Tensor, "out rest"]) -> Spectrum:
    """The spectrum of a dense ΔW. Raises ValueError where it holds NaN or infinity."""
    _check_finite(delta=delta)
    sigma = torch.linalg.svdvals(delta.detach().double())
    return Spectrum(sigma.cpu(), (delta.shape[0], delta.shape[1]), _eps(delta))


Factors = tuple[Tensor, Tensor, float]
"""A, B and scale."""


def spectra_of_sites(sites: Mapping[str, Factors]) -> dict[str, Spectrum]:
    """The spectrum of each site; sites of one shape are stacked and decomposed in one call."""
    alike: dict[object, list[str]] = {}
    for site, (A, B, _) in sites.items():
        alike.setdefault((A.shape, B.shape, A.dtype, A.device), []).append(site)
    found: dict[str, Spectrum] = {}
    for names in alike.values():
        A, B = (torch.stack([sites[name][i] for name in names]) for i in (0, 1))  # pyright: ignore
        try:
            values = singular_values(A, B).cpu()
        except ValueError:
            for name in names:  # says which
                _check_finite(**{f"A of {name}": sites[name][0], f"B of {name}": sites[name][1]})
            raise
        for name, sigma in zip(names, values, strict=True):
            scale = abs(sites[name][2])
            found[name] = Spectrum(scale * sigma, (B.shape[1], A.shape[2]), _eps(A))
    return {site: found[site] for site in sites}


def spectrum_of_blocks(spectra: Iterable[Spectrum]) -> Spectrum:
    """The spectrum of several updates as one block-diagonal matrix: all their singular values."""
    every = list(spectra)
    sigma = torch.cat([s.singular_values for s in every]).sort(descending=True).values
    shape = (sum(s.shape[0] for s in every), sum(s.shape[1] for s in every))
    return Spectrum(sigma, shape, max(s.eps for s in every))


def svd_of_factors(
    A: Float[Tensor, "r rest"], B: Float[Tensor, "out r"], scale: float = 1.0
) -> SVD:
    """The SVD of scale · B A, without forming it. Raises as `singular_values` does."""
    _check_finite(A=A, B=B)
    Q_B, R_B = torch.linalg.qr(B.detach().double())
    Q_A, R_A = torch.linalg.qr(A.detach().double().T)
    U, S, Vh = torch.linalg.svd(math.copysign(1, scale) * R_B @ R_A.T, full_matrices=False)
    S = abs(scale) * torch.where(_rounding(R_A, R_B) < S, S, 0)
    return SVD(Q_B @ U, S, Vh @ Q_A.T)


def svd_of_matrix(matrix: Float[Tensor, "out rest"]) -> SVD:
    """The thin SVD of a dense matrix. Raises ValueError where it holds NaN or infinity."""
    _check_finite(matrix=matrix)
    return SVD(*torch.linalg.svd(matrix.detach().double(), full_matrices=False))


def similarity(
    one: Float64[Tensor, "n p"], other: Float64[Tensor, "n q"]
) -> Float64[Tensor, "p q"]:
    """φ(i, j) = ‖Uᵢᵀ Vⱼ‖²_F / min(i, j) of the first i and the first j directions.

    From 0, orthogonal, to 1, the smaller span inside the larger (Hu et al. 2021, equation 4).
    """
    _check_directions(one=one, other=other)
    shared = (one.T @ other).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, one.shape[1] + 1), torch.arange(1, other.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j).to(shared)


def principal_angles(
    one: Float64[Tensor, "n p"], other: Float64[Tensor, "n q"]
) -> Float64[Tensor, " k"]:
    """The angles between two spans in radians, ascending: arccos σ(UᵀV), k = min(p, q).

    Below 45° they are taken from the sine, which keeps the digits the cosine loses (Björck & Golub
    1973).
    """
    _check_directions(one=one, other=other)
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    cosine = torch.linalg.svdvals(one.T @ other).clamp(max=1)
    sine = torch.linalg.svdvals(other - one @ (one.T @ other)).flip(0).clamp(max=1)
    return torch.where(cosine > math.sqrt(0.5), sine.asin(), cosine.acos())


def grassmann_distance(one: Float64[Tensor, "n p"], other: Float64[Tensor, "n q"]) -> float:
    """√Σθ² over the principal angles."""
    return torch.linalg.vector_norm(principal_angles(one, other)).item()


def projection(W: Float[Tensor, "out rest"], delta: SVD) -> float:
    """‖Uᵀ W V‖_F: how much of W lies in the directions of ΔW (Hu et al. 2021, table 7)."""
    return torch.linalg.matrix_norm(delta.U.T @ W.double() @ delta.Vh.T).item()


def amplification(W: Float[Tensor, "out rest"], delta: SVD) -> float:
    """‖ΔW‖_F / ‖Uᵀ W V‖_F: how far ΔW amplifies what W has of its directions; 0 of no change."""
    norm, held = torch.linalg.vector_norm(delta.S).item(), projection(W, delta)
    return norm / held if held else (math.inf if norm else 0.0)


def intruders(
    before: Float64[Tensor, "out n"], after: Float64[Tensor, "out k"], cosine: float = 0.5
) -> int:
    """How many left singular vectors `after` are like none `before` (Shuttleworth et al. 2024).

    Those of W + ΔW whose largest |cos| with any left singular vector of W is under `cosine`.
    """
    _check_directions(before=before, after=after)
    if not before.shape[1]:
        return after.shape[1]
    return int(((before.T @ after).abs().amax(0) < cosine).sum())


def _check_directions(**spans: Tensor) -> None:
    for name, U in spans.items():
        identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        if not torch.allclose(U.T @ U, identity, atol=1e-6):
            raise ValueError(f"{name} ({U.shape[0]} × {U.shape[1]}): columns are not orthonormal")


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} ({' × '.join(map(str, tensor.shape))}) holds NaN or infinity")


def _eps(tensor: Tensor) -> float:
    # Updates are summed in float32 at least; at bfloat16's own eps no rank above 0 would be seen.
    return torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
