"""A finished run's result, for use elsewhere: PEFT's adapter folder, or the whole merged model."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError
from lora_lab.checks import check
from lora_lab.config import CheckpointBase, Config
from lora_lab.plan import Plan
from lora_lab.runs import Run

FORMATS = {
    "peft": "adapter_model.safetensors",
    "merged": "model.safetensors",
}
"""Format → the file that it writes, among others."""


def export(run: Run, format: str, directory: Path) -> Path:
    """Writes the run's adapter as PEFT loads it, or its model with ΔW in the weights.

    Raises AdapterError where the run has no such thing, the format cannot hold it or the file is
    there already; FileNotFoundError where the base the adapter was trained on is not at hand.
    """
    path = directory / FORMATS[format]
    if path.exists():
        raise AdapterError(f"{path} is there already: give a folder without one")
    cfg = check(dict(run.config))
    if run.status["state"] != "finished":
        raise AdapterError(f"{run.path} is {run.status['state']}: only a finished run is exported")
    if cfg.adapter.method == "full" and format == "merged":
        directory.mkdir(parents=True, exist_ok=True)
        save_file(load_file(run.path / "model" / "model.safetensors"), path, {"format": "pt"})
        return path
    if cfg.adapter.method != "lora":
        raise AdapterError(f"adapter={cfg.adapter.method}: the run has no adapter to write")
    model = Plan(cfg, []).model()
    model.load_state_dict(_base(cfg, run, model))
    adapters.load(model, run.path / "adapter")
    if format == "peft":
        adapters.save_peft(model, directory)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors does not write one memory under two names, as tied weights have.
        state = {key: value.clone() for key, value in adapters.merged(model).state_dict().items()}
        save_file(state, path, {"format": "pt"})
    return path


def _base(cfg: Config, run: Run, model: nn.Module) -> dict[str, Tensor]:
    """The weights that the run's adapter belongs to, found by their hash."""
    wanted = adapters.belongs_to(run.path / "adapter")
    if isinstance(cfg.base, CheckpointBase):
        files = [Path(cfg.base.path)]
    else:
        files = sorted(Path(cfg.bases_dir).glob("*.safetensors"))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for file in files:
        state = load_file(file)
        if {key: tensor.shape for key, tensor in state.items()} != shapes:
            continue
        model.load_state_dict(state)
        if adapters.weights_hash(model.state_dict()) == wanted:
            return state
    where = cfg.base.path if isinstance(cfg.base, CheckpointBase) else f"{cfg.bases_dir}/"
    raise FileNotFoundError(
        f"the base this adapter was trained on (weights {wanted[:12]}) is not in {where}: "
        "run from the folder the run was made in, or repeat the run with overwrite=true"
    )
