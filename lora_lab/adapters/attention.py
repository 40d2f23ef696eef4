"""Which modules of a model are attention: told by what they are, not by where they lie."""

import re

from torch import nn

ATTENTION = re.compile("attention|attn", re.IGNORECASE)
POSITION = re.compile("position|relative|rel_pos|attention_bias", re.IGNORECASE)


# A module is attention if its class or its own name says so and it holds no other layers than those
# of one attention. Of a BERT's layer, and of the block of a diffusion model:
#   attention            BertAttention           yes: self, and what projects its result
#   attention.self       BertSelfAttention       yes
#   attentions           nn.ModuleList           no: a container
#   attentions.0         Transformer2DModel      no: its class and its name, "0", say nothing
#   down_blocks.0        CrossAttnDownBlock2D    no: it has attention in its children's children
#   attentions.0.transformer_blocks.0.attn1      yes: class Attention
def attention_names(model: nn.Module) -> set[str]:
    """The names of the modules that are attention; a layer below one of them belongs to it."""
    named = {
        name: module for name, module in model.named_modules() if _says_attention(name, module)
    }
    return {name for name, module in named.items() if name and not _holds_more(name, module, named)}


def _says_attention(name: str, module: nn.Module) -> bool:
    """Whether a module's class or its own name says that it is attention."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return bool(
        ATTENTION.search(type(module).__name__) or ATTENTION.search(name.rpartition(".")[2])
    )


def _holds_more(name: str, module: nn.Module, named: dict[str, nn.Module]) -> bool:
    """Whether a module that is called attention is a block with attention, and more, in it."""
    inner = [n for n, child in named.items() if n.startswith(f"{name}.") and _layers(child)]
    outside = [
        n for n in _layers(module) if not any(f"{name}.{n}".startswith(f"{i}.") for i in inner)
    ]
    is_deeper = any("." in n.removeprefix(f"{name}.") for n in inner)
    return bool(inner) and (is_deeper or len(outside) > 1)


def _layers(module: nn.Module) -> list[str]:
    """The names of the linear layers and convolutions of images within a module."""
    return [n for n, m in module.named_modules() if n and isinstance(m, nn.Linear | nn.Conv2d)]


def is_position_table(name: str, kind: str) -> bool:
    """Whether a site holds positions (a table, or what computes one) rather than attention."""
    return kind == "embedding" or bool(POSITION.search(name))
