"""A model whose process dies once, as of a lack of memory."""

import os
import signal
from pathlib import Path

from torch import Tensor

from lora_lab.models.linear import Linear


class Killed(Linear):
    """Linear; where there is a file `kill`, it is removed and the first step in training kills."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
