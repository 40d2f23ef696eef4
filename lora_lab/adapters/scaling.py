"""How alpha and r give the scale in ΔW = scale · B A."""

import math
from collections.abc import Callable

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, r: alpha / r,  # Hu et al. 2021, section 4.1
    "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r),  # rsLoRA, Kalajdzievski 2023
    "alpha": lambda alpha, r: alpha,
    "none": lambda alpha, r: 1.0,  # VeRA, Kopiczko et al. 2024, equation 2
}
"""The scale from (alpha, r), by name."""
