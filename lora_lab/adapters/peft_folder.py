"""PEFT's adapter folder: its config and its tensors, as they are written and read."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from lora_lab.adapters.files import write_pair
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.recipe import AdapterError

FILES = ("adapter_model.safetensors", "adapter_config.json")
"""PEFT's names of the two files."""


SCALE_KEYS = ("r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Keys of PEFT's config that say what its tensors are multiplied by.

`save_peft` also writes them into the metadata of the tensors, which PEFT does not read.
"""


NO_TARGETS = "dummy-target-modules"
"""PEFT's word for a LoRA on no layer, where only other parameters train."""


LOADABLE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of PEFT's init_lora_weights that leave the base's weights as they are."""


LOADABLE_KEYS = """
peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_dropout init_lora_weights
modules_to_save bias target_parameters ensure_weight_tying
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out
auto_mapping base_model_name_or_path inference_mode peft_version revision task_type corda_config
eva_config loftq_config lora_ga_config megatron_core qalora_group_size runtime_config
"""
"""Keys of PEFT's config that may have any value; any other key must be off.

The first two lines are read. The third says which layers are adapted and how their weights lie, for
which the tensors' keys and the layers' types are the better source. The others have no effect.
"""


def write_peft(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes PEFT's folder: the config, and the tensors by PEFT's keys."""
    scale = json.dumps({key: config[key] for key in SCALE_KEYS if key in config})
    metadata = {"format": "pt", "lora_lab.scale": scale}
    write_pair(directory, serialize_sorted(tensors, metadata), config, FILES)


# safetensors writes several keys of metadata in an order that is another each time, and the same
# adapter shall be the same file. A file is: 8 bytes, which give the header's length; the header in
# JSON, padded with spaces to a multiple of 8; the tensors' bytes.
def serialize_sorted(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a file of safetensors, with its metadata in the order of the keys."""
    content = serialize(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, content[end:]])


def lora_config(ranks: dict[str, int], alphas: dict[str, float], **settings: Any) -> dict[str, Any]:
    """PEFT's config of a LoRA on exactly these layers; `settings` are further keys of it."""
    return {
        "peft_type": "LORA",
        **ranks_and_alphas(ranks, alphas),
        "lora_dropout": 0.0,
        "target_modules": target_modules(ranks),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
        **settings,
    }


def ranks_and_alphas(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """The keys of PEFT's config with these ranks and alphas: the most common, and patterns."""
    pairs = Counter((ranks[site], alphas[site]) for site in ranks)
    (r, alpha), _ = pairs.most_common(1)[0] if pairs else ((1, 1), 0)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(site)}": n for site, n in ranks.items() if n != r},
        "alpha_pattern": {f"^{re.escape(site)}": a for site, a in alphas.items() if a != alpha},
    }


def target_modules(sites: Iterable[str]) -> str:
    """PEFT's pattern for exactly these layers: a string is matched in full, a list by its ends."""
    return "|".join(re.escape(site) for site in sites) or NO_TARGETS


def split_by_layer(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA's tensors by layer and by PEFT's key, and all other tensors by PEFT's key."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[^.]+(\.[^.]+)?)", key):
            by_layer.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[key] = tensor
    return by_layer, others


def peft_type(directory: Path) -> str | None:
    """What adapter_config.json of a folder gives as peft_type; None where there is none."""
    try:
        return json.loads((directory / FILES[1]).read_text()).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None


def read_files(
    directory: Path, loadable: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """A folder's adapter_config.json, its tensors by PEFT's keys, and what is wrong with both.

    `loadable` are the keys of the config that may have any value. Raises AdapterError where a file
    cannot be read.
    """
    try:
        config = json.loads((directory / FILES[1]).read_text())
        tensors = load_file(directory / FILES[0])
        with safe_open(directory / FILES[0], "pt") as file:
            scale = json.loads((file.metadata() or {}).get("lora_lab.scale", "{}"))
        keys = config.keys() - loadable.split()
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise AdapterError(f"no PEFT adapter can be read from {directory}: {error}") from error
    errors = [
        f"{key}={value!r}: there is nothing like it here"
        for key, value in config.items()
        if key in keys and value
    ]
    errors += [
        f"{key}={config.get(key)!r} in {FILES[1]}, but {value!r} where {FILES[0]} was written: the "
        "two are not of one save"
        for key, value in scale.items()
        if config.get(key) != value
    ]
    return config, tensors, errors


def read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's adapter_config.json, with PEFT's defaults, and its tensors by PEFT's keys.

    Raises AdapterError where it cannot be read, or is more than LoRA, rsLoRA or DoRA.
    """
    config, tensors, errors = read_files(directory, LOADABLE_KEYS)
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        errors.append("ensure_weight_tying=True with modules_to_save: no tied modules are read")
    if kind != "LORA":
        errors.append(f"peft_type={kind!r}: must be one of LORA, VERA, LOHA, LOKR")
    if init not in LOADABLE_INITS:
        errors.append(
            f"init_lora_weights={init!r}: PEFT changes the base's weights with it; save it again "
            "with path_initial_model_for_weight_conversion, which makes it a LoRA"
        )
    if errors:
        raise AdapterError(f"PEFT's adapter in {directory} cannot be held: {'; '.join(errors)}")
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
    defaults |= {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    defaults |= {"modules_to_save": None, "bias": "none", "task_type": None}
    defaults["ensure_weight_tying"] = False
    config["target_parameters"] = config.get("target_parameters") or []
    return defaults | config, tensors
