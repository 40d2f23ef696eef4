"""What an update looks like: singular values and the measures of rank read from them.

Pure functions of tensors, computed in float64.
"""

import math
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
        """Every measure by its name, with σ₁ and σ₂."""
        names = ("effective_rank", "stable_rank", "energy_90", "energy_99", "numerical_rank")
        return {
            "sigma_1": self.sigma(1),
            "sigma_2": self.sigma(2),
            **{name: float(getattr(self, name)) for name in (*names, "frobenius", "nuclear")},
        }


def from_factors(
    A: Float[Tensor, "r rest"], B: Float[Tensor, "out r"], scale: float = 1.0
) -> Spectrum:
    """The spectrum of scale · B A, without forming it: O((out + rest) r² + r³).

    With QR(B) = Q_B R_B and QR(Aᵀ) = Q_A R_A the singular values are those of R_B R_Aᵀ (r × r).
    Raises ValueError where a factor holds NaN or infinity.
    """
    _check_finite(A=A, B=B)
    R_B = torch.linalg.qr(B.detach().double(), mode="r").R  # (min(out, r), r)
    R_A = torch.linalg.qr(A.detach().double().T, mode="r").R  # (min(rest, r), r)
    sigma = abs(scale) * torch.linalg.svdvals(R_B @ R_A.T)
    return Spectrum(sigma.cpu(), (B.shape[0], A.shape[1]), _eps(A))


def from_matrix(delta: Float[Tensor, "out rest"]) -> Spectrum:
    """The spectrum of a dense ΔW. Raises ValueError where it holds NaN or infinity."""
    _check_finite(delta=delta)
    sigma = torch.linalg.svdvals(delta.detach().double())
    return Spectrum(sigma.cpu(), (delta.shape[0], delta.shape[1]), _eps(delta))


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} ({' × '.join(map(str, tensor.shape))}) holds NaN or infinity")


def _eps(tensor: Tensor) -> float:
    # Updates are summed in float32 at least; at bfloat16's own eps no rank above 0 would be seen.
    return torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
