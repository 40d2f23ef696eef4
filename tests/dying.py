"""A model whose process dies once, as of a lack of memory."""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.models.linear import Linear


class Killed(Linear):
    """Linear; where there is a file `kill`, it is removed and adaptation's second epoch kills.

    A run that diverges does so in its first.
    """

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training and not self.linear.weight.requires_grad
        if self.steps > 8 and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Told(Linear):
    """Linear; a process that trains one adds a line to the file `told`: its GPUs and threads."""

    told = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not Told.told:
            Told.told = True
            with Path("told").open("a") as file:
                file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']}:{torch.get_num_threads()}\n")
        return super().forward(x)
