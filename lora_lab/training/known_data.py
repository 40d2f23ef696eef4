"""Which data the base knew, so that forgetting can be measured on it, and by which head."""

from contextlib import suppress

from torch import nn

from lora_lab.config.checks import check_kind, resolve_component
from lora_lab.config.components import PretrainedBase
from lora_lab.config.schema import Config, ConfigError
from lora_lab.data import Data
from lora_lab.models.pretrained_head import PretrainedHead
from lora_lab.training import fit_checks


def known_data(cfg: Config, base_phase: Data) -> Data | None:
    """What the base knew; None where that is not known.

    It is what `forget` says; else the data's base phase, where the base was trained on it, here or
    before.
    """
    if cfg.forget is not None:
        data = _build(cfg)
        if (head := _pretrained_head(cfg, data)) is not None:
            data.outputs_of = head
        return data
    if isinstance(cfg.base, PretrainedBase):
        return None
    with suppress(ValueError):  # base=checkpoint, of data that has no such phase
        base_phase.check_base()
        return base_phase
    return None


def _build(cfg: Config) -> Data:
    """The data set that `forget` names. Raises ConfigError."""
    assert cfg.forget is not None
    arguments = cfg.forget.arguments
    if "batch_size" in arguments:  # of training, which needs as many rows, and there is none
        arguments["batch_size"] = 1
    try:
        data = cfg.forget.callee(phase="adapt", **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"forget.{error}") from None
    check_kind("forget", cfg.forget, data, Data)
    return data


def _pretrained_head(cfg: Config, data: Data) -> PretrainedHead | None:
    """The checkpoint's head that the data needs; None where the model's own, or none, is right."""
    head = fit_checks.head_of(cfg)
    is_right = data.heads is None or head is None or head in data.heads or data.task == "pairs"
    return None if is_right else PretrainedHead(next(iter(data.heads or ())), cfg.model.arguments)


def with_checked(cfg: Config, data: Data, model: nn.Module) -> Config:
    """The config with `forget` checked against the run's `data` and its model, and filled in.

    `model` may be on the meta device. Raises ConfigError.
    """
    if cfg.forget is None:
        return cfg
    where = f"forget._target_={cfg.forget.target}"
    resolve_component("forget", cfg.forget, Data, ["phase"])
    known = _build(cfg)
    head = _pretrained_head(cfg, known)
    reads_below = head is not None or known.task == "pairs"
    if cfg.trainer.model_dump().get("strategy") == "fsdp" and reads_below:
        raise ConfigError(f"{where}: trainer=fsdp measures what the model's own head learns, alone")
    if reads_below and fit_checks.head_of(cfg) in (None, "timm"):
        raise ConfigError(f"{where}: reads the layers below the head of a model=pretrained")
    if head is not None:
        try:
            head.check(model)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    wanted, outputs = known.sizes["out_features"], data.sizes["out_features"]
    if not reads_below and wanted != outputs:
        raise ConfigError(
            f"{where}: has {wanted} outputs to be predicted, and the model has {outputs}; the data "
            "must be of the same classes, or for a head that the checkpoint has"
        )
    cfg = fit_checks.with_max_length(cfg, known, model, "forget")
    fit_checks.check_vocabulary(cfg, known, model, "forget")
    return cfg
