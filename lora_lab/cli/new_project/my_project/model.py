"""The model: any nn.Module. Arguments that the data decides are named as in the data's `sizes`."""

from torch import Tensor, nn


class Net(nn.Module):
    """Two hidden layers with ReLU, and a head. `width`: numbers in each hidden layer."""

    def __init__(self, in_features: int, out_features: int, width: int):
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in_features) → (rows, out_features)."""
        x = self.first(x).relu()  # (rows, width)
        x = self.second(x).relu()  # (rows, width)
        return self.head(x)  # (rows, out_features)
