"""ΔW of all kinds of sites: its spectrum, its SVD, and weights with ΔW cut to lower ranks.

Truth: dense products and SVDs in float64; an adapted model against a fully fine-tuned one.

Run: make test ARGS=tests/analysis/test_updates.py
"""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from lora_lab import adapters
from lora_lab.adapters import Target
from lora_lab.analysis.updates import Updates
from tests.adapters.cases import CASES, Case, changed_weights, every_case, move
from tests.all_layer_kinds import AllLayerKinds

SEEN = 1e-6
"""A share of the first singular value; those above it must be right in relative terms."""


def updates(model: nn.Module) -> Updates:
    base = {k: v.clone() for k, v in adapters.base_state_dict(model).items()}
    names = adapters.attached(model)
    sites = [s for s in adapters.find_sites(model, {"all": Target(tied=True)}) if s.name in names]
    return Updates(model, base, sites)


def orient(case: Case, delta: torch.Tensor) -> torch.Tensor:
    """The matrix of a weight: flattened, out first; an embedding's features are its out.

    Of experts their matrices.
    """
    names = ("gpt2-conv1d", "experts-gathered")
    turned = case.layer.kind == "embedding" or case.layer.name in names
    if case.layer.kind == "experts":
        return delta.mT if turned else delta
    return delta.T if turned else delta.flatten(1)


@every_case
def test_every_singular_value_is_the_dense_products(case: Case):
    model = case.build()
    changes, deltas = updates(model), adapters.deltas(model)
    for site, spectra in changes.spectra_by_site().items():
        dense = orient(case, deltas[site].detach())
        matrices = dense if case.layer.kind == "experts" else [dense]
        for spectrum, matrix in zip(spectra, matrices, strict=True):
            expected = torch.linalg.svdvals(matrix)
            got = spectrum.singular_values[: len(expected)]
            seen = expected[: len(got)] > SEEN * expected[0]
            torch.testing.assert_close(got[seen], expected[: len(got)][seen], rtol=1e-5, atol=0)
            assert spectrum.shape == matrix.shape
        svd = changes.svd(site)
        torch.testing.assert_close(svd.cut(svd.k), dense, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(changes.delta_matrix(site), dense, rtol=1e-12, atol=1e-12)


@every_case
def test_cut_gives_the_model_with_the_best_approximation(case: Case):
    model, x = case.build(), case.inputs()
    before = copy.deepcopy(model.state_dict())
    y, changes = model(*x), updates(model)
    svds = {site: changes.svd(site) for site in changes.sites}
    uncut = {site: changes.delta_matrix(site) for site in svds}
    with changes.cut_weights(svds) as cut:
        cut({site: svd.k for site, svd in svds.items()})
        torch.testing.assert_close(model(*x), y, rtol=1e-9, atol=1e-9)
        cut(dict.fromkeys(svds, 0))
        torch.testing.assert_close(model(*x), case.plain()(*x), rtol=0, atol=0)
        cut(dict.fromkeys(svds, 1))
        for site in svds:
            W = changes.as_matrix(site, model.get_parameter(changes.sites[site].key))
            change = W.detach() - changes.base_matrix(site)
            U, S, Vh = torch.linalg.svd(uncut[site], full_matrices=False)
            best = (U[..., :1] * S[..., None, :1]) @ Vh[..., :1, :]
            torch.testing.assert_close(change, best, rtol=1e-7, atol=1e-9)
    assert torch.equal(model(*x), y)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_full_fine_tuning_is_measured_as_adapters_are():
    torch.manual_seed(0)
    adapted = AllLayerKinds(12, 9).double()
    base = {key: value.clone() for key, value in adapted.state_dict().items()}
    sites = adapters.attach(adapted, "all", r=2, alpha=2)
    move(adapted)
    tuned = adapters.merged(adapted)
    one, other = Updates(adapted, base, sites), Updates(tuned, base, sites)
    values: Mapping[tuple[str, int], torch.Tensor] = {
        (site, i): spectrum.singular_values
        for site, spectra in other.spectra_by_site().items()
        for i, spectrum in enumerate(spectra)
    }
    assert {site for site, _ in values} == {site.name for site in sites}
    for site, spectra in one.spectra_by_site().items():
        for i, spectrum in enumerate(spectra):
            assert spectrum.shape == other.spectra_by_site()[site][i].shape
            expected = values[site, i][: len(spectrum.singular_values)]
            torch.testing.assert_close(spectrum.singular_values, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.delta_matrix(site), other.delta_matrix(site))


def test_the_layers_changed_are_the_reference_of_the_table():
    """`changed_weights`, written out block by block, is what `cut` at full rank puts in."""
    case = next(case for case in CASES if case.layer.name == "lstm" and case.variant == "lora")
    model = case.build()
    expected = changed_weights(model, adapters.deltas(model))
    changes = updates(model)
    svds = {site: changes.svd(site) for site in changes.sites}
    with changes.cut_weights(svds) as cut:
        cut(dict.fromkeys(svds, 2))
        for name, weight in expected.items():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-9, atol=1e-9)


@every_case
def test_before_the_first_step_there_is_no_update(case: Case):
    """Also where ΔW is a difference of products that start from the weight."""
    by_site = updates(case.build(trained=False)).spectra_by_site()
    for spectrum in (spectrum for spectra in by_site.values() for spectrum in spectra):
        assert set(spectrum.measures().values()) == {0.0} or case.how.get("dora")
        assert spectrum.frobenius < 1e-12


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_no_number_is_named(factor: str):
    model = CASES[0].build()
    (adapter,) = adapters.attached(model).values()
    getattr(adapter, factor).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"{factor} of site \(\d+ × \d+\) holds NaN"):
        updates(model).spectra_by_site()
