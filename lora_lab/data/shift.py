"""A linear map all of whose entries move by the same amount: the update to find has rank 1."""

import torch
from pydantic import FiniteFloat, PositiveInt
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase
from lora_lab.seeding import generator


class Shift(Data):
    """y = x θ for the base, y = x (θ + shift) to adapt to, with fresh x and no noise.

    θ (in × out) and x are standard normal. ΔW to be learned is `shift` times a matrix of ones:
    rank 1, σ₁ = shift · √(in · out). Validation is on the training rows themselves.
    """

    task = "regression"
    rows_differ_in = "batch"

    def __init__(
        self,
        phase: Phase,
        samples: PositiveInt,
        in_features: PositiveInt,
        out_features: PositiveInt,
        shift: FiniteFloat,
        batch_size: PositiveInt,
        seed: Seed,
    ):
        super().__init__(phase, batch_size, seed)
        self.check_batch(samples)
        self.samples, self.shift = samples, shift
        self.in_features, self.out_features = in_features, out_features

    @property
    def sizes(self) -> dict[str, int]:
        """The two sides of θ."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """All of the phase's rows, twice: the loss is watched on everything there is."""
        theta = torch.randn(
            self.in_features, self.out_features, generator=generator(self.seed, "theta")
        )
        x = torch.randn(
            self.samples, self.in_features, generator=generator(self.seed, "x", self.phase)
        )
        y = x @ (theta + self.shift if self.phase == "adapt" else theta)
        everything = TensorDataset(x, y)
        return everything, everything
