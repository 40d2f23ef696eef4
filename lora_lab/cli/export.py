"""A finished run's result, for use elsewhere: PEFT's adapter folder, or the whole merged model."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from lora_lab import adapters
from lora_lab.adapters import AdapterError
from lora_lab.runs import Run
from lora_lab.training.restore import restore

FORMATS = {
    "peft": "adapter_model.safetensors",
    "merged": "model.safetensors",
}
"""Format → the file that it writes, among others."""


def export(run: Run, format: str, directory: Path) -> Path:
    """Writes the run's adapter as PEFT loads it, or its model with ΔW in the weights.

    Raises AdapterError where the run has no such thing, the format cannot hold it or the file is
    there already, and what `restore` raises.
    """
    path = directory / FORMATS[format]
    if path.exists():
        raise AdapterError(f"{path} is there already: give a folder without one")
    method = run.config["adapter"]["method"]
    if method == "full" and format == "merged" and run.finished:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(load_file(run.path / "model" / "model.safetensors"), path, {"format": "pt"})
        return path
    if method != "lora":
        raise AdapterError(f"adapter={method}: the run has no adapter to write")
    model = restore(run).model
    if format == "peft":
        adapters.save_peft(model, directory)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors does not write one memory under two names, as tied weights have.
        state = {key: value.clone() for key, value in adapters.merged(model).state_dict().items()}
        save_file(state, path, {"format": "pt"})
    return path
