"""A model whose runs cannot be packed: torch.vmap refuses a branch on a number of its output."""

from torch import Tensor

from lora_lab.models.linear import Linear


class BranchesOnOutput(Linear):
    """Linear; reads its output as a Python number, and stops where that is below 0: never."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.abs().sum().item() < 0:
            raise AssertionError
        return y
