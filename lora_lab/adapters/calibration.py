"""Drawing adapters, and what some inits read of data for it: inputs of layers, and gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.adapters import quantized, slots
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.data_inits import DataError, InputMoments
from lora_lab.adapters.init import INITS
from lora_lab.adapters.model_call import logits
from lora_lab.adapters.quantized import is_quantized
from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.sites import Site, adapter_class
from lora_lab.adapters.target_messages import in_one
from lora_lab.seeding import generator

MAX_NUMBERS = 2**28
"""Numbers that are held at a time. Sites are taken in groups, each with a pass over the batches."""

Statistic = InputMoments | Tensor
"""What an init reads of a site: its inputs' moments, or its gradient in the weight's shape."""


@dataclass(frozen=True)
class Calibration:
    """The batches that inits are computed from.

    A batch is what the model is called with (a tensor, or a dict of tensors by argument name), or
    anything that `loss(model, batch)` takes, which calls the model and gives a number. Over batches
    of several sizes the losses should be sums.
    """

    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def run(self, model: nn.Module, batch: Any) -> Tensor:
        """Calls the model with one batch; the result is the loss, if there is one."""
        return logits(model, batch) if self.loss is None else self.loss(model, batch)


def draw_adapters(
    model: nn.Module, sites: Sequence[Site], calibration: Calibration | None, seed: int
) -> dict[Site, Adapter]:
    """The adapters of all sites with their first values, by generators of (seed, site, r).

    Raises AdapterError that names all sites whose init cannot start from the data.
    """
    adapters = {site: adapter_without_values(model, site) for site in sites}
    errors: list[tuple[Site, str]] = []
    for site, data in _statistics(model, adapters, calibration):
        layer, adapter = model.get_submodule(site.layer), adapters[site]
        is_shared = adapter.form is not None and adapter.form.is_shared
        stream = adapter.recipe.form if is_shared else site.name
        rng = generator(seed, stream, adapter.r)
        try:
            adapter.draw(layer, rng, data)
        except DataError as error:
            errors.append((site, f"'{site.name}': {error}"))
    if errors:
        raise AdapterError(in_one(errors))
    return adapters


def adapter_without_values(model: nn.Module, site: Site) -> Adapter:
    """The adapter of a site before it has tensors."""
    assert site.recipe is not None
    layer = model.get_submodule(site.layer)
    kind = adapter_class(layer, site.parameter)
    return kind(layer, site.parameter, site.rows, site.recipe)


def _statistics(
    model: nn.Module, adapters: Mapping[Site, Adapter], calibration: Calibration | None
) -> Iterator[tuple[Site, Statistic | None]]:
    """Each site, and what its init reads of the data: None for inits that read none."""
    for reads in (None, "inputs", "gradient"):
        chosen = {s: a for s, a in adapters.items() if INITS[a.recipe.init].reads == reads}
        if reads is None:
            yield from ((site, None) for site in chosen)
        elif chosen:
            yield from statistics(model, chosen, calibration, reads)


def statistics(
    model: nn.Module,
    adapters: Mapping[Site, Adapter],
    calibration: Calibration | None,
    reads: Literal["inputs", "gradient"],
) -> Iterator[tuple[Site, Any]]:
    """Each site, and the moments of its inputs (InputMoments) or its gradient.

    The model is the base: other adapters on it are off, and it is in eval mode. Raises AdapterError
    where there are no batches, or no loss, for what has to be read, and with all sites that the
    model has not used on them.
    """
    read, sites = _moments if reads == "inputs" else _gradients, [*adapters]
    calibration = _checked(calibration, reads, adapters[sites[0]].recipe.init)
    with _evaluated(model):
        for group in _groups(sites, reads):
            chosen = {site: adapters[site] for site in group}
            yield from _used(read(model, chosen, calibration)).items()


def _checked(calibration: Calibration | None, reads: str, init: str) -> Calibration:
    if calibration is None or not len(calibration.batches):
        raise AdapterError(f"init={init} reads data: calibration must have batches of it")
    if reads == "gradient" and calibration.loss is None:
        raise AdapterError(f"init={init} reads the gradient: calibration must have a loss")
    return calibration


def _groups(sites: Sequence[Site], reads: str) -> Iterator[list[Site]]:
    """The sites in groups for which at most MAX_NUMBERS are held, or of one site."""
    group, numbers = [], 0
    for site in sites:
        out, rest = site.shape
        size = site.experts * rest * (rest if reads == "inputs" else out)
        if group and numbers + size > MAX_NUMBERS:
            yield group
            group, numbers = [], 0
        group, numbers = [*group, site], numbers + size
    yield group


def _used(read: Mapping[Site, Statistic | None]) -> Mapping[Site, Any]:
    """Raises AdapterError where a site was not used."""
    if unused := [site.name for site, statistic in read.items() if statistic is None]:
        raise AdapterError(
            f"the model does not use {', '.join(map(repr, unused))} on the calibration batches, so "
            "there is no data to start from: leave these out of the target, or take another init"
        )
    return read


def _moments(
    model: nn.Module, adapters: Mapping[Site, Adapter], calibration: Calibration
) -> dict[Site, InputMoments | None]:
    """The moments of the inputs of the sites' layers; None where a layer was not called."""
    moments: dict[Site, InputMoments | None] = dict.fromkeys(adapters)
    mask: Tensor | None = None

    def hook_for(site: Site) -> Callable[..., None]:
        def add_rows(layer: Any, args: tuple, kwargs: dict) -> None:
            rows = _rows(site, layer, args[0] if args else next(iter(kwargs.values())), mask)
            if (sums := moments[site]) is None:
                dtype = torch.promote_types(adapters[site].weight_of(layer).dtype, torch.float32)
                zeros = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
                sums = moments[site] = InputMoments(zeros.diag(), zeros)
            sums.add(rows)

        return add_rows

    hooks = [
        model.get_submodule(site.layer).register_forward_pre_hook(hook_for(site), with_kwargs=True)
        for site in adapters
    ]
    try:
        with torch.no_grad():
            for batch in calibration.batches:
                mask = _attention_mask(batch)
                calibration.run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


# The rows that a convolution multiplies its weight's matrix by are its patches. A Conv2d of 4
# channels in 2 groups with 3 × 3 kernels has a matrix with 2 · 9 = 18 columns. With 18 filters that
# each pick one entry, in each group, it gives the patches: (batch, 2 · 18, y, x) → (rows, 18).
def _rows(site: Site, layer: Any, input: Tensor, mask: Tensor | None) -> Tensor:
    """What the layer multiplies its weight's matrix by, as rows (rows, rest)."""
    input = torch.cat(input.unbind()) if input.is_nested else input
    if site.kind == "linear":
        is_of_tokens = mask is not None and input.shape[:-1] == mask.shape
        return input[mask] if is_of_tokens else input.reshape(-1, input.shape[-1])
    weight, groups = layer._parameters["weight"], layer.groups
    rest = site.shape[1]
    pickers = torch.eye(rest, dtype=input.dtype, device=input.device)
    pickers = pickers.view(rest, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
    patches = layer._conv_forward(input, pickers, None)  # (batch, groups · rest, …), or no batch
    patches = patches if patches.dim() == weight.dim() else patches[None]
    return patches.flatten(2).unflatten(1, (groups, rest)).movedim(2, -1).reshape(-1, rest)


def _attention_mask(batch: Any) -> Tensor | None:
    """Which tokens of a batch are no padding, where its inputs say so."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return None if mask is None else mask.bool()


def _gradients(
    model: nn.Module, adapters: Mapping[Site, Adapter], calibration: Calibration
) -> dict[Site, Tensor | None]:
    """The gradients of the loss by the sites' weights, summed over the batches."""
    layers = {site: model.get_submodule(site.layer) for site in adapters}
    if held := [site for site, layer in layers.items() if is_quantized(layer, site.parameter)]:
        reason = "init={}: '{}' is quantized, and has no gradient; take another init"
        messages = [(s, reason.format(adapters[s].recipe.init, s.name)) for s in held]
        raise AdapterError(in_one(messages))
    weights = {site: layers[site]._parameters[site.parameter] for site in adapters}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    sums: dict[Site, Tensor | None] = dict.fromkeys(adapters)
    try:
        for weight in weights.values():
            assert weight is not None
            weight.requires_grad_(True)
        for batch in calibration.batches:
            with torch.enable_grad():
                loss = calibration.run(model, batch)
            leaves: list[Any] = list(weights.values())
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for site, gradient in zip(adapters, gradients, strict=True):
                if gradient is not None:
                    part = adapters[site].block_of(gradient, site.rows)
                    part = part.to(torch.promote_types(part.dtype, torch.float32))
                    sums[site] = part if (total := sums[site]) is None else total + part
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
    return sums


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """A context in which the model is its base in eval mode; random streams stay as they are."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(), slots.disabled(model):
            for module in model.eval().modules():
                quantized.keep_as_loaded(module)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
