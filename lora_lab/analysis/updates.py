"""ΔW of a model in training, site by site: adapted, or fully fine-tuned as W − W₀."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lab import adapters
from lora_lab.adapters import Adapter, Site, adapter_class
from lora_lab.analysis import spectra
from lora_lab.analysis.spectra import SVD, Spectrum


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Updates:
    """What changed at each of `sites` of `model`, whose weights were `base` before."""

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], sites: Sequence[Site]):
        self.model, self.base_weights = model, base
        self.sites = {site.name: site for site in sites}
        self.adapters_by_site = adapters.attached(model)

    def base_matrix(self, site: str) -> Tensor:
        """W₀ of a site as a matrix."""
        return self.as_matrix(site, self.base_weights[self.sites[site].key])

    def delta_matrix(self, site: str) -> Tensor:
        """ΔW of a site as a matrix."""
        where = self.sites[site]
        if adapter := self.adapters_by_site.get(site):
            layer = self.model.get_submodule(where.layer)
            return adapter.weight_to_matrix(adapter.delta(adapter.weight_of(layer))).detach()
        weight = full_tensor(self.model.get_parameter(where.key).detach())
        change = weight.double() - self.base_weights[where.key].to(weight.device)
        return self.as_matrix(site, change.to(torch.promote_types(weight.dtype, torch.float32)))

    def spectra_by_site(self) -> dict[str, Spectrum]:
        """The singular values at every site: from the factors, where ΔW is their product."""
        products = {
            site: (full_tensor(A), full_tensor(B), adapter.scale)
            for site, adapter in self.adapters_by_site.items()
            if self.is_product(site)
            for A, B in [adapter.factors()]
        }
        of_products = spectra.spectra_of_sites(products)
        return {
            site: of_products.get(site) or spectra.spectrum_of_matrix(self.delta_matrix(site))
            for site in self.sites
        }

    def is_product(self, site: str) -> bool:
        """Whether ΔW is scale · B A: not DoRA's, nor that of full fine-tuning."""
        adapter = self.adapters_by_site.get(site)
        return adapter is not None and adapter.magnitude is None

    def svd(self, site: str) -> SVD:
        """The singular values and directions of a site's ΔW."""
        if not self.is_product(site):
            return spectra.svd_of_matrix(self.delta_matrix(site))
        adapter = self.adapters_by_site[site]
        return spectra.svd_of_factors(*adapter.factors(), adapter.scale)

    @contextmanager
    def cut_weights(self, svds: Mapping[str, SVD]) -> Iterator[Callable[[Mapping[str, int]], None]]:
        """Within it, a call with ranks by site makes each site's weight W₀ + ΔW cut to its rank.

        ΔW's best approximation is added to W₀ in float64; `svds` holds every site's SVD, other
        weights stay trained. After it the model is what it was, bit for bit.
        """
        kept = {site: self._weight(site).detach().clone() for site in self.sites}
        now: dict[str, int] = {}

        def cut(ranks: Mapping[str, int]) -> None:
            for site in svds:
                if now.get(site) != ranks[site]:
                    part = self._part(site, self._weight(site))
                    W = self.base_matrix(site).to(svds[site].S) + svds[site].cut(ranks[site])
                    part.copy_(self._kind(site).matrix_to_weight(W, part.shape))
                    now[site] = ranks[site]

        with torch.no_grad(), adapters.disabled(self.model):
            try:
                yield cut
            finally:
                for site, weight in kept.items():
                    self._weight(site).copy_(weight)

    def _weight(self, site: str) -> Tensor:
        """The parameter that a site is part of, in the model."""
        weight = self.model.get_submodule(self.sites[site].layer)._parameters
        found = weight[self.sites[site].parameter]
        assert found is not None
        return found

    def _part(self, site: str, weight: Tensor) -> Tensor:
        """A parameter's rows that are the site's."""
        rows = self.sites[site].rows
        return weight if rows is None else weight[slice(*rows)]

    def _kind(self, site: str) -> type[Adapter]:
        return adapter_class(self.model.get_submodule(self.sites[site].layer))

    def as_matrix(self, site: str, weight: Tensor) -> Tensor:
        """What a site has of something in its parameter's shape, as a matrix."""
        return self._kind(site).weight_to_matrix(self._part(site, weight))
