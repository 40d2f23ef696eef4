"""LoHa: the product, entry by entry, of two low-rank matrices, whose rank is up to r²."""

import torch.nn.functional as F
from torch import Tensor

from lora_lab.adapters.form import Form, Tensors, thin_factors


class LoHa(Form):
    """ΔW = scale · (B A) ∘ (B₂ A₂), entry by entry (FedPara, Hyeon-Woo et al. 2022, proposition
    1). Its rank is up to r², for 2 r (out + rest) numbers: as many as LoRA has at 2 r. A₂ starts at
    zero. A convolution's weight is taken as its matrix.
    """

    kinds = ("linear", "conv")
    zero_tensor = "A2"

    def shapes(self, out: int, rest: int, positions: int, r: int) -> dict[str, tuple[int, ...]]:
        """Two pairs of factors, each as LoRA's."""
        return {"A": (r, rest), "B": (out, r), "A2": (r, rest), "B2": (out, r)}

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Factors of rank r², or of the weight's rank where that is less."""
        return hadamard_factors(tensors["A"], tensors["B"], tensors["A2"], tensors["B2"])

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """By the factors, or by the matrix where forming that costs less for each row."""
        A, B, A2, B2 = (tensors[name] for name in ("A", "B", "A2", "B2"))
        r, (out, rest) = len(A), (len(B), A.shape[-1])
        if r * r * (out + rest) > out * rest:
            return F.linear(x, (B @ A) * (B2 @ A2))
        return super().product(tensors, x)


# Row i of B times column j of A, times the same of the second pair, is a sum over pairs (p, q):
#   Σₚ B[i, p] A[p, j] · Σ_q B₂[i, q] A₂[q, j] = Σ₍ₚ,q₎ (B[i, p] B₂[i, q]) · (A[p, j] A₂[q, j])
# With r = 2 and a weight of 5 × 7: the new A (4, 7) has the products of each row of A (2, 7) with
# each of A₂ (2, 7), and the new B (5, 4) those of the columns of B (5, 2) and B₂ (5, 2).
def hadamard_factors(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of (B A) ∘ (B₂ A₂): of rank r², or of the matrix's rank where that is less.

    The two pairs are A (*runs, r, rest) and B (*runs, out, r).
    """
    if A.shape[-2] * A2.shape[-2] > min(B.shape[-2], A.shape[-1]):
        return thin_factors((B @ A) * (B2 @ A2))
    rows = (A[..., :, None, :] * A2[..., None, :, :]).flatten(-3, -2)  # (*runs, r², rest)
    columns = (B[..., :, :, None] * B2[..., :, None, :]).flatten(-2)  # (*runs, out, r²)
    return rows, columns
