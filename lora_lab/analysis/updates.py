"""ΔW of a model at each site, whether it is adapted or fully fine-tuned (ΔW = W − W₀)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lab.adapters import Adapter, Site, adapter_class, attached, disabled
from lora_lab.adapters.memory import full_tensor
from lora_lab.adapters.quantized import dense_weight, is_quantized
from lora_lab.analysis import spectra
from lora_lab.analysis.spectra import SVD, Factors, Spectrum


def split(site: Site, matrices: Tensor) -> Sequence[Tensor]:
    """What belongs to a site's matrices, one for each: of experts (E, …) along the first dimension.

    In the order of `site.matrices`.
    """
    return [matrices] if site.matrices == (site.name,) else matrices.unbind()


class Updates:
    """Reads ΔW at each site of a model, in training or after it.

    `model` is the trained model and `sites` the places whose ΔW is wanted. `base` holds its weights
    before training, W₀, by the key of the parameter; with adapters these may be the model's own.
    "As a matrix" is out × rest, as in `weight.flatten(1)`; of experts it is E × out × in.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], sites: Sequence[Site]):
        self.model, self.base_weights = model, base
        self.adapters_by_site = attached(model)
        self.sites = {site.name: self._as_adapted(site) for site in sites}

    @property
    def experts(self) -> list[str]:
        """The names of the sites that are experts, with a matrix for each."""
        return [name for name, site in self.sites.items() if site.matrices != (name,)]

    def base_matrix(self, site: str) -> Tensor:
        """W₀ of a site as a matrix; of a quantized weight, what it stands for."""
        layer, parameter = self._layer(site), self.sites[site].parameter
        if is_quantized(layer, parameter):  # adapters leave it as it is
            return self.as_matrix(site, dense_weight(layer, parameter))
        return self.as_matrix(site, self.base_weights[self.sites[site].key])

    def delta_matrix(self, site: str) -> Tensor:
        """ΔW of a site as a matrix."""
        if adapter := self.adapters_by_site.get(site):
            weight = adapter.weight_of(self._layer(site))
            return adapter.weight_to_matrix(adapter.delta(weight)).detach()
        key = self.sites[site].key
        weight = full_tensor(self.model.get_parameter(key).detach())
        change = weight.double() - self.base_weights[key].to(weight.device)
        return self.as_matrix(site, change.to(torch.promote_types(weight.dtype, torch.float32)))

    @torch.no_grad()
    def spectra_by_site(self) -> dict[str, list[Spectrum]]:
        """The spectra of each site's matrices, from the factors alone where ΔW is their product."""
        products: dict[str, Factors] = {}
        for name, adapter in self.adapters_by_site.items():
            if self.is_product(name):
                site = self.sites[name]
                A, B = adapter.factors()
                pairs = zip(site.matrices, split(site, A), split(site, B), strict=True)
                products |= {matrix: (a, b, adapter.scale) for matrix, a, b in pairs}
        of_products = spectra.spectra_of_sites(products)
        return {
            name: [of_products[matrix] for matrix in site.matrices]
            if self.is_product(name)
            else [spectra.spectrum_of_matrix(m) for m in split(site, self.delta_matrix(name))]
            for name, site in self.sites.items()
        }

    def is_product(self, site: str) -> bool:
        """Whether ΔW is scale · B A. It is not for DoRA, nor for full fine-tuning."""
        adapter = self.adapters_by_site.get(site)
        return adapter is not None and adapter.magnitude is None

    def svd(self, site: str) -> SVD:
        """The thin SVD of a site's ΔW as a matrix; of experts, that of each of their matrices."""
        if not self.is_product(site):
            return spectra.svd_of_matrix(self.delta_matrix(site))
        adapter = self.adapters_by_site[site]
        return spectra.svd_of_factors(*adapter.factors(), adapter.scale)

    @contextmanager
    def cut_weights(self, svds: Mapping[str, SVD]) -> Iterator[Callable[[Mapping[str, int]], None]]:
        """Context in which the weights of the model can be set to W₀ + ΔW cut to lower ranks.

        It yields a function of ranks by site, which writes W₀ plus the best approximation of ΔW of
        that rank into the weight of each site. The sum is in float64. `svds` holds the SVD of ΔW at
        each site; weights that are no site stay as trained. On leaving, the model is restored bit
        for bit. Where the weight is quantized, it stays as it is, and the layer's output gets the
        cut ΔW.
        """
        quantized = {
            name: _CutOutput(self._layer(name))
            for name, site in self.sites.items()
            if is_quantized(self._layer(name), site.parameter)
        }
        written = [site for site in self.sites if site not in quantized]
        trained = {site: self._weight(site).detach().clone() for site in written}
        current_ranks: dict[str, int] = {}

        def base(site: str) -> Tensor:
            # An adapted layer holds W₀ itself, and `base_weights` may be that very tensor, which is
            # written to below: the copy is W₀.
            has_adapter = site in self.adapters_by_site
            return self.as_matrix(site, trained[site]) if has_adapter else self.base_matrix(site)

        def cut_to(ranks: Mapping[str, int]) -> None:
            for site in svds:
                if current_ranks.get(site) == ranks[site]:
                    continue
                current_ranks[site] = ranks[site]
                if site in quantized:
                    quantized[site].svd = svds[site].first(ranks[site])
                else:
                    target = self._site_rows(site, self._weight(site))
                    W = base(site).to(svds[site].S) + svds[site].cut(ranks[site])
                    target.copy_(self._adapter_class(site).matrix_to_weight(W, target.shape))

        with torch.no_grad(), disabled(self.model, also_trained=False):
            try:
                yield cut_to
            finally:
                for site, weight in trained.items():
                    self._weight(site).copy_(weight)
                for output in quantized.values():
                    output.hook.remove()

    def _weight(self, site: str) -> Tensor:
        """The full parameter of the model that holds the site's weight."""
        # Read from `_parameters`: reading the attribute of an adapted layer can give W + ΔW.
        parameters = self._layer(site)._parameters
        weight = parameters[self.sites[site].parameter]
        assert weight is not None
        return weight

    def _site_rows(self, site: str, weight: Tensor) -> Tensor:
        """The rows of a parameter that belong to the site, as q of a fused qkv; a view."""
        return self._adapter_class(site).block_of(weight, self.sites[site].rows)

    def _as_adapted(self, site: Site) -> Site:
        """The site; where experts have an adapter that takes them for one matrix, as that.

        Versions before this one stored such.
        """
        adapter = self.adapters_by_site.get(site.name)
        if adapter is None or adapter.kind == site.kind:
            return site
        return replace(site, kind=adapter.kind, experts=1)

    def _adapter_class(self, site: str) -> type[Adapter]:
        if adapter := self.adapters_by_site.get(site):
            return type(adapter)
        return adapter_class(self._layer(site), self.sites[site].parameter)

    def _layer(self, site: str) -> nn.Module:
        return self.model.get_submodule(self.sites[site].layer)

    def as_matrix(self, site: str, weight: Tensor) -> Tensor:
        """The site's rows of a tensor that has its parameter's shape, as a matrix (out × rest)."""
        return self._adapter_class(site).weight_to_matrix(self._site_rows(site, weight))


class _CutOutput:
    """Adds U diag(S) Vh x of an SVD to the output of a linear layer, until `hook` is removed."""

    def __init__(self, layer: nn.Module):
        self.svd: SVD | None = None
        self.hook = layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self.svd is None:
            return None
        x = args[0].to(self.svd.S) @ self.svd.Vh.mT  # (*batch, k)
        return output + ((x * self.svd.S) @ self.svd.U.mT).to(output.dtype)
