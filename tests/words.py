"""A small data set of token ids with classes, for tiny_models."""

import torch
from pydantic import PositiveInt
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase
from lora_lab.seeding import generator


class Words(Data):
    """Rows of 8 tokens (of 7 to 39); the class is that of the most common third of them."""

    task = "classification"

    def __init__(self, phase: Phase, batch_size: PositiveInt, seed: Seed, classes: int = 3):
        super().__init__(phase, batch_size, seed)
        self.classes = classes

    @property
    def sizes(self) -> dict[str, int]:
        return {"in_features": 40, "out_features": self.classes}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        x = torch.randint(7, 40, (96, 8), generator=generator(self.seed, self.phase))
        y = ((x - 7) * self.classes // 33).mode(1).values
        return TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
