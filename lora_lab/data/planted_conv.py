"""A convolution whose kernel changes by a matrix of known singular values."""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.planted import Planted, planted_matrix, white_noise
from lora_lab.seeding import generator


class PlantedConv(Planted):
    """y = θ ∗ x for the base, y = (θ + Δ) ∗ x + noise to adapt to, with zero padding.

    θ has iid normal entries of variance 1/(in · k²). Δ, as a matrix out × (in · k²), has the
    singular values `sigma`. The images are `size` × `size`, and their pixels white noise: with
    `whiten`, the in · size² pixels are exactly orthogonal over these `samples` images; else they
    are independent draws.
    """

    def __init__(
        self,
        phase: Phase,
        samples: PositiveInt,
        in_features: PositiveInt,
        out_features: PositiveInt,
        kernel_size: PositiveInt,
        size: PositiveInt,
        sigma: list[PositiveFloat],
        whiten: bool,
        noise: NonNegativeFloat,
        steps: PositiveInt,
        seed: Seed,
    ):
        super().__init__(phase, in_features, out_features, noise, steps, seed)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        if whiten and samples < (pixels := in_features * size**2):
            raise ValueError(f"samples={samples}: whiten needs an image a pixel, {pixels}")
        self.samples, self.kernel_size, self.size = samples, kernel_size, size
        self.whiten = whiten
        rest = in_features * kernel_size**2
        self.delta = planted_matrix(out_features, rest, sigma, generator(seed, "delta"))

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of channels in and out, and the side of the kernel."""
        return {**super().sizes, "kernel_size": self.kernel_size}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """Images (n, in, size, size) and y (n, out, size, size), for training and validation."""
        W = torch.randn(self.delta.shape, generator=generator(self.seed, "theta")).double()
        W = W / W.shape[1] ** 0.5 + (self.delta if self.phase == "adapt" else 0)
        pixels, rng = self.in_features * self.size**2, generator(self.seed, "x", self.phase)
        x = white_noise(self.samples, pixels, self.whiten, rng)
        x = x.view(-1, self.in_features, self.size, self.size)
        kernel = W.view(-1, self.in_features, self.kernel_size, self.kernel_size)
        return self.datasets(x.float(), F.conv2d(x, kernel, padding="same"))

    def design_and_targets(self) -> tuple[Tensor, Tensor]:
        """Patches under the kernel, one a row (n · size² × in · k²), and the outputs there."""
        assert self.train is not None
        x, y = self.train.tensors
        patches = F.unfold(x.double(), self.kernel_size, padding=self.kernel_size // 2)
        # (n, in · k², size²) and (n, out, size²) → a row for each position of each image
        return patches.mT.flatten(0, 1), y.flatten(2).mT.flatten(0, 1)
