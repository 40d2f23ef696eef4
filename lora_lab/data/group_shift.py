"""An embedding table in which the tokens of each group move by the same vector."""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.planted import Planted
from lora_lab.seeding import generator


class GroupShift(Planted):
    """y = E[token] for the base, y = (E + Σ_g 1_g c_gᵀ)[token] + noise to adapt to.

    Each token occurs once. The first `groups[0]` tokens move by c_0, the next `groups[1]` by c_1,
    and so on; the rest stay. E is standard normal. c_g is normal with E ‖c_g‖² = `shift`².
    """

    def __init__(
        self,
        phase: Phase,
        in_features: PositiveInt,
        out_features: PositiveInt,
        groups: list[PositiveInt],
        shift: PositiveFloat,
        noise: NonNegativeFloat,
        steps: PositiveInt,
        seed: Seed,
    ):
        super().__init__(phase, in_features, out_features, noise, steps, seed)
        if sum(groups) > in_features:
            raise ValueError(
                f"groups={groups}: {sum(groups)} tokens, and in_features={in_features} has fewer"
            )
        self.groups = groups
        shape = (len(groups), out_features)
        shifts = torch.randn(*shape, generator=generator(seed, "shifts")).double()
        self.shifts = shifts * shift / out_features**0.5  # (groups, features)

    @property
    def delta(self) -> Tensor:
        """The planted change of each token: (tokens, features)."""
        moved = self.shifts.repeat_interleave(torch.tensor(self.groups), 0)
        return F.pad(moved, (0, 0, 0, self.in_features - len(moved)))

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """All tokens with their y (tokens, features), for training and for validation."""
        shape = (self.in_features, self.out_features)
        y = torch.randn(*shape, generator=generator(self.seed, "E")).double()
        y = y + self.delta if self.phase == "adapt" else y
        return self.datasets(torch.arange(self.in_features), y)
