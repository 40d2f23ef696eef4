"""Models whose process matters: one that kills its process once, one that writes down its devices.

Named by `model._target_` in tests of launchers and packs.
"""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.models.linear import Linear


class KillsItself(Linear):
    """Linear; kills its process once, in the second epoch of adaptation.

    It does so if a file `kill` exists, which it removes first: the next try survives. A run
    that diverges does so in its first epoch, so before this.
    """

    training_steps = 0

    def forward(self, x: Tensor) -> Tensor:
        weight = dict(self.named_parameters())["linear.weight"]
        is_adapting = self.training and not weight.requires_grad
        self.training_steps += is_adapting
        if self.training_steps > 8 and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class WritesItsDevices(Linear):
    """Linear; each process that trains one appends its GPUs and threads to the file `devices`."""

    is_written = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not WritesItsDevices.is_written:
            WritesItsDevices.is_written = True
            with Path("devices").open("a") as file:
                file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']}:{torch.get_num_threads()}\n")
        return super().forward(x)
