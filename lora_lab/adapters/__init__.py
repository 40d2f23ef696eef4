"""LoRA itself: `from lora_lab import adapters; adapters.attach(model, r=8, alpha=16)`."""

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import adapter_state_dict, base_state_dict, load, save, weights_hash
from lora_lab.adapters.init import INITS
from lora_lab.adapters.inject import (
    KINDS,
    AdapterError,
    RankError,
    Site,
    Target,
    TargetError,
    attach,
    attached,
    detach,
    disabled,
    find,
    merge,
    unmerge,
)
from lora_lab.adapters.scaling import SCALINGS

__all__ = [
    "INITS",
    "KINDS",
    "SCALINGS",
    "Adapter",
    "AdapterError",
    "RankError",
    "Site",
    "Target",
    "TargetError",
    "adapter_state_dict",
    "attach",
    "attached",
    "base_state_dict",
    "detach",
    "disabled",
    "find",
    "load",
    "merge",
    "save",
    "unmerge",
    "weights_hash",
]
