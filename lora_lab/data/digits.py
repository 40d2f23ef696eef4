"""Scikit-learn's handwritten digits: the base knows five of them, the adaptation all ten."""

import torch
from pydantic import PositiveInt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase


class Digits(Data):
    """1,797 images of 8 × 8 pixels in [0, 1], as rows of 64: 0–4 for the base, 0–9 to adapt to.

    A fifth of each digit's images, drawn by `seed`, is held out for validation.
    """

    task = "classification"

    def __init__(self, phase: Phase, batch_size: PositiveInt, seed: Seed):
        super().__init__(phase, batch_size, seed)
        self.check_batch(720 if phase == "base" else 1437)

    @property
    def sizes(self) -> dict[str, int]:
        """Ten outputs in both phases: the base has a place for the digits it does not know."""
        return {"in_features": 64, "out_features": 10}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """The phase's digits, split by digit and seed."""
        images, digits = load_digits(return_X_y=True)
        split = train_test_split(
            images, digits, test_size=0.2, stratify=digits, random_state=self.seed
        )
        x_train, x_val, y_train, y_val = map(torch.from_numpy, split)
        known = 5 if self.phase == "base" else 10

        def rows(x: torch.Tensor, y: torch.Tensor) -> TensorDataset:
            return TensorDataset(x[y < known].float() / 16, y[y < known].long())

        return rows(x_train, y_train), rows(x_val, y_val)
