"""ReLoRA's form: factors that train, beside those of earlier rounds that are kept as they were."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lab.adapters.form import Form, Tensors

MERGED = ("A_merged", "B_merged")


class ReLoRA(Form):
    """B A = B₀ A₀ + B₁ A₁ + … + Bₙ Aₙ, of which the last pair trains (Lialin et al. 2023).

    A restart ends a round: the pair that trained is kept, and a new one begins with ΔW unchanged.
    ΔW so has up to r of rank for each round. The paper adds each finished product to the base's
    weight. Here the base stays as it is: the rows of A_merged and the columns of B_merged are the
    factors of the finished rounds, a pair after the other.
    """

    kinds = ("linear", "conv")
    zero_tensor = "B"
    frozen = MERGED
    grows = MERGED

    def shapes(self, out: int, rest: int, positions: int, r: int) -> dict[str, tuple[int, ...]]:
        """A and B as LoRA's; of merged ones none yet."""
        return {"A": (r, rest), "B": (out, r), "A_merged": (0, rest), "B_merged": (out, 0)}

    def stored_shapes(
        self, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """With as many merged pairs as A_merged has."""
        merged, *_ = stored.get("A_merged", (0,))
        (_, rest), (out, _) = shapes["A"], shapes["B"]
        return {**shapes, "A_merged": (merged, rest), "B_merged": (out, merged)}

    def draw(
        self, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A as LoRA's, B zero."""
        pair = super().draw({name: shapes[name] for name in ("A", "B")}, generator)
        return pair | {name: torch.zeros(shapes[name]) for name in MERGED}

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The pair that trains, then the merged ones: [A; A_merged] and [B, B_merged]."""
        A, B, A_merged, B_merged = (tensors[name] for name in ("A", "B", *MERGED))
        return torch.cat([A, A_merged], -2), torch.cat([B, B_merged], -1)

    @torch.no_grad()
    def restart(self, tensors: Tensors, generator: torch.Generator) -> None:
        """Ends a round: keeps the pair that has trained, and draws a new one in its place."""
        A, B, A_merged, B_merged = (tensors[name] for name in ("A", "B", *MERGED))
        A_merged.data = torch.cat([A_merged, A])
        B_merged.data = torch.cat([B_merged, B], 1)
        A.copy_(self.draw({name: t.shape for name, t in tensors.items()}, generator)["A"])
        B.zero_()
