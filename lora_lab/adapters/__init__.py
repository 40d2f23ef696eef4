"""LoRA itself: `from lora_lab import adapters; adapters.attach(model, r=8, alpha=16)`."""

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.calibration import Calibration
from lora_lab.adapters.count import Count, count
from lora_lab.adapters.files import adapter_state_dict, base_hash, base_state_dict, load, save
from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.init import INITS
from lora_lab.adapters.inject import attach, detach
from lora_lab.adapters.merge import combine, deltas, merge, merged, unmerge
from lora_lab.adapters.optimizer_groups import parameter_groups
from lora_lab.adapters.peft import load_peft, save_peft
from lora_lab.adapters.recipe import TRAINS, AdapterError, Recipe
from lora_lab.adapters.scaling import SCALINGS
from lora_lab.adapters.sites import KINDS, Site, adapter_class
from lora_lab.adapters.slots import also_trained, attached, disabled, names, switch
from lora_lab.adapters.target import GROUPS, PatternError, RankError, Target, TargetError
from lora_lab.adapters.targets import OVER_RANK, find_sites
from lora_lab.adapters.trained_in_full import FullParameter, select
from lora_lab.adapters.weights_hash import weights_hash

__all__ = [
    "FORMS",
    "GROUPS",
    "INITS",
    "KINDS",
    "OVER_RANK",
    "SCALINGS",
    "TRAINS",
    "Adapter",
    "AdapterError",
    "Calibration",
    "Count",
    "FullParameter",
    "PatternError",
    "RankError",
    "Recipe",
    "Site",
    "Target",
    "TargetError",
    "adapter_class",
    "adapter_state_dict",
    "also_trained",
    "attach",
    "attached",
    "base_hash",
    "base_state_dict",
    "combine",
    "count",
    "deltas",
    "detach",
    "disabled",
    "find_sites",
    "load",
    "load_peft",
    "merge",
    "merged",
    "names",
    "parameter_groups",
    "save",
    "save_peft",
    "select",
    "switch",
    "unmerge",
    "weights_hash",
]
