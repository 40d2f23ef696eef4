"""LoKr: Kronecker's product of a small matrix and a low-rank one."""

import math

import torch.nn.functional as F
from torch import Tensor

from lora_lab.adapters.form import Form, Tensors, thin_factors


class LoKr(Form):
    """ΔW = scale · C ⊗ (B A), or C ⊗ D where r is no less than half of D's longer side.

    As in LyCORIS (Yeh et al. 2024) and PEFT, out = o₁ · o₂ and in = i₁ · i₂ are each split as near
    to the square root as can be. C is o₁ × i₁, the other matrix o₂ × i₂ (of a convolution o₂ × i₂ ·
    k…). With `both`, C is a product C C₂ of rank r as well, where r is less than half of its longer
    side. C starts at zero.

    ΔW's rank is the product of those of its two matrices, up to min(o₁, i₁) · r.
    """

    kinds = ("linear", "conv")
    zero_tensor = "C"

    def __init__(self, both: bool = False):
        self.both = both

    def shapes(self, out: int, rest: int, positions: int, r: int) -> dict[str, tuple[int, ...]]:
        """C, or C and C2 whose product it is; then A and B, or D."""
        (o1, o2), (i1, i2) = middle_divisors(out), middle_divisors(rest // positions)
        shapes: dict[str, tuple[int, ...]] = {"C": (o1, i1)}
        if self.both and r < max(o1, i1) / 2:
            shapes = {"C": (o1, r), "C2": (r, i1)}
        if r < max(o2, i2) / 2:
            return {**shapes, "A": (r, i2 * positions), "B": (o2, r)}
        return {**shapes, "D": (o2, i2 * positions)}

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The Kronecker products of the factors: (B A) ⊗ (B' A') = (B ⊗ B') (A ⊗ A')."""
        is_product = "C2" in tensors
        right, left = (tensors["C2"], tensors["C"]) if is_product else thin_factors(tensors["C"])
        A, B = (tensors["A"], tensors["B"]) if "A" in tensors else thin_factors(tensors["D"])
        return kronecker(right, A), kronecker(left, B)

    # For a weight of 6 × 8 and r = 1: C (2, 2), A (1, 4), B (3, 1). An input of 8 numbers is a
    # matrix of i₁ = 2 rows and i₂ = 4 columns, to whose rows A is applied, to what comes out of it
    # (2, 1) C from the left (2, 1), and B to the rows of that: 2 × 3, the 6 outputs.
    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """C and then B applied to what A makes of x as a matrix, which forms no product ⊗."""
        C = tensors["C"] @ tensors["C2"] if "C2" in tensors else tensors["C"]
        hidden = x.unflatten(-1, (C.shape[1], -1))  # (…, i₁, i₂)
        if "A" in tensors:
            hidden = F.linear(hidden, tensors["A"])  # (…, i₁, r)
        hidden = F.linear(hidden.mT, C).mT  # (…, o₁, r)
        return F.linear(hidden, tensors["B"] if "B" in tensors else tensors["D"]).flatten(-2)


def kronecker(one: Tensor, other: Tensor) -> Tensor:
    """one ⊗ other of matrices (*runs, a, b) and (*runs, c, d): (*runs, a · c, b · d)."""
    product = one[..., :, None, :, None] * other[..., None, :, None, :]
    return product.flatten(-2).flatten(-3, -2)


def middle_divisors(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to its square root, the smaller one first."""
    smaller = next(m for m in range(math.isqrt(number), 0, -1) if number % m == 0)
    return smaller, number // smaller
