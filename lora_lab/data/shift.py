"""A linear map whose entries all change by the same amount, an update of rank 1."""

import torch
from pydantic import FiniteFloat, PositiveInt
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase
from lora_lab.seeding import generator


class Shift(Data):
    """y = x θ for the base, y = x (θ + shift) to adapt to, with fresh x and no noise.

    θ (in × out) and x are standard normal. The ΔW to learn is `shift` times a matrix of ones, with
    rank 1 and σ₁ = |shift| · √(in · out). Validation is on the training rows.
    """

    task = "regression"
    distinct_rows_in = "batch"

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
        """The numbers of inputs and of outputs of θ."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """x (samples, in) and y (samples, out), for training and for validation."""
        theta_rng, x_rng = generator(self.seed, "theta"), generator(self.seed, "x", self.phase)
        theta = torch.randn(self.in_features, self.out_features, generator=theta_rng)
        x = torch.randn(self.samples, self.in_features, generator=x_rng)
        y = x @ (theta + self.shift if self.phase == "adapt" else theta)
        dataset = TensorDataset(x, y)
        return dataset, dataset
