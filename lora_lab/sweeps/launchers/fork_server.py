"""The fork server: the process from which the jobs of joblib and packed multiruns are forked.

Who starts whom, with `hydra/launcher=joblib` or `packed`:

    lora-lab train -m …        the launcher: checks all jobs, starts them, waits for them
    └── fork server            imports what all jobs need, and computes nothing
        ├── job                one run, or one pack of runs
        │   └── a process for each device, where a run has several (training/devices.py)
        └── job

Importing torch, Lightning and W&B takes seconds. A fork of the server has them at once, and shares
the memory they take. To fork the launcher itself would not be safe: a lock that one of its threads
holds at that moment would stay locked in the fork.
"""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker

MALLOC_SETTINGS = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""Environment of the jobs. It makes glibc keep memory that is freed, and reuse it.

Otherwise memory goes back to the system after each training step, which has to clear its pages
when they are asked for again. Both are in bytes.
"""


def start(arguments: Sequence[str]) -> None:
    """Starts the server if these arguments choose a launcher that forks from it.

    Called first thing, so that the server's imports run beside those of this process. A second call
    does nothing.
    """
    if {"hydra/launcher=joblib", "hydra/launcher=packed"} & {*arguments}:
        # glibc reads these as a process starts. The server inherits them; its forks are not started
        # anew, so they must be set here and not in the jobs.
        for name, value in MALLOC_SETTINGS.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("forkserver")
        # W&B imports sdk.launch only when a run begins, which would cost each job a second.
        context.set_forkserver_preload(["wandb.sdk.launch", "lora_lab.sweeps.launchers.preload"])
        # Ctrl-C at a terminal reaches the server too, which would print where its imports stood.
        # Blocked here, the signal is blocked in the server, and in its forks until they allow it.
        resource_tracker.ensure_running()  # which ends by allowing the signal, so it goes first
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
