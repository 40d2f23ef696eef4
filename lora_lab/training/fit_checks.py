"""Checks that the data fits the model: its head, its table of tokens, its positions.

What does not fit would fail after the run has begun, or train on what means nothing.
"""

import logging
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from lora_lab.adapters.model_call import logits
from lora_lab.config.checks import parameters_of
from lora_lab.config.schema import Component, Config, ConfigError
from lora_lab.data import Data
from lora_lab.data.images import Images, model_inputs
from lora_lab.models.timm_model import timm_model
from lora_lab.models.transformers_config import auto_class

log = logging.getLogger(__name__)

DATA_OF_HEAD = {
    "classification": "data=text",
    "tokens": "data=words",
    "language": "data=language",
    "masked": "data=language data.objective=masked",
    "seq2seq": "data=language data.objective=seq2seq",
    "image": "data=images",
    "timm": "data=images data.input=tensor",
}
"""The head of a model (timm: any model of timm) → the settings of the data that it learns."""

POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
POSITION_TABLES += ("positions_embed", "position_embeds_layer", "position_embedding_table")
"""Last names of the layers of transformers that have a vector for each position."""


def head_of(cfg: Config) -> str | None:
    """The name of the model's head, a key of DATA_OF_HEAD; None of a model that is not read."""
    head = "timm" if cfg.model.callee is timm_model else cfg.model.arguments.get("head")
    return head if head in DATA_OF_HEAD else None


def check_head(cfg: Config, data: Data) -> None:
    """Raises ConfigError where the data says which heads learn it, and the model's is no such."""
    head = head_of(cfg)
    if data.heads is None or head in data.heads or head is None:
        return
    needed = " or ".join(
        "model=timm" if name == "timm" else f"model=pretrained model.head={name}"
        for name in data.heads
    )
    shown = "model=timm" if head == "timm" else f"model.head={head}"
    name = type(data).__name__.lower()
    raise ConfigError(
        f"{shown}: data={name}{data.heads_because} needs {needed}; "
        f"{shown} learns {DATA_OF_HEAD[head]}"
    )


def with_max_length(cfg: Config, data: Data, model: nn.Module, key: str = "data") -> Config:
    """The config with the `max_length` of data, or of forget (`key`), filled in where it is null.

    Null stands for the data's usual length, or for as many as the model has positions where these
    are fewer. Raises ConfigError where rows could be longer than the model has positions, or are
    too short to hold a token of their text. `model` may be on the meta device.
    """
    positions = position_count(model)
    usual_length: int | None = getattr(data, "usual_length", None)
    if usual_length is None:
        return cfg
    component: Component = getattr(cfg, key)
    given: dict[str, Any] = component.arguments
    block, max_length = given.get("block"), given.get("max_length")
    parameters, _ = parameters_of(component.callee)
    if max_length is None and "max_length" in parameters:
        max_length = usual_length if block else min(usual_length, positions or usual_length)
        changed = component.model_copy(update={"max_length": max_length})
        cfg = cfg.model_copy(update={key: changed})
    # With `block`, all tokens follow each other, and max_length cuts none of them.
    name, length = ("block", block) if block else ("max_length", max_length)
    if length is None:
        return cfg  # a data set of a user's own, without this argument
    if positions is not None and length > positions:
        raise ConfigError(
            f"{key}.{name}={length}: the model has {positions} positions "
            f"(model.path={cfg.model.arguments.get('path')}); at most {key}.{name}={positions}"
        )
    multiple = given.get("pad_to_multiple") or 1
    if positions is not None and -(-length // multiple) * multiple > positions:
        raise ConfigError(
            f"{key}.pad_to_multiple={multiple}: rows of {key}.{name}={length} tokens are filled to "
            f"{-(-length // multiple) * multiple}, and the model has {positions} positions"
        )
    least = getattr(data, "least_length", 1)
    if length < least:
        raise ConfigError(
            f"{key}.{name}={length}: leaves a row no token to learn from beside the special tokens "
            f"of {key}.tokenizer; at least {key}.{name}={least}"
        )
    return cfg


def position_count(model: nn.Module) -> int | None:
    """The most tokens that the model can read; None where it has no table of positions.

    Rotary and relative positions need none, and have no such end.
    """
    counts = [
        _places(layer)
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(layer, nn.Embedding)
    ]
    if not counts:
        return None
    # An encoder-decoder may have a longer table for the encoder: the longest counts. A config can
    # say less than the table has, as Nyströmformer's does, which leaves its first two rows unused.
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(max(counts), stated or max(counts))


def _places(table: nn.Embedding) -> int:
    """How many positions a table has vectors for."""
    if (offset := getattr(table, "offset", None)) is not None:
        return table.num_embeddings - int(offset)  # BART and OPT skip the first two rows
    if type(table) is nn.Embedding and table.padding_idx is not None:
        # RoBERTa and its like number positions from padding_idx + 1: 514 rows, padding_idx 1,
        # the first token is at 2, and the last of 512 at 513.
        return table.num_embeddings - table.padding_idx - 1
    return table.num_embeddings


def check_reading_direction(cfg: Config, model: nn.Module) -> None:
    """Raises ConfigError where a model of masked tokens would see the token that it predicts.

    BERT's kind, of which transformers makes a language model that still reads in both directions
    unless its config.json has `is_decoder` (XLM: `causal`); and XLNet, which always does.
    """
    config: Any = getattr(model, "config", None)
    if cfg.model.arguments.get("head") != "language" or config is None:
        return
    reads_forward = any(
        getattr(config, name, False) for name in ("is_decoder", "causal", "is_encoder_decoder")
    )
    is_masked = type(config) in auto_class("masked")._model_mapping
    always_back = config.model_type == "xlnet"
    if always_back or (not reads_forward and (is_masked or config.model_type == "bert-generation")):
        ways = ["model.head=masked data.objective=masked is what it has learned"] * is_masked
        flag = "causal" if hasattr(config, "causal") else "is_decoder"
        ways += [f"{flag}=true in its config.json has it read forward only"] * (not always_back)
        raise ConfigError(
            f"model.head=language: {config.model_type} (model.path={cfg.model.arguments['path']}) "
            f"reads in both directions and would see the token that it predicts; {'; '.join(ways)}"
        )


def check_class_order(cfg: Config, data: Data, model: nn.Module, new: Collection[str]) -> None:
    """Raises ConfigError where the head at model.path has the data's classes in another order.

    `new` are the names of the parameters that are drawn anew. The head's are a model's last ones:
    a new head has no order yet. Where the head has other classes, a warning is logged.
    """
    classes: Sequence[str] = getattr(data, "class_names", None) or ()
    names = dict(getattr(getattr(model, "config", None), "id2label", None) or {})
    of_head = [str(names[i]) for i in sorted(names)]
    data_order, head_order = ([name.lower() for name in one] for one in (classes, of_head))
    is_new = [name for name, _ in model.named_parameters()][-1] in new
    if is_new or data_order == head_order or not classes:
        return
    if sorted(data_order) != sorted(head_order):
        if not all(re.fullmatch(r"label_\d+", name) for name in head_order):
            shown = ", ".join(of_head[:8]), ", ".join(classes[:8])
            log.warning("the head at model.path has the classes %s, the data has %s", *shown)
            log.warning("model.new_head=true draws another head")
        return
    listed = ",".join(sorted(classes, key=lambda name: head_order.index(name.lower())))
    raise ConfigError(
        f"data.classes: the head at model.path={cfg.model.arguments.get('path')} has the "
        f"classes in the order {', '.join(of_head)}, and the data as {', '.join(classes)}; "
        f"data.classes=[{listed}] is the head's order, model.new_head=true draws another head"
    )


def check_images(cfg: Config, data: Data, model: nn.Module) -> None:
    """Raises ConfigError where the model, on the meta device, cannot take images of data's shape.

    Many models state a size and take any: refused is only what fails with the data's shape, and not
    with the one that the model states.
    """
    if not isinstance(data, Images):
        return
    shape = channels, height, width = data.pixels.shape
    stated = _stated_shape(model, shape)
    if stated == shape or _takes(model, data.input, shape) or not _takes(model, data.input, stated):
        return
    path = f"model.path={cfg.model.arguments.get('path')}"
    if stated[0] != channels:
        raise ConfigError(
            f"{path}: the model takes {stated[0]}-channel images, and those of data=images have "
            f"{channels} channels: red, green and blue"
        )
    size = cfg.data.arguments.get("size")
    raise ConfigError(
        f"data.size={'null' if size is None else size}: images of {height} × {width} pixels, and "
        f"the model ({path}) takes {stated[1]} × {stated[2]}; data.size={stated[1]} fits"
    )


def _stated_shape(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The channels, height and width of the images that a model says it takes, else `shape`'s."""
    model = getattr(model, "timm_model", model)  # within transformers' model of timm's models
    if of_timm := getattr(model, "pretrained_cfg", None):
        channels, *sides = of_timm.get("input_size") or shape
        # model.image_size changes the model, and not its settings.
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return channels, *(built or sides)
    config: Any = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    sides = getattr(config, "image_size", None) or shape[1:]
    sides = (sides, sides) if isinstance(sides, int) else sides
    return getattr(config, "num_channels", shape[0]), *sides


@lru_cache(maxsize=4)
def _takes(model: nn.Module, input: str, shape: tuple[int, ...]) -> bool:
    """Whether a model on the meta device gives an output for images of a shape."""
    parameter = next(model.parameters())
    images = torch.empty(2, *shape, dtype=parameter.dtype, device=parameter.device)
    was_training = model.training
    try:
        with torch.no_grad():
            logits(model.eval(), model_inputs(images, input))
    except Exception:  # of any kind: a model's own check, or a shape that does not fit
        return False
    finally:
        model.train(was_training)
    return True


def check_vocabulary(cfg: Config, data: Data, model: nn.Module, key: str = "data") -> None:
    """Raises ConfigError where the data's tokenizer gives ids that the model has no vector for."""
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None or (size := _embedding_count(model)) is None:
        return
    token, largest = _largest_id(tokenizer)
    if largest >= size:
        path = getattr(cfg, key).arguments.get("tokenizer")
        raise ConfigError(
            f"{key}.tokenizer={path}: token {token!r} has the id "
            f"{largest}, and model.path={cfg.model.arguments.get('path')} has vectors for {size} "
            f"tokens, ids 0 to {size - 1}; the tokenizer must be the model's ({key}.tokenizer is "
            "model.path where it is not set)"
        )


def _embedding_count(model: nn.Module) -> int | None:
    """How many tokens a model of transformers has vectors for; None for other models."""
    try:
        return len(model.get_input_embeddings().weight)  # pyright: ignore
    except (AttributeError, NotImplementedError, TypeError):
        return None


@lru_cache(maxsize=4)
def _largest_id(tokenizer: Any) -> tuple[str, int]:
    """The token of the largest id that a text can become, or that is put around it.

    Control tokens that stand in no text are left out: some models, as Gemma 3 of 1B parameters,
    have in their tokenizers those of their larger sisters (`<image_soft_token>`), without vectors.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    used = {getattr(tokenizer, f"{name}_token", None) for name in names}
    unused = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in used and token.content not in template
    }
    ids = {token: id for token, id in tokenizer.get_vocab().items() if token not in unused}
    return max(ids.items(), key=lambda item: item[1])
