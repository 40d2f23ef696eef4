"""A convolution that moves by a matrix of known singular values."""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.planted import Planted, orthonormal, planted_matrix
from lora_lab.seeding import generator


class PlantedConv(Planted):
    """y = θ ∗ x for the base, y = (θ + Δ) ∗ x + noise to adapt to, with zero padding.

    θ has iid normal entries of variance 1/(in · k²), Δ as out × (in · k²) the singular values
    `sigma`. Pixels are white: with `whiten` exactly so in these very images, all in · size² pixels
    orthogonal to each other, else in the mean.
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
        super().__init__(phase, steps, seed)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        if whiten and samples < (pixels := in_features * size**2):
            raise ValueError(f"samples={samples}: whiten needs an image a pixel, {pixels}")
        self.samples, self.in_features, self.out_features = samples, in_features, out_features
        self.kernel_size, self.size, self.whiten, self.noise = kernel_size, size, whiten, noise
        rest = in_features * kernel_size**2
        self.delta = planted_matrix(out_features, rest, sigma, generator(seed, "delta"))

    @property
    def sizes(self) -> dict[str, int]:
        """Channels in and out, and the side of the kernel."""
        names = ("in_features", "out_features", "kernel_size")
        return {name: getattr(self, name) for name in names}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """All of the phase's images, twice."""
        W = torch.randn(self.delta.shape, generator=generator(self.seed, "theta")).double()
        W = W / W.shape[1] ** 0.5 + (self.delta if self.phase == "adapt" else 0)
        rows = (self.samples, self.in_features * self.size**2)
        draws = generator(self.seed, "x", self.phase)
        if self.whiten:
            x = orthonormal(*rows, draws) * self.samples**0.5
        else:
            x = torch.randn(*rows, generator=draws, dtype=torch.float64)
        x = x.view(-1, self.in_features, self.size, self.size)
        kernel = W.view(-1, self.in_features, self.kernel_size, self.kernel_size)
        y = F.conv2d(x, kernel, padding="same")
        if self.phase == "adapt":
            y = y + self.noise * torch.randn(y.shape, generator=generator(self.seed, "noise"))
        everything = TensorDataset(x.float(), y.float())
        return everything, everything

    def design(self) -> tuple[Tensor, Tensor]:
        """The patches that the kernel meets, one a row, and what comes out there."""
        assert self.train is not None
        x, y = self.train.tensors
        patches = F.unfold(x.double(), self.kernel_size, padding=self.kernel_size // 2)
        return patches.mT.flatten(0, 1), y.flatten(2).mT.flatten(0, 1)
