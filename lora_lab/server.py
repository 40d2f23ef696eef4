"""The process from which a multirun's jobs are forked."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver


def begin(arguments: Sequence[str]) -> None:
    """Begins it where these choose a launcher that needs it; again, nothing.

    It imports what every job would, in seconds in which this process imports the same.
    """
    if {"hydra/launcher=joblib", "hydra/launcher=packed"} & {*arguments}:
        context = multiprocessing.get_context("forkserver")
        # The first is what W&B imports as a run begins, a second in every job.
        context.set_forkserver_preload(["wandb.sdk.launch", "lora_lab.launcher.preload"])
        forkserver.ensure_running()
