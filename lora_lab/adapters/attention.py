"""Which modules of a model are attention: told by what they are, not by where they lie."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

ATTENTION = re.compile("attention|attn", re.IGNORECASE)
LAST_WORD = re.compile(r"(attention|attn)[\d_d]*$", re.IGNORECASE)
"""As in BertSelfAttention, attn1 and FlashAttention2, and not in AttentionClassifier."""
POSITION = re.compile("position|relative|rel_pos|attention_bias", re.IGNORECASE)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""The classes that hold modules and are nothing themselves; a subclass of them may be attention."""


@dataclass(frozen=True)
class _Part:
    """A module as a part of the one that holds it."""

    is_layer: bool
    """Whether it is a linear layer or a convolution of images."""
    says_attention: bool
    """Whether its class or its own name has the word."""
    layers: int
    """How many layers lie within it."""
    holds_attention: bool
    """Whether a module within it says attention, and has layers."""

    @property
    def is_attention(self) -> bool:
        """Whether it says attention and has layers to compute it with."""
        return self.says_attention and self.layers > 0


# A module is attention if its class or its own name says so and it holds no other layers than those
# of one attention. Of a BERT's layer, and of the block of a diffusion model:
#   attention            BertAttention           yes: self, and what projects its result
#   attention.self       BertSelfAttention       yes
#   attentions           nn.ModuleList           no: a list of blocks
#   attentions.0         Transformer2DModel      no: its class and its name, "0", say nothing
#   down_blocks.0        CrossAttnDownBlock2D    no: it has attention in its children's children
#   attentions.0.transformer_blocks.0.attn1      yes: class Attention
# The modules are visited from the last to the first, so that a module's parts come before it. What
# a plain container holds are parts of the module that holds the container:
#   MultiHeadAttention(heads=ModuleList([AttentionHead(), AttentionHead()]), out=Linear(8, 8))
# has three parts: two heads and `out`.
def attention_names(model: nn.Module) -> set[str]:
    """The names of the modules that are attention; a layer below one of them belongs to it.

    The name of the model itself is "".
    """
    names: set[str] = set()
    parts_of: dict[str, list[_Part]] = {}  # name of a module → its parts
    for name, module in reversed([*model.named_modules(remove_duplicate=False)]):
        parts = parts_of.pop(name, [])
        parent, _, own_name = name.rpartition(".")
        if is_attention := _is_attention(module, own_name, parts):
            names.add(name)
        part = _as_part(module, own_name, parts)
        is_open = type(module) in CONTAINERS and (part.holds_attention or not is_attention)
        if name:
            parts_of.setdefault(parent, []).extend(parts if is_open else [part])
    return names


def _as_part(module: nn.Module, own_name: str, parts: Sequence[_Part]) -> _Part:
    """A module with these parts, as a part itself."""
    return _Part(
        is_layer=isinstance(module, nn.Linear | nn.Conv2d),
        says_attention=_says(ATTENTION, module, own_name),
        layers=sum(part.is_layer + part.layers for part in parts),
        holds_attention=any(part.is_attention or part.holds_attention for part in parts),
    )


def _says(word: re.Pattern[str], module: nn.Module, own_name: str) -> bool:
    """Whether a module's class or its own name has the word."""
    return bool(word.search(type(module).__name__) or word.search(own_name))


def _is_attention(module: nn.Module, own_name: str, parts: Sequence[_Part]) -> bool:
    """Whether a module with these parts is attention, and not a block with more in it."""
    if not _says(ATTENTION, module, own_name):
        return False
    if any(part.holds_attention for part in parts):
        return False  # its parts are blocks with attention
    others = [part for part in parts if not part.is_attention]
    if type(module) in CONTAINERS and any(part.layers for part in others):
        return False  # its parts are blocks that do not say what they are
    if len(others) == len(parts):
        return True
    # One more layer is what projects the result of the attention in it, as in BertAttention; in an
    # AttentionClassifier it is the head.
    other_layers = sum(part.is_layer + part.layers for part in others)
    return other_layers == 0 or (other_layers == 1 and _says(LAST_WORD, module, own_name))


def is_position_table(name: str, kind: str) -> bool:
    """Whether a site holds positions (a table, or what computes one) rather than attention."""
    return kind == "embedding" or bool(POSITION.search(name))
