"""The spectra of updates that lie in files: of stored adapters, and of two checkpoints."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.stored import StoredUpdate
from lora_lab.analysis import spectra
from lora_lab.analysis.directions import is_intruder
from lora_lab.analysis.layers import model_of_names, sites_by_key
from lora_lab.analysis.leading_svd import first_triples, left_vectors, squared_norm
from lora_lab.analysis.spectra import INTRUDERS_AMONG, SVD, TRIPLES, Spectrum
from lora_lab.report.update_report import SiteSpectrum

Measured = tuple[SiteSpectrum, SVD]
"""A site's spectrum, and at least the first TRIPLES triples of its ΔW, or all that there are."""


def measure_adapter(
    updates: Mapping[str, StoredUpdate], base: Checkpoint | None = None
) -> Iterator[Measured]:
    """Measures ΔW of each site of an adapter, from the factors.

    With `base` also how ΔW relates to W (Hu et al. 2021, section 7.3), and how many of the first
    left singular vectors of W + ΔW are intruders (Shuttleworth et al. 2024). ΔW of a site with a
    DoRA magnitude is then that with the magnitude. Raises ValueError with the site's name.
    """
    for site, update in updates.items():
        try:
            W = base.matrix(site, update) if base else None
            yield _measure_site(site, update, W, has_base=base is not None)
        except ValueError as error:
            raise ValueError(f"'{site}': {error}") from None


def _measure_site(site: str, update: StoredUpdate, W: Tensor | None, has_base: bool) -> Measured:
    eps = torch.finfo(torch.promote_types(update.A.dtype, torch.float32)).eps
    if update.magnitude is not None and W is not None:
        delta = update.delta(W)
        measures, values, svd, note = measures_of_matrix(delta, eps)
        U, V = left_vectors(delta), left_vectors(delta.mT)
        measures |= _against_base(W.double(), delta, U, V)
    else:
        values, svd = svd_of_update(update, TRIPLES if W is None else None)
        measures = Spectrum(values, update.shape, eps).measures()
        notes = ["no such weight in the base"] * (has_base and W is None)
        notes += ["of s·B·A, without DoRA's magnitude"] * (update.magnitude is not None)
        note = "; ".join(notes)
        if W is not None:
            directions = svd.above_rounding()
            U, V = directions.U, directions.Vh.mT
            measures |= _against_base(W.double(), update.product(), U, V)
    return SiteSpectrum(site, update.shape, update.r, values.numpy(), measures, note), svd


def svd_of_update(update: StoredUpdate, count: int | None = None) -> tuple[Tensor, SVD]:
    """All singular values of a stored ΔW without its magnitude, and its first triples, or all."""
    svd = spectra.svd_of_factors(update.A, update.B, update.scale)
    if update.outer is None:
        return svd.S, svd.first(len(svd.S) if count is None else count)
    # The triples of C ⊗ M are the products of each triple of C with each of M. With C (2 × 2) of
    # rank 2 and M of rank 3 these are 6, and the largest is (σ₁ of C) · (σ₁ of M).
    outer = spectra.svd_of_matrix(update.outer)
    values, order = (outer.S[:, None] * svd.S).flatten().sort(descending=True)
    i, j = order[:count] // len(svd.S), order[:count] % len(svd.S)
    U = (outer.U[:, None, i] * svd.U[None, :, j]).flatten(0, 1)  # (out₁ · out₂, k)
    V = (outer.Vh.T[:, None, i] * svd.Vh.T[None, :, j]).flatten(0, 1)
    return values, SVD(U, values[:count], V.T)


def measures_of_matrix(delta: Tensor, eps: float) -> tuple[dict[str, float], Tensor, SVD, str]:
    """The measures of a dense ΔW, its singular values, its first triples, and how exact these are.

    Of a large one only the first TRIPLES singular values are known, and what follows from them.
    `eps` is the machine epsilon of the numbers that ΔW was computed from.
    """
    shape = (delta.shape[0], delta.shape[1])
    svd, residual = first_triples(delta, TRIPLES)
    if residual is None:
        return Spectrum(svd.S, shape, eps).measures(), svd.S, svd, ""
    total = squared_norm(delta)
    measures = {"frobenius": total**0.5, "sigma_1": svd.S[0].item()}
    measures["stable_rank"] = total / measures["sigma_1"] ** 2 if total else 0.0
    energy = svd.S.square().cumsum(0)
    for name, share in (("energy_90", 0.90), ("energy_99", 0.99)):
        if energy[-1] >= share * total:
            measures[name] = float((energy < share * total).sum() + 1)
    return measures, svd.S, svd, f"first {len(svd.S)} σ, each within {residual:.0e} σ₁"


def _against_base(W: Tensor, delta: Tensor, U: Tensor, V: Tensor) -> dict[str, float]:
    """The measures of ΔW that need W; U and V are all left and right directions of ΔW.

    ‖ΔW‖/‖W‖, and the amplification ‖ΔW‖ / ‖Uᵀ W V‖ (Hu et al. 2021, section 7.3).
    """
    adapted = first_triples(W + delta, INTRUDERS_AMONG)[0].above_rounding().first(INTRUDERS_AMONG)
    measures = {"intruders": float(is_intruder(left_vectors(W), adapted.U).sum())}
    norm = torch.linalg.matrix_norm(delta)
    for name, norm_of_W in (
        ("relative", torch.linalg.matrix_norm(W)),
        ("amplification", torch.linalg.matrix_norm(U.mT @ W @ V)),
    ):
        if norm_of_W > 0:
            measures[name] = (norm / norm_of_W).item()
    return measures


@dataclass
class Difference:
    """What differs between two checkpoints, read tensor by tensor.

    `changed` are the keys of weights of two or more dimensions that may differ; the other lists
    are filled as `matrices` goes through the files.
    """

    before: Checkpoint
    after: Checkpoint
    equal: list[str] = field(default_factory=list)
    vectors: dict[str, float] = field(default_factory=dict)
    """Key of a changed tensor of fewer than two dimensions → the norm of its change."""
    other_shapes: list[str] = field(default_factory=list)
    not_numbers: list[str] = field(default_factory=list)

    @property
    def shared(self) -> list[str]:
        """The keys that both have, in the order of the first."""
        return [key for key in self.before.files if key in self.after.files]

    @property
    def only_before(self) -> list[str]:
        """The keys that the second lacks."""
        return [key for key in self.before.files if key not in self.after.files]

    @property
    def only_after(self) -> list[str]:
        """The keys that the first lacks."""
        return [key for key in self.after.files if key not in self.before.files]

    def deltas(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Key → W − W₀ of each changed weight of two or more dimensions, in its shape.

        In float32, or float64 where a weight is: exact enough that equal entries are zero.
        """
        for key in keys:
            old_shape, new_shape = self.before.shapes[key], self.after.shapes[key]
            if old_shape != new_shape:
                self.other_shapes.append(f"{key} {old_shape} → {new_shape}")
                continue
            old, new = self.before.tensor(key), self.after.tensor(key)
            if torch.equal(old, new):
                self.equal.append(key)
                continue
            if not (old.is_floating_point() and new.is_floating_point()):
                self.not_numbers.append(key)
                continue
            dtype = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
            change = new.to(dtype).sub_(old)
            del old, new  # one of the largest weights is in memory at a time, not three
            if not change.any():  # the same numbers in another dtype
                self.equal.append(key)
            elif change.dim() < 2:
                self.vectors[key] = torch.linalg.vector_norm(change.double()).item()
            else:
                yield key, change

    def lines(self) -> list[str]:
        """What is not among the matrices, a line for each kind."""
        listed = {
            "only in the first": self.only_before,
            "only in the second": self.only_after,
            "of other shapes": self.other_shapes,
            "no floating-point numbers, and changed": self.not_numbers,
            "of one dimension, with the norm of their change": [
                f"{key} {norm:.4g}" for key, norm in self.vectors.items()
            ],
        }
        lines = [f"equal tensors, left out: {len(self.equal)}"]
        return lines + [f"{title}: {shortened(keys)}" for title, keys in listed.items() if keys]


def shortened(names: list[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def measure_difference(difference: Difference, keys: Iterable[str]) -> Iterator[Measured]:
    """Measures W − W₀ of each weight of two or more dimensions that differs.

    Experts that are held as one parameter are measured one by one, as `<key>.<expert>`: see
    `layers.model_of_names`.
    """
    sites = sites_by_key(model_of_names(difference.before.shapes))
    kinds = {key: of_key[0].kind for key, of_key in sites.items()}
    for key, change in difference.deltas(keys):
        is_of_experts = kinds.get(key) == "experts"
        for expert, matrix in enumerate(change if is_of_experts else [change.flatten(1)]):
            name = f"{key}.{expert}" if is_of_experts else key
            try:
                eps = torch.finfo(matrix.dtype).eps
                measures, values, svd, note = measures_of_matrix(matrix, eps)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            shape = (matrix.shape[0], matrix.shape[1])
            yield SiteSpectrum(name, shape, None, values.numpy(), measures, note), svd
