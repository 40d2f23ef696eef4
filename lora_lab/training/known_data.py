"""Which data the base knew, so that forgetting can be measured on it."""

from contextlib import suppress

from lora_lab.config.components import PretrainedBase
from lora_lab.config.schema import Config
from lora_lab.data import Data


def known_data(cfg: Config, base_phase: Data) -> Data | None:
    """What the base knew; None where that is not known.

    It is the data's base phase, where the base was trained on it, here or before.
    """
    if isinstance(cfg.base, PretrainedBase):
        return None
    with suppress(ValueError):  # base=checkpoint, of data that has no such phase
        base_phase.check_base()
        return base_phase
    return None
