"""The data: in the phase `base` what the base learns, in `adapt` what the adapters learn."""

import torch
from lora_lab.data import Data, Phase
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


class TurnedDigits(Data):
    """1,797 images of 8 × 8 pixels, as rows of 64 numbers in [0, 1].

    Upright for the base; for the adapters turned by `quarter_turns`. A fifth is for validation.
    """

    task = "classification"  # the loss and the metrics: cross-entropy, accuracy

    def __init__(self, phase: Phase, batch_size: int, seed: int, quarter_turns: int = 1):
        super().__init__(phase, batch_size, seed)
        self.quarter_turns = quarter_turns

    @property
    def sizes(self) -> dict[str, int]:
        """What the model is told of the data: 64 pixels, ten classes."""
        return {"in_features": 64, "out_features": 10}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """The rows for training and those for validation: pixels (rows, 64) and digits (rows,)."""
        pixels, digits = map(torch.from_numpy, load_digits(return_X_y=True))
        images = pixels.float().reshape(-1, 8, 8) / 16
        if self.phase == "adapt":
            images = images.rot90(self.quarter_turns, dims=(1, 2))
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(self.seed))
        train, val = order.split([1437, 360])
        rows = images.flatten(1)
        return TensorDataset(rows[train], digits[train]), TensorDataset(rows[val], digits[val])
