"""An adapter of a full fine-tune: the best low-rank approximation of W − W₀, in PEFT's format."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from lora_lab.adapters.linear import TransposedLinearAdapter
from lora_lab.adapters.peft_folder import ranks_and_alphas, target_modules, write_peft
from lora_lab.adapters.peft_parameters import holds_experts, is_renamed
from lora_lab.adapters.peft_tensors import factors_to_peft, tensor_keys
from lora_lab.adapters.peft_trained_in_full import PREFIX
from lora_lab.adapters.sites import candidate_sites
from lora_lab.analysis.cut import balanced_factors
from lora_lab.analysis.leading_svd import first_triples, squared_norm
from lora_lab.analysis.spectra import SVD, svd_of_matrix
from lora_lab.analysis.stored_spectra import Difference

EMBEDDING_NAME = re.compile(r"embed\w*|\w*embeddings?|wte|wpe|shared|relative_attention_bias")
"""The last word of a layer's name that is taken for an embedding where no model tells."""

FIRST_TRIPLES = 64
"""How many triples of a large matrix are computed first where a share of the energy is asked."""


@dataclass(frozen=True)
class Layer:
    """How PEFT holds the weight of a layer, or why it cannot."""

    name: str
    kind: str = "linear"
    is_transposed: bool = False
    groups: int = 1
    reason: str = ""


@dataclass(frozen=True)
class ExtractedSite:
    """One site of an extracted adapter."""

    site: str
    shape: tuple[int, int]
    k: int
    kept: float
    """The share of this site's ‖W − W₀‖²_F that is held."""
    residual: float | None
    """Over σ₁, where the triples are iterated; None where the SVD is exact."""


@dataclass
class Extracted:
    """What was extracted, and what an adapter cannot hold."""

    sites: list[ExtractedSite] = field(default_factory=list)
    not_held: dict[str, str] = field(default_factory=dict)
    """Key of a changed weight → why it is not in the adapter."""
    held_energy: float = 0.0
    energy: float = 0.0
    """‖W − W₀‖² over all tensors that both have, vectors too; `held_energy` is what is kept."""


def layers_of_model(model: nn.Module) -> dict[str, Layer]:
    """Key of a weight → its layer, by a model, which may be on the meta device."""
    layers, is_mixture = {}, holds_experts(model)
    for site in candidate_sites(model):
        module = model.get_submodule(site.layer)
        is_transposed = site.kind == "embedding" or TransposedLinearAdapter.fits(module)
        reason = ""
        if site.kind == "weight":
            reason = f"PEFT cannot adapt a weight of {type(module).__name__}"
        elif site.kind == "experts":
            reason = "of a mixture's experts no adapter is made"
        elif is_mixture and is_renamed(site.name):
            reason = "PEFT takes it for experts by its name, in a mixture"
        groups = int(getattr(module, "groups", 1))
        layers[site.key] = Layer(site.layer, site.kind, is_transposed, groups, reason)
    by_weight: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(parameter), []).append(key)
    for keys in (keys for keys in by_weight.values() if len(keys) > 1):
        reason = f"it is one weight with {', '.join(keys[1:])}, and PEFT would adapt one use of it"
        layers |= {key: Layer(key, reason=reason) for key in keys}
    return layers


def layer_by_name(key: str, shape: tuple[int, ...]) -> Layer:
    """The layer of a weight by its key and shape alone."""
    name = key.removesuffix(".weight")
    if name == key or len(shape) > 5:
        return Layer(key, reason="it is no layer's `weight`")
    if len(shape) > 2:
        return Layer(name, "conv")
    is_embedding = EMBEDDING_NAME.fullmatch(name.rpartition(".")[2]) is not None
    return Layer(name, "embedding" if is_embedding else "linear", is_embedding)


def extract(
    difference: Difference,
    keys: Iterable[str],
    to: Path,
    model: nn.Module | None,
    rank: int | None = None,
    energy: float | None = None,
) -> Extracted:
    """Writes PEFT's folder with W − W₀ of each matrix cut to `rank`, or to the share `energy`.

    One weight is in memory at a time. `model` says what kinds of layers there are; without it
    their names do.
    """
    layers = None if model is None else layers_of_model(model)
    result, tensors = Extracted(), {}
    ranks: dict[str, int] = {}
    is_conv1d = False
    for key, change in difference.deltas(keys):
        total = squared_norm(change)
        result.energy += total
        shape = tuple(change.shape)
        unknown = Layer(key, reason="the model has no such weight")
        layer = layer_by_name(key, shape) if layers is None else layers.get(key, unknown)
        if layer.reason:
            result.not_held[key] = layer.reason
            continue
        matrix = change.T if layer.is_transposed else change.flatten(1)
        try:
            svd, residual = _triples(matrix, total, rank, energy)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        k = len(svd.S)
        A, B = (factor.float() for factor in balanced_factors(svd, k))
        names = tensor_keys(layer.kind)
        for part, tensor in factors_to_peft(A, B, layer.groups, shape[2:]).items():
            tensors[f"{PREFIX}{layer.name}.{names[part]}"] = tensor.contiguous()
        held = svd.S.square().sum().item()
        result.held_energy += held
        is_conv1d |= layer.is_transposed and layer.kind == "linear"
        ranks[layer.name] = k * layer.groups
        matrix_shape = (matrix.shape[0], matrix.shape[1])
        result.sites.append(ExtractedSite(layer.name, matrix_shape, k, held / total, residual))
    result.energy += sum(norm**2 for norm in difference.vectors.values())
    if not result.sites:
        reasons = next(iter(result.not_held.items()), ("no matrix", "all are equal"))
        raise ValueError(f"no matrix changed that an adapter can hold ({': '.join(reasons)})")
    config = {
        "peft_type": "LORA",
        **ranks_and_alphas(ranks, {site: float(r) for site, r in ranks.items()}),
        "lora_dropout": 0.0,
        "target_modules": target_modules(ranks),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": is_conv1d,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": str(difference.before.path),
    }
    to.mkdir(parents=True, exist_ok=True)
    write_peft(to, config, tensors)
    return result


def _triples(
    matrix: Tensor, total: float, rank: int | None, energy: float | None
) -> tuple[SVD, float | None]:
    """The first triples of a matrix: `rank` of them, or those that hold the share `energy`.

    `total` is its squared norm.
    """
    if rank is not None:
        svd, residual = first_triples(matrix, rank)
        return svd.first(rank), residual
    assert energy is not None
    k, most = FIRST_TRIPLES, min(matrix.shape)
    while True:
        # More triples than a quarter cost as much as all.
        svd, residual = first_triples(matrix, k) if 4 * k <= most else (svd_of_matrix(matrix), None)
        held = svd.S.square().cumsum(0)
        if residual is None:
            total = held[-1].item()
        if held[-1] >= energy * total:
            return svd.first(int((held < energy * total).sum()) + 1), residual
        k *= 2
