"""An adapter of a full fine-tune: the best low-rank approximation of W − W₀ of each matrix."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import FORMAT, describe, write_folder
from lora_lab.adapters.inject import place_adapters
from lora_lab.adapters.peft import save_peft
from lora_lab.adapters.peft_parameters import holds_experts
from lora_lab.adapters.peft_reasons import reason_not_in_peft
from lora_lab.adapters.recipe import Recipe
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.weights_hash import weights_hash
from lora_lab.analysis.cut import balanced_factors
from lora_lab.analysis.layers import UnknownModule, matrices, sites_by_key
from lora_lab.analysis.leading_svd import first_triples, squared_norm
from lora_lab.analysis.spectra import SVD, svd_of_matrix
from lora_lab.analysis.stored_spectra import Difference

Format = Literal["peft", "lora_lab"]

FIRST_TRIPLES = 64
"""How many triples of a large matrix are computed first where a share of the energy is asked."""


@dataclass(frozen=True)
class ExtractedSite:
    """One site of an extracted adapter."""

    site: Site
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
    held_by_ours: list[str] = field(default_factory=list)
    """Those of `not_held` that PEFT's format cannot hold, and ours can."""
    tied: dict[str, str] = field(default_factory=dict)
    """Key of a weight that is another one, which both files have twice → the key of that."""
    held_energy: float = 0.0
    energy: float = 0.0
    """‖W − W₀‖² over all tensors that both have, vectors too; `held_energy` is what is kept."""


class BaseState(Mapping[str, Tensor]):
    """The state dict that a model has with the weights of a checkpoint, read tensor by tensor.

    A key that the checkpoint lacks is read by another key of the same tied weight. Raises
    ValueError where it has none of them.
    """

    def __init__(self, model: nn.Module, checkpoint: Any):
        self.checkpoint, self.keys_in_file = checkpoint, {}
        state = model.state_dict(keep_vars=True)
        by_weight: dict[int, str] = {}
        for key in (key for key in state if key in checkpoint.files):
            by_weight.setdefault(id(state[key]), key)
        for key, weight in state.items():
            if key not in checkpoint.files and id(weight) not in by_weight:
                raise ValueError(
                    f"--format lora_lab: {checkpoint.path} lacks '{key}', which its model has, and "
                    "our folders belong to exactly one base; --format peft needs no such thing"
                )
            self.keys_in_file[key] = key if key in checkpoint.files else by_weight[id(weight)]

    def __getitem__(self, key: str) -> Tensor:
        return self.checkpoint.tensor(self.keys_in_file[key])

    def __iter__(self):
        return iter(self.keys_in_file)

    def __len__(self) -> int:
        return len(self.keys_in_file)


def extract(
    difference: Difference,
    keys: Iterable[str],
    to: Path,
    model: nn.Module,
    format: Format = "peft",
    rank: int | None = None,
    energy: float | None = None,
) -> Extracted:
    """Writes a folder with W − W₀ of each matrix cut to `rank`, or to the share `energy`.

    A rank over that of a weight is the weight's. Experts have an adapter of one rank for each of
    their matrices. One weight is in memory at a time. `model` is on the meta device, and says what
    kinds of layers there are: see `layers`. `format` is PEFT's, or ours, which belongs to the
    weights of the first checkpoint. Raises ValueError where no change can be held.
    """
    base = BaseState(model, difference.before) if format == "lora_lab" else None
    by_key, is_mixture = sites_by_key(model), holds_experts(model)
    result, adapters = Extracted(), {}
    result.tied = _tied(difference, by_key)
    for key, change in difference.deltas(key for key in keys if key not in result.tied):
        result.energy += squared_norm(change)
        if key not in by_key:
            result.not_held[key] = "the model has no such weight"
        for site in by_key.get(key, ()):
            reason = _reason_not_held(model, site, format, is_mixture)
            if reason is not None:
                result.not_held[key] = reason
                if _reason_not_held(model, site, "lora_lab", is_mixture) is None:
                    result.held_by_ours.append(key)
                continue
            total = sum(map(squared_norm, matrices(model, site, change)))
            if total == 0:  # a block of rows in which nothing changed
                continue
            padding = getattr(model.get_submodule(site.layer), "padding_idx", None)
            if padding is not None and change[padding].any():
                change[padding] = 0  # an adapter leaves the vector of a padding token as it is
                result.not_held[key] = f"of the padding token {padding} alone, whose vector stays"
                if not change.any():
                    continue
            try:
                members = matrices(model, site, change)
                A, B, held, residual = _factors(members, rank, energy)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
            adapters[site] = _adapter(model, site, A, B)
            result.held_energy += held
            result.sites.append(ExtractedSite(site, A.shape[-2], held / total, residual))
    result.energy += sum(norm**2 for norm in difference.vectors.values())
    if not adapters:
        reasons = next(iter(result.not_held.items()), ("no matrix", "all are equal"))
        raise ValueError(f"no matrix changed that an adapter can hold ({': '.join(reasons)})")
    if base is None:
        place_adapters(model, adapters, "default")
        save_peft(model, to, base_model=difference.before.path)
    else:
        sites, tensors = describe({site.name: adapter for site, adapter in adapters.items()})
        about = {"format": FORMAT, "base": weights_hash(base), "sites": sites}
        write_folder(to, about, tensors)
    return result


def _tied(difference: Difference, by_key: Mapping[str, list[Site]]) -> dict[str, str]:
    """Keys that are to be left out, since their weight is that of another key in both files."""
    tied: dict[str, str] = {}
    first_key: dict[str, str] = {}
    shared = set(difference.shared)
    for key in sorted(shared):
        if not (sites := by_key.get(key)) or not sites[0].tied_to:
            continue
        name = sites[0].key
        first = first_key.setdefault(name, name if name in shared else key)
        if first == key:
            continue
        for checkpoint in (difference.before, difference.after):
            if not torch.equal(checkpoint.tensor(first), checkpoint.tensor(key)):
                raise ValueError(
                    f"{first} and {key} are one weight in the model, and two in {checkpoint.path}: "
                    "its config.json must say so, as by tie_word_embeddings=false"
                )
        tied[key] = first
    return tied


def _reason_not_held(model: nn.Module, site: Site, format: Format, is_mixture: bool) -> str | None:
    """Why an adapter of this format cannot hold the change of a weight; None where it can."""
    layer = model.get_submodule(site.layer)
    if reason := adapter_class(layer, site.parameter).reason_not_adaptable(layer):
        return reason
    if format == "peft" and site.kind == "weight" and isinstance(layer, UnknownModule):
        return "its name does not tell what layer it is of"
    if format == "peft":
        return reason_not_in_peft(model, site, is_mixture)
    if site.tied_to and site.rows is not None:
        return f"it is a block of a weight that is tied to {', '.join(site.tied_to)}"
    return None


def _adapter(model: nn.Module, site: Site, A: Tensor, B: Tensor) -> Adapter:
    """The adapter of a site with these factors, and a scale of 1."""
    layer, k = model.get_submodule(site.layer), A.shape[-2]
    adapter = adapter_class(layer, site.parameter)(
        layer, site.parameter, site.rows, Recipe(k, float(k))
    )
    return adapter.fill({"A": A, "B": B})


def _factors(
    members: list[Tensor], rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, float, float | None]:
    """A, B, the ‖·‖²_F that they hold, and the largest residual of the matrices of a site.

    Those of a single matrix are (k, rest) and (out, k), those of E experts (E, k, rest) and (E,
    out, k): at `energy` k is the largest that one of them needs.
    """
    triples: list[tuple[SVD, float | None]] = []
    if energy is not None:
        triples = [_triples_of_share(matrix, energy) for matrix in members]
        rank = max(len(svd.S) for svd, _ in triples)
    assert rank is not None
    if len(members) > 1 or not triples:
        triples = [first_triples(matrix, rank) for matrix in members]
    svds = [svd.first(rank) for svd, _ in triples]
    factors = [
        _with_zeros(matrix, *balanced_factors(svd, len(svd.S)))
        for matrix, svd in zip(members, svds, strict=True)
    ]
    A, B = (torch.stack(parts).to(members[0].dtype) for parts in zip(*factors, strict=True))
    held = sum(svd.S.square().sum().item() for svd in svds)
    residual = max((one for _, one in triples if one is not None), default=None)
    return (A[0], B[0], held, residual) if len(members) == 1 else (A, B, held, residual)


def _with_zeros(matrix: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with zeros where the matrix has none but zeros, which rounding has filled."""
    zero = matrix == 0
    return A.masked_fill(zero.all(0), 0), B.masked_fill(zero.all(1)[:, None], 0)


def _triples_of_share(matrix: Tensor, energy: float) -> tuple[SVD, float | None]:
    """The first triples of a matrix that hold the share `energy` of its squared norm."""
    k, most, total = FIRST_TRIPLES, min(matrix.shape), squared_norm(matrix)
    while True:
        # More triples than a quarter cost as much as all.
        svd, residual = first_triples(matrix, k) if 4 * k <= most else (svd_of_matrix(matrix), None)
        held = svd.S.square().cumsum(0)
        if residual is None:
            total = held[-1].item()
        if held[-1] >= energy * total:
            return svd.first(int((held < energy * total).sum()) + 1), residual
        k *= 2
