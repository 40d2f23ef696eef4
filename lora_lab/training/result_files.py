"""The files of what a run has trained: adapters, or a model trained in full."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from lora_lab import adapters


def save_weights(model: nn.Module, run_directory: Path, suffix: str = "") -> Path:
    """Saves adapters to `adapter/`, or a model without any to `model/`; returns the folder.

    `suffix` is added to its name.
    """
    if adapters.names(model):
        adapters.save(model, folder := run_directory / f"adapter{suffix}")
        return folder
    (folder := run_directory / f"model{suffix}").mkdir(exist_ok=True)
    # Cloned because safetensors refuses two names for one memory, which tied weights have.
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder
