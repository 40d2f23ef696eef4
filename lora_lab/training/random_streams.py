"""The state of the global random streams of torch, numpy and Python, for checkpoints."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def streams_of_processes(trainer: Trainer, device: torch.device) -> list[dict[str, Any]]:
    """The state of the global random streams, one dict for each process."""
    kind, keys, *rest = np.random.get_state()
    streams = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), *rest],  # pyright: ignore
        "python": random.getstate(),
    }
    by_process = [streams] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(by_process, streams)
    return by_process


def set_streams(streams: dict[str, Any], device: torch.device) -> None:
    """Sets this process's global random streams."""
    torch.set_rng_state(streams["torch"])
    if device.type == "cuda" and streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"], device)
    np.random.set_state(tuple(streams["numpy"]))
    random.setstate(streams["python"])
