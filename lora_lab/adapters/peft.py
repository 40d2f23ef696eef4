"""Adapters to and from PEFT's folders, so that either library gives the other's outputs."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lab.adapters import peft_trained_in_full
from lora_lab.adapters.adaptable import adaptable_sites
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.blocks import with_joined_blocks
from lora_lab.adapters.files import base_state_dict
from lora_lab.adapters.finite import require_finite
from lora_lab.adapters.inject import place_adapters
from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.peft_folder import (
    lora_config,
    peft_type,
    read_peft,
    split_by_layer,
    target_modules,
    write_peft,
)
from lora_lab.adapters.peft_forms import (
    PARTS,
    TYPES,
    AdaptersRead,
    form_to_peft,
    read_form_adapters,
)
from lora_lab.adapters.peft_parameters import (
    held_as_parameters,
    holds_experts,
    paths_of_tensors,
    reason_no_parameter,
    targeted,
)
from lora_lab.adapters.peft_reasons import (
    TIED_TABLE,
    reason_differs,
    reason_layer_differs,
    reason_not_tied,
)
from lora_lab.adapters.peft_tensors import alpha_for_scale, from_peft, tensor_keys, to_peft
from lora_lab.adapters.peft_trained_in_full import PREFIX, InFull
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.sites import Site
from lora_lab.adapters.slots import also_trained, layer_of, require_attached
from lora_lab.adapters.target import TargetError


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
    2r, a grouped convolution with rank groups · r (see `peft_tensors`), AdaLoRA with the ranks that
    are left, the blocks of a fused layer with the sum of their ranks. VeRA, LoHa and LoKr are
    written as PEFT's (see `peft_forms`). Dropout is written where all sites have the same, else as
    0. What trains in full is written as whole modules in modules_to_save, or as biases (see
    `peft_trained_in_full`).

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
    adapters = with_joined_blocks(model, adapters)
    about: dict[str, Any] = {"inference_mode": True, "task_type": task_type}
    about["base_model_name_or_path"] = base_model and str(base_model)
    has_form = any(adapter.recipe.form in TYPES for adapter in adapters.values())
    to_folder = form_to_peft if has_form else _lora_to_peft
    config, tensors = to_folder(model, adapters, extra)
    write_peft(Path(directory), config | about, tensors)


def _lora_to_peft(
    model: nn.Module, adapters: Mapping[str, Adapter], in_full: InFull
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of adapters that PEFT holds as LoRA, as `form_to_peft`."""
    _check_savable(model, adapters, in_full.errors)
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
    if any(adapter.is_tied for adapter in adapters.values()):
        # PEFT asks whether its targets have this name, and not that of the layer.
        targets.setdefault("target_modules", f"{target_modules(ranks)}|{TIED_TABLE}")
        targets["ensure_weight_tying"] = True
    config = lora_config(
        ranks,
        alphas,
        **targets,
        # PEFT has no dropout for parameters.
        lora_dropout=dropouts.pop() if len(dropouts) == 1 and not parameters else 0.0,
        use_rslora=rslora,
        use_dora=any(adapter.magnitude is not None for adapter in adapters.values()),
        fan_in_fan_out=any(isinstance(a, TransposedLinearAdapter) for a in adapters.values()),
        **in_full.config,
    )
    return config, tensors | in_full.tensors


def _check_savable(
    model: nn.Module, adapters: Mapping[str, Adapter], other_errors: list[str]
) -> None:
    """Raises AdapterError with the reason for each site that PEFT would compute differently."""
    any_dora = any(adapter.magnitude is not None for adapter in adapters.values())
    is_mixture = holds_experts(model)
    errors = []
    for site, adapter in adapters.items():
        dora, layer = adapter.magnitude is not None, layer_of(model, site, adapter)
        reason = reason_differs(model, layer, site, adapter.kind, adapter.is_tied, dora, is_mixture)
        if any_dora and not dora:
            reason = "it has no DoRA magnitude and others have; PEFT's use_dora is for all"
        errors += [f"'{site}': {reason}"] if reason else []
    if errors := errors + other_errors:
        raise AdapterError(f"PEFT cannot hold this adapter: {'; '.join(errors)}")


def load_peft(model: nn.Module, directory: str | Path, name: str = "default") -> list[Site]:
    """Puts the adapter that PEFT saved in `directory` on `model` under `name`, active.

    All other parameters are frozen, but those of modules_to_save and the biases that `bias` names.
    The tensors' keys say which layers are adapted. Gives the sites.

    Raises AdapterError, and changes nothing, where the files are missing or not of one save, where
    the config asks for more than LoRA, rsLoRA, DoRA, VeRA, LoHa or LoKr, or with all keys and
    layers that do not fit.
    """
    read = read_form_adapters if peft_type(Path(directory)) in PARTS else _read_lora_adapters
    adapters, in_full, errors = read(model, Path(directory))
    if errors or not (adapters or in_full):
        errors = errors or ["it holds no tensors"]
        raise AdapterError(f"PEFT's adapter in {directory} does not fit: {'; '.join(errors)}")
    place_adapters(model, adapters, name, in_full)
    return list(adapters)


def _read_lora_adapters(model: nn.Module, directory: Path) -> AdaptersRead:
    """The adapters of PEFT's LoRA that lies in `directory`, for sites of `model`."""
    config, tensors = read_peft(directory)
    tensors_by_layer, others = split_by_layer(tensors)
    in_full, errors = peft_trained_in_full.from_peft(model, base_state_dict(model), others, config)
    layers = dict(model.named_modules())
    adaptable = adaptable_sites(model)
    keys = targeted(model, config["target_parameters"])
    key_by_path = {path: key for key, path in paths_of_tensors(model, keys).items()}
    adapters: dict[Site, Adapter] = {}
    for path, layer_tensors in tensors_by_layer.items():
        key = key_by_path.get(path)
        site = adaptable.get(key or path)
        layer = layers.get(path if key is None else key.rpartition(".")[0])
        if layer is None:
            near = difflib.get_close_matches(path, layers, n=3, cutoff=0.0)
            errors.append(f"there is no layer '{path}'; nearest: {', '.join(near)}")
            continue
        if isinstance(site, TargetError):
            errors.append(str(site))
            continue
        kind = "weight" if site is None else site.kind
        if key is not None:
            reason = reason_no_parameter(layer, kind, config["use_dora"])
        else:
            reason = reason_layer_differs(layer, kind, config["use_dora"])
        if reason:
            errors.append(f"'{path}': {reason}")
            continue
        assert site is not None
        is_shared = config["ensure_weight_tying"] and not reason_not_tied(
            model, layer, site.name, config["use_dora"]
        )
        if site.tied_to and not is_shared:
            errors.append(
                f"the weight of '{site.name}' is tied to {', '.join(site.tied_to)}: PEFT's adapter "
                "would change one use of it and not the other; untie it first"
            )
            continue
        try:
            adapters |= [from_peft(site, layer, layer_tensors, config, key or path)]
        except AdapterError as error:
            errors.append(f"'{path}': {error}")
    return adapters, in_full, errors
