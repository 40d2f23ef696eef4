"""A checkpoint's tensors by the names that a model of transformers has for them."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.checkpoint import Checkpoint
from lora_lab.adapters.recipe import AdapterError


@dataclass(frozen=True)
class Sources:
    """What one or more of a model's tensors are made of."""

    name: str
    """The key in the model, or the first of them."""
    keys: list[str]
    """Keys in the file."""
    patterns: list[str | None]
    """Which pattern of a converter of transformers each key fits; None where it is as stored."""


# Files of Mixtral with 8 experts hold model.layers.0.block_sparse_moe.experts.0.w1.weight (i × h)
# to experts.7.w1.weight, and as many of w3 and w2. The model has mlp.experts.gate_up_proj (8, 2i,
# h), which transformers joins of 16 tensors, and mlp.experts.down_proj (8, h, i) of 8. They are
# joined here when they are asked for, by transformers' own converters.
class TransformersCheckpoint(Checkpoint):
    """Reads tensors as `Checkpoint`, by the keys that they have in a model of transformers.

    What its loading renames, joins, splits or adds a prefix to is so here too, one tensor at a
    time. Keys that the model does not have stay as they are. `model` may be on the meta device.
    """

    def __init__(self, path: Path, model: Any):
        self.path, self._model, self._stored = path, model, Checkpoint(path)
        self._converters: dict[str, Any] = {}
        """Pattern of keys in files → transformers' converter of them."""
        self._sources: dict[str, Sources] = {}
        """Key in the model → what it is made of."""
        for sources in self._all_sources():
            is_stored = sources.patterns[0] is None
            keys = [sources.name] if is_stored else self._convert(sources, on_meta=True)
            self._sources |= dict.fromkeys(keys, sources)
        self.files = {key: self._stored.files[one.keys[0]] for key, one in self._sources.items()}

    def _all_sources(self) -> list[Sources]:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )
        except ImportError:  # before version 5 a model's names are those of its files
            return [Sources(key, [key], [None]) for key in self._stored.files]
        mapping, state = get_model_conversion_mapping(self._model), self._model.state_dict()
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix = self._model.base_model_prefix
        sources: dict[str, Sources] = {}
        for key in sorted(self._stored.files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            one = sources.setdefault(name, Sources(name, [], []))
            one.keys.append(key)
            one.patterns.append(pattern)
        return [*sources.values()]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key → shape, from the headers of the files."""
        shapes = {}
        for sources in {id(one): one for one in self._sources.values()}.values():
            if sources.patterns[0] is None:
                shapes[sources.name] = self._stored.shapes[sources.keys[0]]
            else:
                tensors = self._convert(sources, on_meta=True)
                shapes |= {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return shapes

    def tensor(self, key: str, index: int | None = None) -> Tensor:
        """A copy of one tensor, or of its part `index`."""
        sources = self._sources[key]
        if sources.patterns[0] is None:
            return self._stored.tensor(sources.keys[0], index)
        tensor = self._convert(sources, on_meta=False)[key]
        return tensor if index is None else tensor[index].clone()

    def _convert(self, sources: Sources, on_meta: bool) -> dict[str, Tensor]:
        """What transformers makes of some tensors of the files, by key; on meta without values."""
        converter = deepcopy(self._converters[sources.patterns[0] or ""])
        for key, pattern in zip(sources.keys, sources.patterns, strict=True):
            shape = self._stored.shapes[key]
            tensor = torch.empty(shape, device="meta") if on_meta else self._stored.tensor(key)
            converter.add_tensor(sources.name, key, pattern, tensor)
        try:
            tensors = converter.convert(sources.name, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, TypeError) as error:
            shown = f"{sources.keys[0]} to {sources.keys[-1]}"
            name = sources.name
            raise AdapterError(f"{self.path}: no {name} can be made of {shown}: {error}") from None
        return {key: one[0] if isinstance(one, list) else one for key, one in tensors.items()}
