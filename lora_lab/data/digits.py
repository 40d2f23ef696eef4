"""Scikit-learn's handwritten digits: the base learns 0 to 4, the adapters all ten."""

import torch
from pydantic import PositiveInt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase


class Digits(Data):
    """Classification of 1,797 images of 8 × 8 pixels in [0, 1], flattened to rows of 64.

    The base phase has the digits 0 to 4, the adapt phase 0 to 9. A fifth of the images of each
    digit, drawn by `seed`, is for validation.
    """

    task = "classification"

    def __init__(self, phase: Phase, batch_size: PositiveInt, seed: Seed):
        super().__init__(phase, batch_size, seed)
        self.check_batch(720 if phase == "base" else 1437)

    @property
    def sizes(self) -> dict[str, int]:
        """64 pixels and ten classes; in both phases, since the adapted model keeps the head."""
        return {"in_features": 64, "out_features": 10}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """Images (N, 64) and digits (N,) of the phase, split within each digit."""
        images, digits = load_digits(return_X_y=True)
        split = train_test_split(
            images, digits, test_size=0.2, stratify=digits, random_state=self.seed
        )
        x_train, x_val, y_train, y_val = map(torch.from_numpy, split)
        classes = 5 if self.phase == "base" else 10

        def rows(x: torch.Tensor, y: torch.Tensor) -> TensorDataset:
            return TensorDataset(x[y < classes].float() / 16, y[y < classes].long())

        return rows(x_train, y_train), rows(x_val, y_val)
