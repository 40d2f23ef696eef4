"""Models of transformers by the folder or the hub id that they lie in: the model itself, unwrapped.

`pretrained` builds one from its config, without weights. `load_weights` gives it with the weights,
`new_parameters` says which of its parameters no file holds, without reading a weight.
"""

import inspect
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.adapters.quantized import keep_as_loaded
from lora_lab.config.errors import first_line
from lora_lab.models import quantization as quantized
from lora_lab.models.quantization import Quantization
from lora_lab.models.transformers_config import HEADS, auto_class, config_of, quiet

HeadName = Literal["classification", "language", "masked", "seq2seq", "tokens", "image"]
DType = Literal["float32", "bfloat16", "float16", "float64"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]


def pretrained(
    path: str,
    head: HeadName,
    out_features: int | None = None,
    revision: str | None = None,
    dtype: DType = "float32",
    attention: Attention | None = None,
    remote_code: bool = False,
    gradient_checkpointing: bool = False,
    dropout: float | None = None,
    new_head: bool = False,
    pad_token_id: int | None = None,
    quantization: Quantization | None = None,
) -> nn.Module:
    """A transformers model built from the config.json at `path`; its weights are not loaded.

    Args:
        path: A folder that save_pretrained wrote, or a hub's id, as google-bert/bert-base-uncased.
        head: What it is used for, a key of HEADS.
        out_features: The data's classes; of a language model the data's tokens, which must fit.
        revision: A branch, tag or commit of the hub.
        dtype: In which the weights are held.
        attention: How attention is computed; None: the fastest that torch has for the model.
        remote_code: Runs the Python code that lies at `path`.
        gradient_checkpointing: Keeps fewer activations and computes the others again (Chen et al.
            2016), which saves memory and costs a second forward pass.
        dropout: In the place of all dropouts of the config and the layers; layerdrop stays.
        new_head: Draws the head anew though the file has one, as for another number of classes.
        pad_token_id: The token that fills the data's short rows. A classifier of GPT-2's or
            Llama's kind reads the last token that is another; None: the config's, or the end of
            text.
        quantization: In which form load_weights holds the weights of linear layers below the head,
            frozen; what is built here has none.

    Raises ValueError, `argument=value: rule`, where there is no such model.
    """
    if quantization is not None:
        quantized.check_available(quantization)
    config = config_of(path, head, out_features, revision, remote_code, dropout)
    with quiet():
        try:
            model = auto_class(head).from_config(
                config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=remote_code,
            )
        except (ValueError, ImportError) as error:
            raise ValueError(_reason(error, config, path, head, attention)) from None
    return _prepare(model, gradient_checkpointing, pad_token_id, dropout)


pretrained.path_arguments = ("path",)  # pyright: ignore[reportFunctionMemberAccess]


def load_weights(*positional: Any, **named: Any) -> nn.Module:
    """The model of `pretrained` with the weights that lie at `path`, read once, into one copy.

    The `new_parameters` have values that are to be drawn again. Arguments are `pretrained`'s.
    """
    bound = inspect.signature(pretrained).bind(*positional, **named)
    bound.apply_defaults()
    chosen = SimpleNamespace(**bound.arguments)
    asked = chosen.out_features, chosen.revision, chosen.remote_code, chosen.dropout
    config = config_of(chosen.path, chosen.head, *asked)
    dtype = getattr(torch, chosen.dtype)
    held: dict[str, Any] = {}
    if chosen.quantization is not None:
        with torch.device("meta"):
            shapes = pretrained(**bound.arguments)
        new = new_parameters(shapes, **bound.arguments)
        held = quantized.loading_arguments(chosen.quantization, shapes, new, dtype)
    with quiet(), torch.random.fork_rng(devices=[]):  # new parameters are drawn in loading
        model = auto_class(chosen.head).from_pretrained(
            chosen.path,
            config=config,
            revision=chosen.revision,
            dtype=dtype,
            attn_implementation=chosen.attention,
            trust_remote_code=chosen.remote_code,
            ignore_mismatched_sizes=chosen.new_head,
            **held,
        )
    for layer in model.modules():
        keep_as_loaded(layer)
    chosen_last = chosen.gradient_checkpointing, chosen.pad_token_id, chosen.dropout
    return _prepare(model, *chosen_last).train()


def quantized_parameters(model: nn.Module, new: list[str], **arguments: Any) -> list[str]:
    """The names of the parameters that `load_weights` holds quantized, by these arguments.

    `model` is that of `pretrained`, `new` are its `new_parameters`.
    """
    layers = [] if arguments.get("quantization") is None else quantized.quantized_layers(model, new)
    return [f"{name}.weight" for name in layers]


def new_parameters(model: nn.Module, path: str, **arguments: Any) -> list[str]:
    """The names of those parameters of `model` that no file at `path` holds, as a new head's.

    Only the files' headers are read. `model` is that of `pretrained` with these arguments, which
    may be on the meta device. Raises ValueError where the files are not this model's.
    """
    from transformers.modeling_utils import load_state_dict

    stored: dict[str, Tensor] = {}
    for file in weight_files(path, arguments.get("revision")):
        try:
            stored |= load_state_dict(file, map_location="meta")
        except Exception as error:  # of safetensors, pickle or torch, by what the file is
            raise ValueError(f"path={path}: {file} cannot be read: {error}") from None
    # transformers renames and joins tensors of older files; here it does so with meta tensors.
    with quiet():
        _, report = type(model).from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            None,
            config=model.config,
            state_dict=stored,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    names = [name for name, _ in model.named_parameters()]
    is_new = {*report["missing_keys"]}
    if arguments.get("new_head"):
        is_new |= {name for name in names if not name.startswith(f"{_body(model)}.")}
    for key, in_file, here in sorted(report["mismatched_keys"]):
        if key not in is_new:
            raise ValueError(
                f"path={path}: {key} is {_shape(in_file)} in the file, and {_shape(here)} with "
                f"this data; model.new_head=true draws the head anew"
            )
    if len(is_new & {*names}) == len(names):
        raise ValueError(f"path={path}: its files hold none of the weights of {_name(model)}")
    return [name for name in names if name in is_new]


def weight_files(path: str, revision: str | None = None) -> list[str]:
    """The files that hold the weights at `path`; those of a hub are downloaded if need be."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        files, _ = _get_resolved_checkpoint_files(
            path, None, None, None, None, False, download_kwargs={"revision": revision or "main"}
        )
    except OSError as error:
        raise ValueError(f"path={path}: {first_line(error)}") from None
    return sorted(files or [])


def _prepare(
    model: Any, gradient_checkpointing: bool, pad_token_id: int | None, dropout: float | None
) -> nn.Module:
    """Sets what training needs: no cache of keys and values, but in generate(); a padding token."""
    for module in model.modules():
        # Some heads have a rate of their own where the config has none: Llama's for tokens 0.1.
        if dropout is not None and isinstance(module, nn.Dropout):
            module.p = dropout
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
    # Models that read the last token, as GPT-2's classifier, find it by this id. One of texts and
    # images has it in its text model's config.
    for config in {id(c): c for c in (model.config, _text_config(model.config))}.values():
        ends = getattr(config, "eos_token_id", None)
        if pad_token_id is not None:
            config.pad_token_id = pad_token_id
        elif getattr(config, "pad_token_id", 0) is None:
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    if gradient_checkpointing:
        # Not reentrant, so that gradients reach adapters though no input of a block has one.
        old_name = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    return model


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _body(model: Any) -> str:
    """The name of the module below the head."""
    return model.base_model_prefix


def _reason(error: Exception, config: Any, path: str, head: str, attention: str | None) -> str:
    """Why transformers builds no such model, as `argument=value: rule`."""
    if "Unrecognized configuration class" not in str(error):
        if attention is not None and ("attention" in str(error) or "attn" in str(error)):
            return f"attention={attention}: {first_line(error)}"
        return f"path={path}: {first_line(error)}"
    known = [name for name in HEADS if type(config) in auto_class(name)._model_mapping]
    return (
        f"head={head}: {config.model_type} ({path}) has no such head; it has "
        f"{', '.join(known) or 'none of ' + ', '.join(HEADS)}"
    )


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _shape(shape: Any) -> str:
    return " × ".join(map(str, shape))
