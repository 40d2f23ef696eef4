"""The head with which a checkpoint was pretrained, over the layers of a model that has another."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.model_call import Inputs, logits
from lora_lab.models.pretrained import load_weights, new_parameters, pretrained

OF_THE_MODEL = ("head", "new_head", "out_features", "pad_token_id", "quantization")
"""Arguments of `pretrained` that are about the model's own head, or its layers."""


class PretrainedHead:
    """Gives a checkpoint's outputs by the layers of another model, which may have adapters.

    `settings` are the arguments of `pretrained` for that model. `head` is the one whose outputs are
    wanted, as `language`; its weights are read by `load`. Weights that it shared with the layers
    below, as a table of tokens, are the checkpoint's, whatever the model's have become.
    """

    with_head: Any
    """The checkpoint's model, of which the head alone is kept."""

    def __init__(self, head: str, settings: dict[str, Any]):
        kept = {name: value for name, value in settings.items() if name not in OF_THE_MODEL}
        self.settings = {**kept, "head": head}

    def check(self, model: nn.Module) -> None:
        """Raises ValueError where the checkpoint has no such head over the layers of `model`.

        Only the headers of its files are read. `model` may be on the meta device.
        """
        path, head = self.settings["path"], self.settings["head"]
        with_head: Any = _on_meta_device(tuple(sorted(self.settings.items())))
        if missing := new_parameters(with_head, **self.settings):
            raise ValueError(
                f"model.path={path} has no head for it (model.head={head}): {missing[0]} is in none"
                " of its files"
            )
        below: Any = with_head.base_model
        if below is with_head or type(below) is not type(getattr(model, "base_model", None)):
            raise ValueError(
                f"{type(with_head).__name__} (model.head={head}) is not made of the same layers as"
                f" {type(model).__name__}, so that it cannot read those of the run"
            )

    def load(self) -> None:
        """Reads the head's weights. Not in a call, which may be within vmap."""
        self.with_head = load_weights(**self.settings).eval().requires_grad_(False)
        setattr(self.with_head, self.with_head.base_model_prefix, nn.Identity())

    def __call__(self, model: Any, inputs: Inputs) -> Tensor:
        """The outputs of the head, from the last hidden states of `model`."""
        with_head = self.with_head
        weight = next(p for p in model.parameters() if p.is_floating_point())
        with_head.to(weight.device, weight.dtype)
        setattr(with_head, with_head.base_model_prefix, model.base_model)
        try:
            return logits(with_head, inputs)
        finally:
            setattr(with_head, with_head.base_model_prefix, nn.Identity())


@lru_cache(maxsize=4)
def _on_meta_device(settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    """A model without memory; each point of a multirun asks for the same one."""
    with torch.device("meta"):
        return pretrained(**dict(settings))
