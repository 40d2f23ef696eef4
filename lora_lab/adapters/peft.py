"""Writing and reading PEFT's adapter folders, so that either library gives the other's outputs."""

import difflib
import glob
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from lora_lab.adapters import peft_trained_in_full
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import base_state_dict, write_pair
from lora_lab.adapters.finite import require_finite
from lora_lab.adapters.inject import place_adapters
from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.peft_parameters import (
    held_as_parameters,
    holds_experts,
    paths_of_tensors,
    reason_no_parameter,
    targeted,
)
from lora_lab.adapters.peft_tensors import alpha_for_scale, from_peft, tensor_keys, to_peft
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.sites import Site, candidate_sites
from lora_lab.adapters.slots import also_trained, layer_of, require_attached
from lora_lab.adapters.target import Target, TargetError
from lora_lab.adapters.targets import find_sites

FILES = ("adapter_model.safetensors", "adapter_config.json")
"""PEFT's names of the two files."""

SCALE_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Keys of PEFT's config that say what its tensors are multiplied by.

`save_peft` also writes them into the metadata of the tensors, which PEFT does not read.
"""

NO_TARGETS = "dummy-target-modules"
"""PEFT's word for a LoRA on no layer, where only other parameters train."""

LOADABLE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of PEFT's init_lora_weights that leave the base's weights as they are."""

LOADABLE_KEYS = """
peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_dropout init_lora_weights
modules_to_save bias target_parameters
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out
auto_mapping base_model_name_or_path inference_mode peft_version revision task_type corda_config
eva_config loftq_config lora_ga_config megatron_core qalora_group_size runtime_config
"""
"""Keys of PEFT's config that may have any value; any other key must be off.

The first two lines are read. The third says which layers are adapted and how their weights lie, for
which the tensors' keys and the layers' types are the better source. The others have no effect.
"""


def save_peft(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    *,
    task_type: str | None = None,
    base_model: str | Path | None = None,
) -> None:
    """Writes the adapter `name`, or the active one, as PEFT's folder.

    `PeftModel.from_pretrained(base, directory)` then gives this model's outputs. PEFT stores one
    product B A for each layer, so other forms of ΔW are written as one: PiSSA and OLoRA with rank
    2r, a grouped convolution with rank groups · r (see `peft_tensors`). Dropout is written where
    all sites have the same, else as 0. What trains in full is written as whole modules in
    modules_to_save, or as biases (see `peft_trained_in_full`).

    `task_type` (as "SEQ_CLS") and `base_model`, the base's folder or hub id, are what PEFT's
    AutoPeftModel classes read; with the first PEFT also trains heads in full by itself. Where there
    is an adapter in such a head the task type is left out, and PeftModel reads the folder.

    Raises AdapterError, and writes nothing, where there is no such adapter, a change is not finite,
    or with the reason for each site that PEFT would compute differently.
    """
    adapters, in_full = require_attached(model, name), also_trained(model, name)
    require_finite(model, {**adapters, **in_full})
    if peft_trained_in_full.heads_of_task([*adapters], task_type):
        task_type = None
    extra = peft_trained_in_full.to_peft(
        model, base_state_dict(model), in_full, list(adapters), task_type
    )
    _check_savable(model, adapters, extra.errors)
    rslora = all(adapter.recipe.scaling == "alpha/sqrt(r)" for adapter in adapters.values())
    scaling = "alpha/sqrt(r)" if rslora else "alpha/r"
    parameters = held_as_parameters(model, adapters)
    paths = paths_of_tensors(model, parameters.values())
    tensors, ranks, alphas = {}, {}, {}
    for site, adapter in adapters.items():
        keys, name = tensor_keys(adapter.kind), parameters.get(site, site)
        site_tensors = to_peft(layer_of(model, site, adapter), adapter)
        experts = adapter.shape[0] if adapter.kind == "experts" else 1
        ranks[name] = len(site_tensors["A"]) // experts
        alphas[name] = alpha_for_scale(adapter.scale, ranks[name], scaling)
        for part, tensor in site_tensors.items():
            tensors[f"{PREFIX}{paths.get(name, name)}.{keys[part]}"] = tensor.contiguous()
    dropouts = {adapter.recipe.dropout for adapter in adapters.values()}
    targets: dict[str, Any] = {}
    if parameters or holds_experts(model):
        # As a list, of which PEFT renames none: of a pattern it would take the last names alone.
        modules = [site for site in adapters if site not in parameters]
        targets = {"target_modules": modules, "target_parameters": [*parameters.values()]}
    config = lora_config(
        ranks,
        alphas,
        **targets,
        # PEFT has no dropout for parameters.
        lora_dropout=dropouts.pop() if len(dropouts) == 1 and not parameters else 0.0,
        use_rslora=rslora,
        use_dora=any(adapter.magnitude is not None for adapter in adapters.values()),
        fan_in_fan_out=any(isinstance(a, TransposedLinearAdapter) for a in adapters.values()),
        task_type=task_type,
        base_model_name_or_path=base_model and str(base_model),
        **extra.config,
    )
    write_peft(Path(directory), config, tensors | extra.tensors)


def write_peft(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes PEFT's folder: the config, and the tensors by PEFT's keys."""
    scale = json.dumps({key: config[key] for key in SCALE_KEYS})
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


def _check_savable(model: nn.Module, adapters: dict[str, Adapter], other_errors: list[str]) -> None:
    """Raises AdapterError with the reason for each site that PEFT would compute differently."""
    shared = {id(m.source) for m in model.modules() if isinstance(m, Adapter)}
    any_dora = any(adapter.magnitude is not None for adapter in adapters.values())
    parameters = held_as_parameters(model, adapters)
    errors = []
    for site, adapter in adapters.items():
        dora, layer = adapter.magnitude is not None, layer_of(model, site, adapter)
        reason = reason_peft_differs(layer, adapter.kind, dora)
        if site in parameters:
            reason = reason_no_parameter(layer, adapter.kind, any_dora)
        if not site:
            reason = "it is the model itself, and PEFT replaces layers of a model"
        elif id(adapter) in shared:
            reason = "its weight is tied, and PEFT would adapt one use of it and not the other"
        elif any_dora and not dora:
            reason = "it has no DoRA magnitude and others have; PEFT's use_dora is for all"
        errors += [f"'{site}': {reason}"] if reason else []
    if errors := errors + other_errors:
        raise AdapterError(f"PEFT cannot hold this adapter: {'; '.join(errors)}")


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


def load_peft(model: nn.Module, directory: str | Path, name: str = "default") -> list[Site]:
    """Puts the LoRA that PEFT saved in `directory` on `model` under `name`, active.

    All other parameters are frozen, but those of modules_to_save and the biases that `bias` names.
    The tensors' keys say which layers are adapted. Gives the sites.

    Raises AdapterError, and changes nothing, where the files are missing or not of one save, where
    the config asks for more than LoRA, rsLoRA or DoRA, or with all keys and layers that do not fit.
    """
    config, tensors = read_peft(Path(directory))
    tensors_by_layer, others = split_by_layer(tensors)
    in_full, errors = peft_trained_in_full.from_peft(model, base_state_dict(model), others, config)
    layers = dict(model.named_modules())
    candidates = list(candidate_sites(model))
    by_name = {site.name: site for site in candidates}
    by_key = {site.key: site for site in candidates if site.rows is None}
    keys = targeted(model, config["target_parameters"])
    key_by_path = {path: key for key, path in paths_of_tensors(model, keys).items()}
    adapters: dict[Site, Adapter] = {}
    for path, layer_tensors in tensors_by_layer.items():
        key = key_by_path.get(path)
        site = by_name.get(path) if key is None else by_key.get(key)
        layer = layers.get(path if site is None else site.layer)
        kind = "weight" if site is None else site.kind
        reason = None
        if layer is None:
            near = difflib.get_close_matches(path, layers, n=3, cutoff=0.0)
            errors.append(f"there is no layer '{path}'; nearest: {', '.join(near)}")
            continue
        if key is not None:
            reason = reason_no_parameter(layer, kind, config["use_dora"])
        else:
            reason = reason_peft_differs(layer, kind, config["use_dora"])
        if reason:
            errors.append(f"'{path}': {reason}")
            continue
        assert site is not None
        try:
            (site,) = find_sites(model, {path: Target(kind, glob.escape(site.name))})
            adapters |= [from_peft(site, layer, layer_tensors, config, key or path)]
        except TargetError as error:
            errors.append(str(error))
        except AdapterError as error:
            errors.append(f"'{path}': {error}")
    if errors or not (adapters or in_full):
        errors = errors or ["it holds no tensors"]
        raise AdapterError(f"PEFT's adapter in {directory} does not fit: {'; '.join(errors)}")
    place_adapters(model, adapters, name, in_full)
    return list(adapters)


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


def reason_peft_differs(layer: nn.Module, kind: str, dora: bool) -> str | None:
    """Why PEFT computes this layer differently, or not at all; None where it is the same."""
    if kind == "weight" and isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d):
        return f"{type(layer).__name__} computes otherwise than the layer that PEFT takes it for"
    if kind == "weight":
        return f"PEFT cannot adapt this weight of {type(layer).__name__} wherever it is read"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if any(step != 1 for step in layer.dilation):
            return f"dilation={layer.dilation}, and PEFT's A is not dilated"
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}, and PEFT's A pads with zeros"
        if dora and layer.groups > 1:
            return f"groups={layer.groups} with DoRA, whose norm PEFT takes over wrong channels"
    padding = getattr(layer, "padding_idx", None)
    weight = layer._parameters.get("weight")  # the base's, where reading it gives W + ΔW
    if dora and padding is not None and weight is not None and bool(weight[padding].any()):
        return f"padding_idx={padding} with DoRA: PEFT scales its vector, which is not zero here"
    return None


def read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's adapter_config.json, with PEFT's defaults, and its tensors by PEFT's keys.

    Raises AdapterError where it cannot be read, or is more than LoRA, rsLoRA or DoRA.
    """
    try:
        config = json.loads((directory / FILES[1]).read_text())
        tensors = load_file(directory / FILES[0])
        with safe_open(directory / FILES[0], "pt") as file:
            scale = json.loads((file.metadata() or {}).get("lora_lab.scale", "{}"))
        kind, init = config.get("peft_type"), config.get("init_lora_weights")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise AdapterError(f"no PEFT adapter can be read from {directory}: {error}") from error
    errors = [
        f"{key}={value!r}: there is nothing like it here"
        for key, value in config.items()
        if key not in LOADABLE_KEYS.split() and value
    ]
    errors += [
        f"{key}={config.get(key)!r} in {FILES[1]}, but {value!r} where {FILES[0]} was written: the "
        "two are not of one save"
        for key, value in scale.items()
        if config.get(key) != value
    ]
    if kind != "LORA":
        errors.append(f"peft_type={kind!r}: must be LORA")
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
    config["target_parameters"] = config.get("target_parameters") or []
    return defaults | config, tensors
