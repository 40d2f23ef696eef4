"""PEFT's adapter folder, out and in: either library gives the other's outputs."""

import difflib
import glob
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, AdapterError, Recipe
from lora_lab.adapters.files import base_state_dict
from lora_lab.adapters.inject import place
from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.sites import Site, adapter_class, candidates
from lora_lab.adapters.slots import chosen, layer_of
from lora_lab.adapters.targets import Target, TargetError, find_sites

PREFIX = "base_model.model."
TENSORS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_TENSORS = {**TENSORS, "A": "lora_embedding_A", "B": "lora_embedding_B"}

INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""PEFT's inits that leave the base's weights as they are."""
KNOWN = """
peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_dropout init_lora_weights
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out
auto_mapping base_model_name_or_path inference_mode peft_version revision task_type corda_config
eva_config loftq_config lora_ga_config megatron_core qalora_group_size runtime_config
"""
"""The keys of PEFT's config that may have any value: those that are read; those that the tensors'
keys and the layers' types tell better; those without effect. Any other may only be off."""


def save_peft(model: nn.Module, directory: str | Path, name: str | None = None) -> None:
    """Writes the adapter `name`, or the active one, as PEFT's folder.

    `PeftModel.from_pretrained(base, directory)` then gives this model's outputs. What is no plain
    B A of rank r here is written as the B A that it is: PiSSA's and OLoRA's ΔW of rank 2r, and a
    grouped convolution's, of rank groups · r, each group's A in its own channels and zeros in the
    others'. Dropout is written where all sites have the same, else as 0. Raises AdapterError, and
    writes nothing, where there is no such adapter, or with the reason for every site that PEFT
    would compute otherwise.
    """
    made = chosen(model, name)
    layers = {site: layer_of(model, site, adapter) for site, adapter in made.items()}
    shared = {id(m.source) for m in model.modules() if isinstance(m, Adapter)}
    dora = {adapter.magnitude is not None for adapter in made.values()}
    wrong = []
    for site, adapter in made.items():
        why = _otherwise(layers[site], adapter.kind, adapter.magnitude is not None)
        if not site:
            why = "it is the model itself, and PEFT replaces layers of a model"
        elif id(adapter) in shared:
            why = "its weight is tied, and PEFT would adapt one use of it and not the other"
        elif len(dora) > 1 and adapter.magnitude is None:
            why = "it has no DoRA magnitude and others have; PEFT's use_dora is for all"
        wrong += [f"'{site}': {why}"] if why else []
    if wrong:
        raise AdapterError(f"PEFT cannot hold this adapter: {'; '.join(wrong)}")
    rslora = all(adapter.recipe.scaling == "alpha/sqrt(r)" for adapter in made.values())
    tensors, ranks, alphas = {}, {}, {}
    for site, adapter in made.items():
        own = _to_peft(layers[site], adapter)
        ranks[site] = len(own["A"])
        alphas[site] = _alpha(adapter.scale, ranks[site], rslora)
        keys = _keys(adapter.kind)
        tensors |= {f"{PREFIX}{site}.{keys[part]}": t.contiguous() for part, t in own.items()}
    (r, alpha), _ = Counter((ranks[site], alphas[site]) for site in made).most_common(1)[0]
    dropouts = {adapter.recipe.dropout for adapter in made.values()}
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        # A string is matched in full; a list would also match every name that ends so.
        "target_modules": "|".join(re.escape(site) for site in made),
        "rank_pattern": {f"^{re.escape(site)}": n for site, n in ranks.items() if n != r},
        "alpha_pattern": {f"^{re.escape(site)}": a for site, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "use_dora": dora == {True},
        "fan_in_fan_out": any(isinstance(a, TransposedLinearAdapter) for a in made.values()),
        "bias": "none",
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_peft(model: nn.Module, directory: str | Path, name: str = "default") -> list[Site]:
    """Puts the LoRA that PEFT saved in `directory` on `model` under `name`, active.

    Every other parameter is frozen. The tensors' keys say which layers are adapted. Gives the
    sites. Raises AdapterError, and changes nothing, where the files are missing, the config asks
    for more than LoRA, rsLoRA or DoRA, or for every key and layer that does not fit.
    """
    config, tensors = _read(Path(directory))
    base, layers = base_state_dict(model), dict(model.named_modules())
    sites = {site.name: site for site in candidates(model)}
    wrong: list[str] = []
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        weight = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if match := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[^.]+(\.[^.]+)?)", key):
            found.setdefault(match[1], {})[match[2]] = tensor
        elif weight not in base:
            wrong.append(f"unknown tensor {key}")
        elif not torch.equal(tensor.to(base[weight]), base[weight]):
            wrong.append(f"{key} is not this model's '{weight}': load that into the model first")
    made: dict[Site, Adapter] = {}
    for path, own in found.items():
        kind = sites[path].kind if path in sites else "weight"
        if path not in layers:
            near = difflib.get_close_matches(path, layers, n=3, cutoff=0.0)
            wrong.append(f"there is no layer '{path}'; nearest: {', '.join(near)}")
        elif why := _otherwise(layers[path], kind, config["use_dora"]):
            wrong.append(f"'{path}': {why}")
        else:
            try:
                (site,) = find_sites(model, {path: Target(kind, glob.escape(path))})
                made |= [_from_peft(site, layers[path], own, config)]
            except TargetError as error:
                wrong.append(str(error))
            except AdapterError as error:
                wrong.append(f"'{path}': {error}")
    if wrong or not made:
        wrong = wrong or ["it holds no tensors"]
        raise AdapterError(f"PEFT's adapter in {directory} does not fit: {'; '.join(wrong)}")
    place(model, made, name)
    return list(made)


def _otherwise(layer: nn.Module, kind: str, dora: bool) -> str | None:
    """Why PEFT computes this layer otherwise, or not at all; None where it is the same."""
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
    if dora and padding is not None and bool(layer.get_parameter("weight")[padding].any()):
        return f"padding_idx={padding} with DoRA: PEFT scales its vector, which is not zero here"
    return None


def _keys(kind: str) -> dict[str, str]:
    return EMBEDDING_TENSORS if kind == "embedding" else TENSORS


def _alpha(scale: float, r: int, rslora: bool) -> float:
    """The alpha from which alpha/r, or alpha/√r, gives `scale` again, or its next float."""
    over = math.sqrt(r) if rslora else r
    alpha = scale * over
    if round(alpha, 9) / over == scale:
        alpha = round(alpha, 9)
    return int(alpha) if alpha == int(alpha) else alpha


def _geometry(layer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Groups and kernel size: 1 and none but for convolutions."""
    conv = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (layer.groups, layer.kernel_size) if conv else (1, ())


def _blocks(parts: Tensor) -> Tensor:
    """(groups, a, b, *k) → (groups · a, groups · b, *k), zero off the diagonal of blocks."""
    groups, a, b, *k = parts.shape
    each = torch.arange(groups)
    dense = parts.new_zeros(groups, a, groups, b, *k)
    dense[each, :, each] = parts
    return dense.view(groups * a, groups * b, *k)


def _to_peft(layer: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """A (groups · r, in, *k), B (out, r, 1…) and a magnitude, (out,) or of a conv (1, out, 1…)."""
    A, B = (factor.detach() for factor in adapter.factors())
    groups, k = _geometry(layer)
    filters = A.reshape(1, len(A), -1, *k).expand(groups, -1, -1, *k)
    tensors = {"A": _blocks(filters), "B": B.reshape(*B.shape, *[1] * len(k))}
    if adapter.magnitude is not None:
        magnitude = adapter.magnitude.detach()
        tensors["magnitude"] = magnitude.view(1, -1, *[1] * len(k)) if k else magnitude
    return tensors


def _from_peft(
    site: Site, layer: nn.Module, found: dict[str, Tensor], config: dict[str, Any]
) -> tuple[Site, Adapter]:
    """The adapter that PEFT's tensors of one layer make, and its site."""
    r = _of_pattern(config["rank_pattern"], site.name, config["r"])
    alpha = _of_pattern(config["alpha_pattern"], site.name, config["lora_alpha"])
    rslora, dora = config["use_rslora"], config["use_dora"]
    scale = alpha / (math.sqrt(r) if rslora else r)
    embedding = site.kind == "embedding"
    out, rest = site.shape[::-1] if embedding else site.shape
    groups, k = _geometry(layer)
    ones, keys = [1] * len(k), _keys(site.kind)
    inputs = groups * rest // math.prod(k)
    wanted = {keys["A"]: [r, inputs, *k], keys["B"]: [out, r // groups, *ones]}
    if dora:
        wanted[keys["magnitude"]] = [1, out, *ones] if k else [out]
    if (shapes := {key: list(tensor.shape) for key, tensor in found.items()}) != wanted:
        raise AdapterError(f"tensors must be {wanted}, they are {shapes}")
    weight = layer.get_parameter(site.parameter)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors = {
        part: found[key].to(weight.device, dtype)
        for part, key in keys.items()
        if dora or part != "magnitude"
    }
    each = torch.arange(groups)
    A = tensors["A"].view(groups, r // groups, groups, -1, *k)[each, :, each]
    B = tensors["B"].view(groups, -1, r // groups)
    if not torch.equal(_blocks(A), tensors["A"]):
        raise AdapterError("A takes channels of other groups, so ΔW is no weight of this layer")
    same = bool((A[0] == A).all())  # as save_peft writes it: rank r again, not groups · r
    tensors["A"] = (A[0] if same else A).reshape(-1, rest)
    tensors["B"] = B.flatten(0, 1) if same else _blocks(B)
    if dora:
        tensors["magnitude"] = tensors["magnitude"].flatten()
    r = len(tensors["A"])
    recipe = Recipe(
        r,
        _alpha(scale, r, rslora),
        dropout=0.0 if embedding else config["lora_dropout"],  # PEFT's embeddings have none
        scaling="alpha/sqrt(r)" if rslora else "alpha/r",
        dora=dora,
    )
    adapter = adapter_class(layer)(layer, site.parameter, site.rows, recipe)
    adapter.scale = scale
    return replace(site, recipe=recipe), adapter.fill(tensors)


def _of_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """What the first of `patterns` that PEFT matches with this path says."""
    fit = [v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)]
    return fit[0] if fit else default


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's config, with PEFT's defaults, and its tensors."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        kind, init = config.get("peft_type"), config.get("init_lora_weights")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise AdapterError(f"no PEFT adapter can be read from {directory}: {error}") from error
    wrong = [
        f"{key}={value!r}: there is nothing like it here"
        for key, value in config.items()
        if key not in KNOWN.split() and value and (key, value) != ("bias", "none")
    ]
    if kind != "LORA":
        wrong.append(f"peft_type={kind!r}: must be LORA")
    if init not in INITS:
        wrong.append(
            f"init_lora_weights={init!r}: PEFT changes the base's weights with it; save it again "
            "with path_initial_model_for_weight_conversion, which makes it a LoRA"
        )
    if wrong:
        raise AdapterError(f"PEFT's adapter in {directory} cannot be held: {'; '.join(wrong)}")
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
    defaults |= {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return defaults | config, tensors
