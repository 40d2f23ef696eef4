"""The process from which a multirun's jobs are forked."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import forkserver

MALLOC_SETTINGS = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""Makes glibc keep what is freed, else every step has the system clear its pages anew."""


def start(arguments: Sequence[str]) -> None:
    """Begins it where these choose a launcher that needs it; again, nothing.

    It imports what every job would, in seconds in which this process imports the same.
    """
    if {"hydra/launcher=joblib", "hydra/launcher=packed"} & {*arguments}:
        for name, value in MALLOC_SETTINGS.items():
            os.environ.setdefault(name, value)  # read as the server's process starts
        context = multiprocessing.get_context("forkserver")
        # The first is what W&B imports as a run begins, a second in every job.
        context.set_forkserver_preload(["wandb.sdk.launch", "lora_lab.sweeps.launchers.preload"])
        forkserver.ensure_running()
