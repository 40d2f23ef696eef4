"""Which layer a weight of a checkpoint belongs to: its sites, and the matrices in which it lies.

A model tells it, on the meta device, where there is one. Otherwise the names and shapes of the
weights do: a model of layers without values is made of them. In both cases `candidate_sites` says
of what kind a layer is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lab.adapters.memory import memory_span, names_at, parameters_in_memory
from lora_lab.adapters.sites import Site, adapter_class, candidate_sites

EMBEDDING_NAME = re.compile(r"embed\w*|\w*embeddings?|wte|wpe|shared|relative_attention_bias")
"""The last word of a layer's name that is taken for an embedding where no model tells."""

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""The layer of a weight with this many dimensions, where no model tells."""


class UnknownModule(nn.Module):
    """A module of which no name tells what it does with its parameters."""


class NamedExperts(UnknownModule):
    """A module called `experts`, whose parameters of three dimensions have a matrix for each."""


def model_of_names(shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A model on the meta device with a layer for each weight, told by its key and its shape.

    It has the keys of `shapes`. A `weight` of two dimensions is an embedding's where the layer's
    name says so, else nn.Linear's; one of three to five dimensions is a convolution's without
    groups, if it has several channels. The parameters of a module called `experts` are (E, out,
    in). Of all other weights only the parameter is known.
    """
    model = UnknownModule()
    with torch.device("meta"):
        # A layer comes before its other parameters and before the layers in it.
        for key in sorted(shapes, key=lambda key: (key.count("."), not key.endswith(".weight"))):
            *path, name = key.split(".")
            parent = model
            for part in path[:-1]:
                parent = parent._modules.setdefault(part, UnknownModule())
                assert parent is not None
            if path and path[-1] not in parent._modules:
                is_weight = name == "weight"
                parent._modules[path[-1]] = _layer(path[-1], shapes[key] if is_weight else ())
            layer = parent._modules[path[-1]] if path else model
            assert layer is not None
            if layer._parameters.get(name) is None:
                weight = torch.empty(tuple(shapes[key]))
                layer._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return model


def _layer(name: str, shape: Sequence[int]) -> nn.Module:
    """The layer with a weight of this shape, by its name; a plain module where that tells none."""
    if len(shape) == 2 and EMBEDDING_NAME.fullmatch(name):
        return nn.Embedding(shape[0], shape[1])
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False)
    # One input channel is mostly a group's, and how many groups there are no name tells.
    if len(shape) in CONVOLUTIONS and shape[1] > 1:
        out, channels, *kernel = shape
        return CONVOLUTIONS[len(shape)](channels, out, tuple(kernel), bias=False)  # pyright: ignore
    return NamedExperts() if name == "experts" else UnknownModule()


def sites_by_key(model: nn.Module) -> dict[str, list[Site]]:
    """State-dict key of each weight → its site, or one site for each block of its rows.

    A weight that several layers share has those of the first layer by each of its keys; `tied_to`
    then names the other keys.
    """
    parameters = parameters_in_memory(model)
    sites: dict[str, list[Site]] = {}
    for site in candidate_sites(model):
        weight = model.get_submodule(site.layer)._parameters.get(site.parameter)
        known = sites.get(site.key, [])
        if weight is None or (known and known[0].key != site.key):
            continue  # computed from other parameters; or shared, and known by another layer
        names = names_at(memory_span(weight), parameters)
        site = replace(site, tied_to=tuple(name for name in names if name != site.key))
        for name in names:
            sites.setdefault(name, []).append(site)
    return sites


def matrices(model: nn.Module, site: Site, weight: Tensor) -> list[Tensor]:
    """A site's matrices (out × rest) in a tensor of its weight's shape: one, or each expert's."""
    Adapter = adapter_class(model.get_submodule(site.layer), site.parameter)
    matrix = Adapter.weight_to_matrix(Adapter.block_of(weight, site.rows))
    return list(matrix) if matrix.dim() == 3 else [matrix]
