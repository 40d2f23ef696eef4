"""One layer's adapter as PEFT's tensors, and PEFT's tensors as an adapter.

PEFT's LoRA has lora_A and lora_B where ours has A and B. Their shapes differ for convolutions. A
Conv2d with 6 output channels, 4 input channels, 2 groups and kernel size 3, with r = 2:

- ours: A (r, in/groups · k…) = (2, 18), B (out, r) = (6, 2)
- PEFT: lora_A (r', in, k…) = (4, 4, 3, 3), lora_B (out, r'/groups, 1…) = (6, 2, 1, 1), where r' is
  groups · r. lora_A is a convolution without groups, so here it is block diagonal: each group's r
  filters, which are all the same A, have zeros in the channels of the other groups.
"""

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adalora import without_pruned
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.peft_parameters import experts_from_peft, experts_to_peft
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.scaling import SCALINGS
from lora_lab.adapters.sites import Site, adapter_class

TENSOR_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_TENSOR_KEYS = {**TENSOR_KEYS, "A": "lora_embedding_A", "B": "lora_embedding_B"}


def tensor_keys(kind: str) -> dict[str, str]:
    """PEFT's keys of A, B and the magnitude in a layer of this kind."""
    return EMBEDDING_TENSOR_KEYS if kind == "embedding" else TENSOR_KEYS


def alpha_for_scale(scale: float, r: int, scaling: str) -> float:
    """The alpha with which the scaling, a key of SCALINGS, gives exactly `scale`.

    Where no float does, one that gives the next float to it. It has 9 digits where these suffice.
    """
    scale_of = SCALINGS[scaling]
    alpha = scale / scale_of(1.0, r)
    nearby = (round(alpha, 9), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, 2 * alpha))
    alpha = next((a for a in nearby if scale_of(a, r) == scale), alpha)
    return int(alpha) if alpha == int(alpha) else alpha


def peft_scaling(config: dict[str, Any]) -> str:
    """The key of SCALINGS by which PEFT's config gives the scale."""
    return "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"


def rank_and_scale(config: dict[str, Any], path: str) -> tuple[int, float]:
    """The rank and the scale of the layer `path`, by PEFT's config."""
    r = _first_match(config["rank_pattern"], path, config["r"])
    alpha = _first_match(config["alpha_pattern"], path, config["lora_alpha"])
    return r, SCALINGS[peft_scaling(config)](alpha, r)


def to_peft(layer: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's A, B and magnitude in PEFT's shapes.

    A is (groups · r, in, k…), B (out, r, 1…) and the magnitude (out,), of a convolution (1, out,
    1…). Of experts see `peft_parameters`. AdaLoRA's have no pruned triplets, so a lower r.
    """
    A, B = (factor.detach() for factor in adapter.factors())
    if adapter.recipe.form == "adalora":
        A, B = without_pruned(A, B)
    if adapter.kind == "experts":
        return experts_to_peft(A, B)
    groups, kernel = groups_and_kernel(layer)
    tensors = factors_to_peft(A, B, groups, kernel)
    if adapter.magnitude is not None:
        magnitude = adapter.magnitude.detach()
        tensors["magnitude"] = magnitude.view(1, -1, *[1] * len(kernel)) if kernel else magnitude
    return tensors


def factors_to_peft(
    A: Tensor, B: Tensor, groups: int = 1, kernel: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """A (r, in/groups · k…) and B (out, r) in PEFT's shapes."""
    filters = A.reshape(1, len(A), -1, *kernel).expand(groups, -1, -1, *kernel)
    return {"A": _block_diagonal(filters), "B": B.reshape(*B.shape, *[1] * len(kernel))}


def from_peft(
    site: Site,
    layer: nn.Module,
    peft_tensors: dict[str, Tensor],
    config: dict[str, Any],
    name: str,
) -> tuple[Site, Adapter]:
    """The site with its recipe, and its adapter, from PEFT's tensors of one layer and its config.

    `name` is the site's in PEFT's patterns of ranks. Raises AdapterError where their shapes do not
    fit, or their product is no ΔW of this layer.
    """
    r, scale = rank_and_scale(config, name)
    scaling, dora = peft_scaling(config), config["use_dora"]
    _check_shapes(site, layer, peft_tensors, r, dora)
    weight = layer._parameters[site.parameter]  # not get_parameter, which may read W + ΔW
    assert weight is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    parts = {key: part for part, key in tensor_keys(site.kind).items()}
    tensors = {parts[key]: t.to(weight.device, dtype) for key, t in peft_tensors.items()}
    groups, kernel = groups_and_kernel(layer)
    A, B = tensors["A"], tensors["B"]
    if site.kind == "experts":
        tensors["A"], tensors["B"] = experts_from_peft(A, B, site.experts)
    else:
        tensors["A"], tensors["B"] = factors_from_peft(A, B, groups, kernel)
    if dora:
        tensors["magnitude"] = tensors["magnitude"].flatten()
    r = tensors["A"].shape[-2]
    dropout = 0.0 if site.kind == "embedding" else config["lora_dropout"]  # PEFT's has none
    recipe = Recipe(r, alpha_for_scale(scale, r, scaling), dropout, scaling=scaling, dora=dora)
    adapter = adapter_class(layer, site.parameter)(layer, site.parameter, site.rows, recipe)
    adapter.scale = scale
    return replace(site, recipe=recipe), adapter.fill(tensors)


def _check_shapes(
    site: Site, layer: nn.Module, peft_tensors: dict[str, Tensor], r: int, dora: bool
) -> None:
    """Raises AdapterError unless the tensors have PEFT's keys and shapes for this layer."""
    out, rest = site.shape[::-1] if site.kind == "embedding" else site.shape
    groups, kernel = groups_and_kernel(layer)
    ones, keys = [1] * len(kernel), tensor_keys(site.kind)
    inputs = groups * rest // math.prod(kernel)
    r *= site.experts
    wanted = {keys["A"]: [r, inputs, *kernel], keys["B"]: [out, r // groups, *ones]}
    if dora:
        wanted[keys["magnitude"]] = [1, out, *ones] if kernel else [out]
    if (shapes := {key: list(tensor.shape) for key, tensor in peft_tensors.items()}) != wanted:
        raise AdapterError(f"tensors must be {wanted}, they are {shapes}")


def factors_from_peft(
    A: Tensor, B: Tensor, groups: int = 1, kernel: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Our A (r, rest) and B (out, r) for PEFT's A and B.

    Groups that have different filters in PEFT's A share an A of rank groups · r here, with a block
    diagonal B. Groups with the same filters, as `to_peft` writes them, have rank r again.
    """
    r, each = len(A) // groups, torch.arange(groups)
    # Of the blocks of A (groups · r, groups · channels, k…), which are (groups, r, groups,
    # channels, k…), those on the diagonal → (groups, r, channels, k…)
    A_blocks = A.view(groups, r, groups, -1, *kernel)[each, :, each]
    B_blocks = B.view(groups, -1, r)  # (groups, out/groups, r)
    if not torch.equal(_block_diagonal(A_blocks), A):
        raise AdapterError("A takes channels of other groups, so ΔW is no weight of this layer")
    if (A_blocks[0] == A_blocks).all():
        return A_blocks[0].flatten(1), B_blocks.flatten(0, 1)
    return A_blocks.flatten(2).flatten(0, 1), _block_diagonal(B_blocks)


def groups_and_kernel(layer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """A convolution's groups and kernel size; 1 and () for other layers."""
    is_conv = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (layer.groups, layer.kernel_size) if is_conv else (1, ())


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(groups, a, b, k…) → (groups · a, groups · b, k…), with zeros off the diagonal of blocks."""
    groups, a, b, *kernel = blocks.shape
    each = torch.arange(groups)
    dense = blocks.new_zeros(groups, a, groups, b, *kernel)
    dense[each, :, each] = blocks
    return dense.view(groups * a, groups * b, *kernel)


def _first_match(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first of `patterns` that matches this path by PEFT's rule."""
    values = [v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)]
    return values[0] if values else default
