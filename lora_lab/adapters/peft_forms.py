"""VeRA, LoHa and LoKr in PEFT's folders, each tensor by the name that PEFT has for it.

- LoHa: ΔW = alpha/r · (w1_a w1_b) ∘ (w2_a w2_b), of a convolution as its matrix. PEFT's other form,
  with a tensor for the kernel (`use_effective_conv2d`), is not held here.
- LoKr: ΔW = alpha/r · w1 ⊗ w2, where either is whole or a product w_a w_b.
- VeRA: ΔW = diag(lambda_b) vera_B[:out] diag(lambda_d) vera_A[:, :in], where one vera_A (r × in)
  and one vera_B (out × r), of the largest layers' sizes, are for all.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters import peft_trained_in_full
from lora_lab.adapters.adaptable import adaptable_sites
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import base_state_dict
from lora_lab.adapters.form import uniform
from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.lycoris import LOHA, LOKR
from lora_lab.adapters.peft_folder import ranks_and_alphas, read_files, target_modules
from lora_lab.adapters.peft_parameters import holds_experts
from lora_lab.adapters.peft_reasons import reason_form_differs
from lora_lab.adapters.peft_tensors import alpha_for_scale, rank_and_scale
from lora_lab.adapters.peft_trained_in_full import PREFIX, InFull
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.slots import layer_of
from lora_lab.adapters.target import TargetError
from lora_lab.adapters.trained_in_full import FullParameter

AdaptersRead = tuple[dict[Site, Adapter], dict[str, FullParameter], list[str]]
"""What a folder of PEFT has for a model: adapters, parameters trained in full, and errors."""

VERA = {"vera_lambda_b", "vera_lambda_d"}

TYPES = {"vera": "VERA", "loha": "LOHA", "lokr": "LOKR", "lokr_both": "LOKR"}
"""Form → PEFT's peft_type."""

PARTS = {"VERA": VERA, "LOHA": LOHA, "LOKR": LOKR}
"""PEFT's peft_type → the last words of the keys of a layer's tensors."""

OF_LOHA = {"B": "hada_w1_a", "A": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
OF_LOKR = {"B": "lokr_w2_a", "A": "lokr_w2_b", "D": "lokr_w2", "C2": "lokr_w1_b"}

OF_LYCORIS = {key: name for table in (OF_LOHA, OF_LOKR) for name, key in table.items()}
OF_LYCORIS |= {"lokr_w1": "C", "lokr_w1_a": "C"}

LOADABLE_KEYS = """
peft_type r alpha lora_alpha rank_pattern alpha_pattern modules_to_save bias task_type
decompose_both decompose_factor save_projection projection_prng_key vera_dropout
target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out
auto_mapping base_model_name_or_path inference_mode peft_version revision
init_weights d_initial rank_dropout_scale use_effective_conv2d runtime_config
"""
"""Keys of PEFT's configs that may have any value; any other key must be off.

The first two lines are read, the others have no effect on the tensors that a folder holds.
"""


def names_in_peft(form: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """PEFT's names of the tensors of LoHa or LoKr, by ours."""
    if form == "loha":
        return OF_LOHA
    names = OF_LOKR | {"C": "lokr_w1_a" if "C2" in tensors else "lokr_w1"}
    return {name: names[name] for name in tensors}


def form_to_peft(
    model: nn.Module, adapters: Mapping[str, Adapter], in_full: InFull
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of adapters of one form of TYPES.

    `in_full` is what trains in full beside them. Raises AdapterError with the reason for each site
    that PEFT cannot hold.
    """
    forms = {adapter.recipe.form for adapter in adapters.values()}
    form = next(form for form in forms if form in TYPES)
    errors = in_full.errors + [f"there are sites of the forms {', '.join(sorted(forms))}"] * (
        len(forms) > 1
    )
    for site, adapter in adapters.items():
        reason = reason_form_differs(layer_of(model, site, adapter), TYPES[form], adapter)
        if not site:
            reason = "it is the model itself, and PEFT replaces layers of a model"
        errors += [f"'{site}': {reason}"] if reason else []
    if in_full.biases and form != "vera":
        errors.append(f"{', '.join(in_full.biases)}: PEFT's {TYPES[form]} trains no biases")
    if errors:
        raise AdapterError(f"PEFT cannot hold this adapter: {'; '.join(errors)}")
    # As a list, of which PEFT renames none in a mixture of experts.
    targets = [*adapters] if holds_experts(model) else target_modules(adapters)
    config = {"peft_type": TYPES[form], "target_modules": targets, **in_full.config}
    if form == "vera":
        of_vera, tensors = _vera_to_peft(adapters)
        config["bias"] = config["bias"].replace("lora", "vera")
        return config | of_vera, tensors | in_full.tensors
    del config["bias"]
    tensors = _lycoris_to_peft(form, adapters, model) | in_full.tensors
    return config | _lycoris_config(form, adapters), tensors


def _lycoris_config(form: str, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The keys of LoHa's or LoKr's config, without those that all configs have."""
    ranks = {site: adapter.r for site, adapter in adapters.items()}
    alphas = {s: alpha_for_scale(a.scale, ranks[s], "alpha/r") for s, a in adapters.items()}
    config = ranks_and_alphas(ranks, alphas)
    config |= {"alpha": config.pop("lora_alpha"), "use_effective_conv2d": False}
    if form != "loha":
        config |= {"decompose_both": form == "lokr_both", "decompose_factor": -1}
    return config


def _lycoris_to_peft(
    form: str, adapters: Mapping[str, Adapter], model: nn.Module
) -> dict[str, Tensor]:
    tensors = {}
    for site, adapter in adapters.items():
        named = adapter.tensors()
        for name, key in names_in_peft(form, named).items():
            tensor = named[name]
            if name == "D":  # (o₂, i₂ · k…) → of a convolution (o₂, i₂, k…)
                kernel = layer_of(model, site, adapter)._parameters["weight"].shape[2:]  # pyright: ignore
                tensor = tensor.reshape(len(tensor), -1, *kernel)
            tensors[f"{PREFIX}{site}.{key}"] = tensor.contiguous()
    return tensors


# Each site's A is a slice of the largest one's but for a factor, since its bound is that of its own
# number of columns: A of 8 × 12 and of 8 × 48 have the bounds √(6/12) and √(6/48), so the first is
# the first 12 columns of the second times 2. PEFT's site then has twice the d.
def _vera_to_peft(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """VeRA's config and tensors. Raises AdapterError where the sites share no A and B."""
    ranks = {adapter.r for adapter in adapters.values()}
    if len(ranks) > 1:
        raise AdapterError(f"PEFT's VERA has one rank for all sites, here are {sorted(ranks)}")
    shared_A = max((adapter.A.detach() for adapter in adapters.values()), key=lambda A: A.shape[1])
    shared_B = max((adapter.B.detach() for adapter in adapters.values()), key=len)
    tensors = {"base_model.vera_A": shared_A, "base_model.vera_B": shared_B}
    for site, adapter in adapters.items():
        t = adapter.tensors()
        d = _share(site, t["A"], shared_A[:, : t["A"].shape[1]]) * t["lambda_d"]
        b = _share(site, t["B"], shared_B[: len(t["B"])]) * t["lambda_b"] * adapter.scale
        tensors |= {f"{PREFIX}{site}.vera_lambda_{name}": v for name, v in (("b", b), ("d", d))}
    dropouts = {adapter.recipe.dropout for adapter in adapters.values()}
    config = {
        "r": ranks.pop(),
        "save_projection": True,
        "projection_prng_key": 0,
        "vera_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "fan_in_fan_out": any(isinstance(a, TransposedLinearAdapter) for a in adapters.values()),
    }
    return config, {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def _share(site: str, matrix: Tensor, shared: Tensor) -> float:
    """The factor by which `matrix` is `shared`. Raises AdapterError where there is none."""
    factor = ((matrix * shared).sum() / shared.square().sum()).item()
    if not torch.allclose(matrix, factor * shared, rtol=1e-4, atol=1e-6):
        raise AdapterError(
            f"'{site}': its frozen A or B is not a part of that of the others, and PEFT's VERA has "
            "one A and one B for all sites"
        )
    return factor


def read_form(directory: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The form of PEFT's VeRA, LoHa or LoKr, the folder's config and its tensors by PEFT's keys.

    The config has PEFT's defaults. Raises AdapterError where it cannot be held here.
    """
    config, tensors, errors = read_files(directory, LOADABLE_KEYS)
    errors += [
        f"{key} is of the form with a tensor for the kernel (use_effective_conv2d), which is not "
        "held here"
        for key in tensors
        if key.endswith(("hada_t1", "lokr_t2"))
    ]
    if errors:
        raise AdapterError(f"PEFT's adapter in {directory} cannot be held: {'; '.join(errors)}")
    defaults: dict[str, Any] = {"r": 256 if config["peft_type"] == "VERA" else 8, "alpha": 8}
    defaults |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}
    defaults |= {"modules_to_save": None, "task_type": None, "vera_dropout": 0.0}
    config = defaults | config
    config["lora_alpha"] = config["alpha"]
    forms = [form for form, kind in TYPES.items() if kind == config["peft_type"]]
    return forms[-1 if config.get("decompose_both") else 0], config, tensors


def split_by_site(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each layer by the last words of PEFT's keys, and all other tensors."""
    by_site: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        site, _, part = key.removeprefix(PREFIX).rpartition(".")
        if key.startswith(PREFIX) and part in PARTS[config["peft_type"]]:
            by_site.setdefault(site, {})[part] = tensor
        elif not key.startswith("base_model.vera_"):
            others[key] = tensor
    return by_site, others


def with_shared(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    by_site: Mapping[str, dict[str, Tensor]],
    columns: Mapping[str, int],
) -> dict[str, dict[str, Tensor]]:
    """VeRA's tensors by site and by our names, with each site's part of the shared A and B.

    `columns` are how many columns the weight of each site has, as a matrix. Where the folder does
    not hold A and B, PEFT draws them from its seed.
    """
    A, B = tensors.get("base_model.vera_A"), tensors.get("base_model.vera_B")
    if A is None or B is None:
        r, rest = config["r"], max(columns.values())
        out = max(len(parts["vera_lambda_b"]) for parts in by_site.values())
        rng = torch.Generator().manual_seed(config["projection_prng_key"])
        A = uniform((r, rest), math.sqrt(6 / rest), rng)
        B = uniform((out, r), math.sqrt(6 / r), rng)
    named = {}
    for site, parts in by_site.items():
        b, d = parts["vera_lambda_b"], parts["vera_lambda_d"]
        named[site] = {"A": A[:, : columns[site]], "B": B[: len(b)], "lambda_b": b, "lambda_d": d}
    return named


def form_from_peft(
    site: Site,
    layer: nn.Module,
    form: str,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
) -> tuple[Site, Adapter]:
    """The site with its recipe, and its adapter, of a form other than LoRA.

    `tensors` have PEFT's names, of VeRA ours (`with_shared`). Raises AdapterError where they do not
    fit, or PEFT computes something else.
    """
    if form == "vera":
        r, scale, scaling, dropout = config["r"], 1.0, "none", config["vera_dropout"]
    else:
        (r, scale), scaling, dropout = rank_and_scale(config, site.name), "alpha/r", 0.0
        tensors = {OF_LYCORIS[key]: t.flatten(1) for key, t in tensors.items()}
    if site.kind not in (kinds := FORMS[form].kinds):  # pyright: ignore
        raise AdapterError(f"it is of kind {site.kind}, form={form} is for {', '.join(kinds)}")
    alpha = 1.0 if form == "vera" else alpha_for_scale(scale, r, scaling)
    recipe = Recipe(r, alpha, dropout, scaling=scaling, form=form)
    adapter = adapter_class(layer, site.parameter)(layer, site.parameter, site.rows, recipe)
    adapter.scale = scale
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    wanted = {key: list(shape) for key, shape in adapter.form_shapes().items()}
    if shapes != wanted:
        factor = config.get("decompose_factor", -1)
        why = f" (decompose_factor={factor}; here it is -1)" if factor != -1 else ""
        raise AdapterError(f"tensors must be {wanted}, they are {shapes}{why}")
    weight = adapter.weight_of(layer)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    named = {key: tensors[key].to(weight.device, dtype, copy=True) for key in wanted}
    if reason := reason_form_differs(layer, TYPES[form], adapter.fill(named)):
        raise AdapterError(reason)
    return replace(site, recipe=recipe), adapter


def read_form_adapters(model: nn.Module, directory: Path) -> AdaptersRead:
    """The adapters of PEFT's VeRA, LoHa or LoKr that lies in `directory`, for sites of `model`."""
    form, config, tensors = read_form(directory)
    by_site, others = split_by_site(config, tensors)
    in_full, errors = peft_trained_in_full.from_peft(model, base_state_dict(model), others, config)
    adaptable = adaptable_sites(model)
    sites: dict[str, Site] = {}
    for path in by_site:
        site = adaptable.get(path)
        if isinstance(site, Site) and site.tied_to:
            site = TargetError(f"'{path}' is tied to {', '.join(site.tied_to)}; untie it first")
        if isinstance(site, Site):
            sites[path] = site
        else:
            near = ", ".join(difflib.get_close_matches(path, adaptable, n=3, cutoff=0.0))
            errors.append(str(site or f"there is no layer '{path}'; nearest: {near}"))
    by_site = {path: by_site[path] for path in sites}
    if form == "vera" and by_site:
        columns = {path: site.shape[1] for path, site in sites.items()}
        by_site = with_shared(config, tensors, by_site, columns)
    adapters: dict[Site, Adapter] = {}
    for path, named in by_site.items():
        layer = model.get_submodule(sites[path].layer)
        try:
            adapters |= [form_from_peft(sites[path], layer, form, named, config)]
        except AdapterError as error:
            errors.append(f"'{path}': {error}")
    return adapters, in_full, errors
