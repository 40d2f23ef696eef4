"""VeRA: two frozen random factors for all layers, and two trained vectors for each."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lab.adapters.form import Form, Tensors, uniform


class VeRA(Form):
    """B A = diag(b) B₀ diag(d) A₀ with frozen A₀, B₀ (Kopiczko et al. 2024, equation 2).

    A layer trains out + r numbers: b (out) and d (r). All layers of a model share the random A₀ and
    B₀: those of a smaller layer are the first columns of A₀ and the first rows of B₀. Both have
    Kaiming's bound for the layer's size, so they are shared but for a factor; PEFT, which takes the
    bound of the largest layer, differs by that in A₀.

    d starts at 0.1, as PEFT's, and b at zero. The paper has no scale: take scaling "none".
    """

    kinds = ("linear",)
    zero_tensor = "lambda_b"
    frozen = ("A", "B")
    is_shared = True

    def shapes(self, out: int, rest: int, positions: int, r: int) -> dict[str, tuple[int, ...]]:
        """A and B as LoRA's, b a number for each output, d one for each of the rank."""
        return {"A": (r, rest), "B": (out, r), "lambda_b": (out,), "lambda_d": (r,)}

    def draw(
        self, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A and B uniform on ±√(6/columns), d = 0.1 and b = 0.

        A is drawn column by column and B row by row, from two streams, so that the smaller of two
        layers has the first columns and rows of the larger.
        """
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        of_A, of_B = (torch.Generator().manual_seed(seed) for seed in seeds)
        (r, rest), B = shapes["A"], shapes["B"]
        return {
            "A": uniform((rest, r), math.sqrt(6 / rest), of_A).T,
            "B": uniform(B, math.sqrt(6 / r), of_B),
            "lambda_b": torch.zeros(shapes["lambda_b"]),
            "lambda_d": torch.full(shapes["lambda_d"], 0.1),
        }

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """diag(d) A and diag(b) B."""
        d, b = tensors["lambda_d"], tensors["lambda_b"]
        return d[..., None] * tensors["A"], b[..., None] * tensors["B"]

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """b ∘ B (d ∘ A x): the backward then forms no gradient in the shape of A or B."""
        hidden = F.linear(x, tensors["A"]) * tensors["lambda_d"]
        return F.linear(hidden, tensors["B"]) * tensors["lambda_b"]
