"""The most memory that a training holds: of its GPU, or on a CPU of its process."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

RESET_PEAK = "5"
"""What Linux takes in /proc/self/clear_refs to set a process's VmHWM to its present memory."""


class PeakMemory:
    """The largest memory since this object was made.

    On a GPU that is what torch's tensors take; elsewhere all that the process has in memory, its
    libraries too. `of` says which: `GPU`, `process`, or `process since its start` where the system
    cannot set its counter anew, so that an earlier run in the same process may be the larger.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.of = "process since its start"
        if device.type == "cuda":
            self.of = "GPU"
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text(RESET_PEAK)
                self.of = "process"

    @property
    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            if peak := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                return 1024 * int(peak[1])
        peak = getrusage(RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
