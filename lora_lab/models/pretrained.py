"""Models of transformers by the folder or the hub id that they lie in: the model itself, unwrapped.

`pretrained` builds one from its config, without weights. `load_weights` gives it with the weights,
`new_parameters` says which of its parameters no file holds, without reading a weight.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lab.config.errors import first_line, nearest_folder


@dataclass(frozen=True)
class Head:
    """What a model is used for: transformers' Auto class, and whether its head has our classes."""

    auto_class: str
    has_labels: bool


HEADS = {
    "classification": Head("AutoModelForSequenceClassification", True),
    "language": Head("AutoModelForCausalLM", False),
    "masked": Head("AutoModelForMaskedLM", False),
    "seq2seq": Head("AutoModelForSeq2SeqLM", False),
    "tokens": Head("AutoModelForTokenClassification", True),
    "image": Head("AutoModelForImageClassification", True),
}

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
        dropout: In the place of all dropouts in the config.
        new_head: Draws the head anew though the file has one, as for another number of classes.

    Raises ValueError, `argument=value: rule`, where there is no such model.
    """
    config = _config(path, head, out_features, revision, remote_code, dropout)
    with _quiet():
        try:
            model = _auto_class(head).from_config(
                config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=remote_code,
            )
        except (ValueError, ImportError) as error:
            raise ValueError(_reason(error, config, path, head, attention)) from None
    return _prepare(model, gradient_checkpointing)


pretrained.path_arguments = ("path",)  # pyright: ignore[reportFunctionMemberAccess]


def load_weights(*positional: Any, **named: Any) -> nn.Module:
    """The model of `pretrained` with the weights that lie at `path`, read once, into one copy.

    The `new_parameters` have values that are to be drawn again. Arguments are `pretrained`'s.
    """
    bound = inspect.signature(pretrained).bind(*positional, **named)
    bound.apply_defaults()
    chosen = SimpleNamespace(**bound.arguments)
    asked = chosen.out_features, chosen.revision, chosen.remote_code, chosen.dropout
    config = _config(chosen.path, chosen.head, *asked)
    with _quiet(), torch.random.fork_rng(devices=[]):  # new parameters are drawn in loading
        model = _auto_class(chosen.head).from_pretrained(
            chosen.path,
            config=config,
            revision=chosen.revision,
            dtype=getattr(torch, chosen.dtype),
            attn_implementation=chosen.attention,
            trust_remote_code=chosen.remote_code,
            ignore_mismatched_sizes=chosen.new_head,
        )
    return _prepare(model, chosen.gradient_checkpointing).train()


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
    with _quiet():
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


def _auto_class(head: str) -> Any:
    import transformers

    return getattr(transformers, HEADS[head].auto_class)


def _config(
    path: str,
    head: str,
    out_features: int | None,
    revision: str | None,
    remote_code: bool,
    dropout: float | None,
) -> Any:
    """The config at `path`, with the data's number of classes and the dropout that is wanted."""
    config = _config_at(path, revision, remote_code)
    if HEADS[head].has_labels and out_features is not None:
        config.num_labels = out_features
    elif out_features is not None:
        size = getattr(config.get_text_config(), "vocab_size", out_features)
        if out_features > size:
            raise ValueError(
                f"path={path}: it knows {size} tokens, and data.tokenizer has {out_features}"
            )
    if dropout is not None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and less than 1")
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float | int):
                setattr(config, name, dropout)
    return config


def check_path(path: str) -> None:
    """Raises ValueError where a path is neither a model's folder nor can be a hub's id."""
    if Path(path).is_file():
        raise ValueError(
            f"path={path}: it is a file; must be a folder that transformers' save_pretrained wrote,"
            f" or a hub's id{nearest_folder(path)}"
        )
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"path={path}: there is no such folder{nearest_folder(path)}")
    if Path(path).is_dir() and not Path(path, "config.json").exists():
        raise ValueError(
            f"path={path}: the folder has no config.json, which transformers' save_pretrained "
            f"writes{nearest_folder(path, 'config.json')}"
        )


def _config_at(path: str, revision: str | None, remote_code: bool) -> Any:
    from transformers import AutoConfig

    check_path(path)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(
                path, revision=revision, trust_remote_code=remote_code
            )
    except OSError as error:
        raise ValueError(
            f"path={path}: there is no such folder{nearest_folder(path)}, and no such model of a "
            f"hub that can be reached: {first_line(error)}"
        ) from None
    except (ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"path={path}: it holds Python code, which model.remote_code=true would run"
            ) from None
        raise ValueError(f"path={path}: no model of transformers: {first_line(error)}") from None


def _prepare(model: Any, gradient_checkpointing: bool) -> nn.Module:
    """Sets what training needs: no cache of keys and values, but in generate(); a padding token."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
    if getattr(model.config, "pad_token_id", 0) is None:
        # Models that read the last token, as GPT-2's classifier, find it by this id.
        ends = model.config.eos_token_id
        model.config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    if gradient_checkpointing:
        # Not reentrant, so that gradients reach adapters though no input of a block has one.
        old_name = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    return model


def _body(model: Any) -> str:
    """The name of the module below the head."""
    return model.base_model_prefix


def _reason(error: Exception, config: Any, path: str, head: str, attention: str | None) -> str:
    """Why transformers builds no such model, as `argument=value: rule`."""
    if "Unrecognized configuration class" not in str(error):
        if attention is not None and ("attention" in str(error) or "attn" in str(error)):
            return f"attention={attention}: {first_line(error)}"
        return f"path={path}: {first_line(error)}"
    known = [name for name in HEADS if type(config) in _auto_class(name)._model_mapping]
    return (
        f"head={head}: {config.model_type} ({path}) has no such head; it has "
        f"{', '.join(known) or 'none of ' + ', '.join(HEADS)}"
    )


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _shape(shape: Any) -> str:
    return " × ".join(map(str, shape))


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without transformers' progress bars and loading reports."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
