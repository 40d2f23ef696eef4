"""A finished run's model again, from its directory and the base it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.config.checks import parse_config
from lora_lab.config.schema import CheckpointBase, Config, Full, Lora
from lora_lab.runs import Run
from lora_lab.training import bases, precision
from lora_lab.training.plan import Plan, on_one_device, plan


@dataclass(frozen=True)
class Restored:
    """What a run ended with: its adapted model, and the weights this started from."""

    plan: Plan
    model: nn.Module
    base: dict[str, Tensor]


def restore(run: Run) -> Restored:
    """The run's trained model. A full fine-tuning's has no adapters.

    Raises ValueError where the run is not finished or has nothing trained, FileNotFoundError where
    the base it was trained on is not at hand.
    """
    if run.status["state"] != "finished":
        raise ValueError(
            f"{run.path} is {run.status['state']}: only a finished run can be restored"
        )
    cfg = parse_config(dict(run.config))
    if not isinstance(cfg.adapter, Lora | Full):
        raise ValueError(f"adapter={cfg.adapter.method}: the run has trained nothing")
    planned = plan(on_one_device(cfg))
    if isinstance(cfg.base, CheckpointBase) and planned.cfg.base != cfg.base:
        raise ValueError(f"{cfg.base.path} is not the file that {run.path.name} was trained on")
    model = planned.model()
    precision.cast(model, cfg.trainer)
    model.load_state_dict(_base(cfg, run, model))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    if isinstance(cfg.adapter, Lora):
        adapters.load(model, run.path / "adapter")
    else:
        model.load_state_dict(load_file(run.path / "model" / "model.safetensors"))
    return Restored(planned, model, base)


def _base(cfg: Config, run: Run, model: nn.Module) -> dict[str, Tensor]:
    """The weights that the run started from: an adapter knows their hash."""
    if isinstance(cfg.base, CheckpointBase):
        files = [Path(cfg.base.path)]
    elif isinstance(cfg.adapter, Full):
        files = [path] if (path := bases.path(cfg)).exists() else []
    else:
        files = sorted(Path(cfg.bases_dir).glob("*.safetensors"))
    wanted = adapters.base_hash(run.path / "adapter") if isinstance(cfg.adapter, Lora) else None
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for file in files:
        state = load_file(file)
        if {key: tensor.shape for key, tensor in state.items()} != shapes:
            continue
        model.load_state_dict(state)
        if wanted in (None, adapters.weights_hash(model.state_dict())):
            return state
    where = cfg.base.path if isinstance(cfg.base, CheckpointBase) else f"{cfg.bases_dir}/"
    raise FileNotFoundError(
        f"the base that {run.path.name} was trained on is not in {where}: run from the folder the "
        "run was made in, or repeat the run with overwrite=true"
    )
