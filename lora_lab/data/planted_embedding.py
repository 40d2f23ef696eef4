"""An embedding table that changes by a matrix of known singular values."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.planted import Planted, planted_matrix
from lora_lab.seeding import generator


class PlantedEmbedding(Planted):
    """y = E[token] for the base, y = (E + Δ)[token] + noise to adapt to.

    E is standard normal, Δ (tokens × features) has the singular values `sigma`. Token v = 1, 2, …
    occurs `samples` / v^zipf / Σ 1/v^zipf times, rounded to integers that add up to `samples`, in
    both phases; a rare token may never occur.
    """

    def __init__(
        self,
        phase: Phase,
        samples: PositiveInt,
        in_features: PositiveInt,
        out_features: PositiveInt,
        sigma: list[PositiveFloat],
        zipf: NonNegativeFloat,
        noise: NonNegativeFloat,
        steps: PositiveInt,
        seed: Seed,
    ):
        super().__init__(phase, in_features, out_features, noise, steps, seed)
        self.samples, self.zipf = samples, zipf
        self.delta = planted_matrix(in_features, out_features, sigma, generator(seed, "delta"))

    def counts(self) -> Tensor:
        """How often each token occurs (tokens,), rounded by the method of the largest remainder."""
        share = torch.arange(1, self.in_features + 1, dtype=torch.float64) ** -self.zipf
        exact = self.samples * share / share.sum()
        counts = exact.floor().long()
        missing = self.samples - int(counts.sum())
        counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
        return counts

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """Tokens (samples,) with their y (samples, features), for training and for validation."""
        E = torch.randn(self.delta.shape, generator=generator(self.seed, "E")).double()
        tokens = torch.arange(self.in_features).repeat_interleave(self.counts())
        y = (E + self.delta if self.phase == "adapt" else E)[tokens]
        return self.datasets(tokens, y)
