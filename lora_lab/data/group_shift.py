"""A table of embeddings in which every group of tokens moves by a vector of its own."""

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

    Every token comes once. The first `groups[0]` of them move by c_0, the next `groups[1]` by c_1,
    and so on; the rest stay. E is standard normal, the c_g normal of norm `shift` in the mean.
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
        super().__init__(phase, steps, seed)
        if sum(groups) > in_features:
            raise ValueError(
                f"groups={groups}: {sum(groups)} tokens, and in_features={in_features} has fewer"
            )
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.noise = noise
        shape = (len(groups), out_features)
        shifts = torch.randn(*shape, generator=generator(seed, "shifts")).double()
        self.shifts = shifts * shift / out_features**0.5  # (groups, features)

    @property
    def sizes(self) -> dict[str, int]:
        """Tokens, and the features of each."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    @property
    def delta(self) -> Tensor:
        """The change of every token, tokens × features."""
        moved = self.shifts.repeat_interleave(torch.tensor(self.groups), 0)
        return F.pad(moved, (0, 0, 0, self.in_features - len(moved)))

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """All tokens, twice."""
        shape = (self.in_features, self.out_features)
        y = torch.randn(*shape, generator=generator(self.seed, "E")).double()
        if self.phase == "adapt":
            noise = torch.randn(*shape, generator=generator(self.seed, "noise"))
            y = y + self.delta + self.noise * noise
        everything = TensorDataset(torch.arange(self.in_features), y.float())
        return everything, everything

    def design(self) -> tuple[Tensor, Tensor]:
        """The tokens as one-hot rows, and y."""
        assert self.train is not None
        tokens, y = self.train.tensors
        return F.one_hot(tokens, self.in_features), y
