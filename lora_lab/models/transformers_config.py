"""The config.json of a model of transformers, what a run sets in it, and the heads of models."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def auto_class(head: str) -> Any:
    """The class of transformers that chooses a model with this head, a key of HEADS."""
    import transformers

    return getattr(transformers, HEADS[head].auto_class)


def config_of(
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
        _set_dropouts(config, dropout)
    return config


def _set_dropouts(config: Any, dropout: float) -> None:
    """Sets all dropouts of a config, and of the configs in it: of a text and a vision model."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            _set_dropouts(value, dropout)
        # layerdrop and drop_path leave out whole layers, which is another thing.
        elif re.search("drop(?!_path)", name.replace("layerdrop", "")) and _is_number(value):
            setattr(config, name, dropout)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


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
        with quiet():
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


@contextmanager
def quiet() -> Iterator[None]:
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
