"""The weights of a run's base: read where they are in the model with adapters, never copied."""

import hashlib
from collections.abc import ItemsView, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters.files import is_adapter_key
from lora_lab.adapters.slots import merged_adapters


class BaseWeights(Mapping[str, Tensor]):
    """The base's weights by key, read from a model with adapters, which never changes them.

    Each access gives the tensor as it is now: on another device after the model has moved, and
    the base's own while an adapter is merged.

    `digests` has a SHA-256 of each tensor before training, by which `changed` tells that they are
    still the same.
    """

    def __init__(self, model: nn.Module, digests: Mapping[str, str] | None = None):
        self.model = model
        self.digests = {k: _digest(v) for k, v in self.items()} if digests is None else digests

    def __getitem__(self, key: str) -> Tensor:
        if merged_adapters(self.model):
            return adapters.base_state_dict(self.model)[key]
        path, _, name = key.rpartition(".")
        layer = self.model.get_submodule(path)
        # Not by attribute: that of an adapted layer can give W + ΔW.
        value = layer._parameters.get(name)
        value = layer._buffers[name] if value is None else value
        assert value is not None
        return value.detach()

    def items(self) -> ItemsView[str, Tensor]:
        """All weights by key, at the cost of one walk through the model."""
        return adapters.base_state_dict(self.model).items()

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.model.state_dict() if not is_adapter_key(key))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def changed(self) -> list[str]:
        """The keys of tensors that are not what they were, bit for bit."""
        return [key for key, value in self.items() if _digest(value) != self.digests.get(key)]


def _digest(tensor: Tensor) -> str:
    flat = tensor.cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
