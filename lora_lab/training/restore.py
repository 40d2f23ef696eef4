"""Loads a finished run's model from its run directory and the base it was trained on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.config.checks import parse_config
from lora_lab.config.components import PretrainedBase
from lora_lab.config.schema import CheckpointBase, Config, Full
from lora_lab.config.trust import check_trusted
from lora_lab.runs import Run
from lora_lab.training import bases, precision
from lora_lab.training.base_weights import BaseWeights
from lora_lab.training.plan import Plan, plan
from lora_lab.training.stored_paths import with_paths_from_here
from lora_lab.training.trainer_checks import on_one_device


@dataclass(frozen=True)
class Restored:
    """A finished run: its trained model, and the base's weights before training."""

    plan: Plan
    model: nn.Module
    base: Mapping[str, Tensor]


def restore(
    run: Run, trust: bool = False, bases_dir: Path | None = None, adapter: str = "adapter"
) -> Restored:
    """Loads the run's trained model; after a full fine-tuning (adapter=full) without adapters.

    `adapter` is the folder in the run directory that the adapters are read from, as `cut/8`.
    `trust`: any code that its config names is run (config/trust.py). `bases_dir`: where its base is
    looked for. Nothing is written. Raises ValueError if the run is not finished, is damaged or has
    trained nothing, and if its base is damaged; FileNotFoundError if the base it was trained on is
    not stored here.
    """
    run.check_finished("restored")
    cfg = parse_config(dict(run.config))
    if not trust:
        check_trusted(cfg, run.path)
    cfg = with_paths_from_here(cfg, run, bases_dir)
    if not cfg.trains:
        raise ValueError(f"adapter={cfg.adapter.method}: the run has trained nothing")
    planned = plan(on_one_device(cfg), is_stored=True)
    if isinstance(cfg.base, CheckpointBase) and planned.cfg.base != cfg.base:
        raise ValueError(f"{cfg.base.path} is not the file that {run.path.name} was trained on")
    pretrained = isinstance(cfg.base, PretrainedBase)
    model = planned.pretrained_model() if pretrained else planned.model()
    precision.cast(model, cfg.trainer)
    if not pretrained:
        model.load_state_dict(_base(cfg, run, model))
    if cfg.freezes_base:
        adapters.load(model, run.path / adapter)
        return Restored(_with_sites_of(model, planned), model, BaseWeights(model, {}))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(load_file(run.path / "model" / "model.safetensors"))
    return Restored(planned, model, base)


def _with_sites_of(model: nn.Module, planned: Plan) -> Plan:
    """The plan with the sites that have an adapter on the model, and their ranks there."""
    attached = adapters.attached(model)
    sites = [site for site in planned.sites if site.name in attached]
    sites = [replace(site, recipe=attached[site.name].recipe) for site in sites]
    return replace(planned, sites=sites)


def _base(cfg: Config, run: Run, model: nn.Module) -> dict[str, Tensor]:
    """The base's weights, from the first file with the shapes of `model` and the adapter's hash.

    An adapter's file holds the hash of its base. `model` is left with some base's weights.
    """
    if isinstance(cfg.base, CheckpointBase):
        files = [Path(cfg.base.path)]
    elif isinstance(cfg.adapter, Full):
        files = [path] if (path := bases.path(cfg)).exists() else []
    else:
        files = sorted(Path(cfg.bases_dir).glob("*.safetensors"))
    wanted_hash = adapters.base_hash(run.path / "adapter") if cfg.freezes_base else None
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for file in files:
        try:
            # With adapter=full the run has no hash of its base: the checksum beside it counts.
            has_hash = wanted_hash or isinstance(cfg.base, CheckpointBase)
            state = load_file(file) if has_hash else bases.read(file).state
        except (ValueError, SafetensorError):
            continue
        if {key: tensor.shape for key, tensor in state.items()} != shapes:
            continue
        model.load_state_dict(state)
        if wanted_hash in (None, adapters.weights_hash(model.state_dict())):
            return state
    where = cfg.base.path if isinstance(cfg.base, CheckpointBase) else f"{cfg.bases_dir}/"
    by_hash = f" (hash {wanted_hash[:10]}…)" if wanted_hash else ""
    damage = [] if isinstance(cfg.base, CheckpointBase) else _damage(files)
    raise FileNotFoundError(
        f"the base that {run.path.name} was trained on{by_hash} is not in {where}: --bases DIR "
        "names the folder that has it; one that is not kept is trained again, into DIR, by "
        f"`lora-lab reproduce {run.path} --bases DIR`{''.join(damage)}"
    )


def _damage(files: Iterable[Path]) -> Iterator[str]:
    """What is wrong with each of these stored bases that is damaged."""
    for file in files:
        try:
            bases.read(file)
        except ValueError as error:
            yield f"; {error}"
